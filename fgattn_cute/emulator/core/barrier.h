// SPDX-License-Identifier: Apache-2.0
// Named barriers, the cluster barrier and mbarriers.
#ifndef FGE_BARRIER_H
#define FGE_BARRIER_H
#include "machine.h"

// The state of an mbarrier lives in its 64 bits of shared memory: bits 0-19 pending arrivals, 20-39 expected arrivals,
// 40-60 transaction count biased by 2^20 - 1, 61 phase, 62-63 a tag (01), so that words never initialised or
// overwritten are noticed. PTX ISA 9.7.13.15: counts up to 2^20 - 1, tx-count within +-(2^20 - 1).
static inline u32 mbarrier_pending(u64 v) { return (u32)(v & 0xfffff); }
static inline u32 mbarrier_expected(u64 v) { return (u32)(v >> 20 & 0xfffff); }
static inline s32 mbarrier_tx(u64 v) { return (s32)(v >> 40 & 0x1fffff) - 0xfffff; }
static inline u32 mbarrier_phase(u64 v) { return (u32)(v >> 61 & 1); }
static inline bool mbarrier_valid(u64 v) { return v >> 62 == 1; }

// The word of an initialised mbarrier; fails if there is none at the address.
u64* mbarrier_word(Machine* m, Cta* cta, u32 address, const char* what);
// Arrival of `count`, after adding tx to the transaction count. Returns the state before.
u64 mbarrier_arrive(Machine* m, Cta* cta, u32 address, u32 count, s32 tx, const char* what);
void mbarrier_add_tx(Machine* m, Cta* cta, u32 address, s32 tx, const char* what);
// cp.async.mbarrier.arrive without .noinc: one more arrival is expected in this phase.
void mbarrier_increment_pending(Machine* m, Cta* cta, u32 address);
void mbarriers_at_exit(Machine* m, Cta* cta);
// Called when a warp has exited: barriers over all live warps may complete.
void barriers_after_exit(Machine* m);
#endif
