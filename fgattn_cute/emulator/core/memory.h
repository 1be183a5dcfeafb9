// SPDX-License-Identifier: Apache-2.0
// Address spaces, bounds, and the shadows that remember what has been written.
#ifndef FGE_MEMORY_H
#define FGE_MEMORY_H
#include "machine.h"

// Checks [address, address + size) against the launch's regions and keeps their shadows. Returns the host pointer.
u8* global_read(Machine* m, u64 address, u64 size, int lane, const char* what);
u8* global_write(Machine* m, u64 address, u64 size, int lane, const char* what);
// Bounds only: an asynchronous access is checked at issue and performed later.
void global_bounds(Machine* m, u64 address, u64 size, int lane, const char* what);

// The CTA a shared::cluster address names.
Cta* shared_cta(Machine* m, Cta* cta, u32 address);
// Host pointer of [address, address + size) in shared memory; fails out of range.
u8* shared_pointer(Machine* m, Cta* cta, u32 address, u32 size, const char* what);
// Reports bytes of shared memory that nobody has written (CHECK_UNINIT_SHARED).
void shared_check_written(Machine* m, Cta* cta, u32 address, u32 size, u32 pc, int lane, const char* what);
// Bookkeeping after a write: by a warp (generic proxy) or by an asynchronous agent.
void shared_wrote_generic(Machine* m, Warp* w, u32 address, u32 size);
void shared_wrote_async(Machine* m, Cta* cta, u32 address, u32 size);
void shared_reset_shadow(Machine* m, Cta* cta);
// Time up to which all of the warps (a set, of one CTA) have run fence.proxy.async.
u64 last_common_fence(const Cta* cta, u32 warps);
// Does a fence at that time cover every generic write to the pages of [lo, hi] so far?
bool pages_fenced(const Cta* cta, u64 fenced, u32 lo, u32 hi);
// Warp + 1 whose generic write to the 16 bytes at `address` of the CTA is not covered by a proxy fence, or 0: a fence
// after the write will do, by the writer or by those who start the asynchronous access (`fenced` is their
// last_common_fence).
u32 unfenced_writer(const Machine* m, const Cta* cta, u64 fenced, u32 address);

// Resolves a generic or explicit-space address to a host pointer for `size` bytes.
typedef struct {
  u8* pointer;
  bool shared;
  u32 address;
} Place;
Place resolve(Machine* m, Warp* w, u64 address, u32 size, int lane, u32 space, bool write, const char* what);
const u8* param_pointer(Machine* m, u64 offset, u64 size);

// Atomics of all host threads, and reductions of the bulk engine, are serialised by one lock.
void atomic_lock(void);
void atomic_unlock(void);
#endif
