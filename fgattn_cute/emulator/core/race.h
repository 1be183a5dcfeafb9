// SPDX-License-Identifier: Apache-2.0
// Happens-before race detection on shared memory, across the CTAs of a cluster, in granules of 4 bytes.
//
// Actors are the warps and the asynchronous agents they start: the wgmma reads of a warpgroup, the bulk-store reads of
// a warp, the cp.async writes of a warp, and the TMA writes that complete on an mbarrier. Each actor has a clock (its
// epoch), each warp a vector of the epochs it is ordered after. An asynchronous access takes a ticket, an epoch of its
// agent; waiting for it copies the ticket into the waiter's vector. Epochs never go back between CTAs: a new CTA starts
// ordered after everything before it, so shadows need no reset.
#ifndef FGE_RACE_H
#define FGE_RACE_H
#include "machine.h"

typedef enum { AGENT_WGMMA, AGENT_BULK, AGENT_CP, AGENT_TMA } Agent;

void race_start_cluster(Machine* m);
void race_free(Machine* m);

// Accesses of a warp through the generic proxy.
void race_warp_read(Machine* m, Warp* w, u32 address, u32 size);
void race_warp_write(Machine* m, Warp* w, u32 address, u32 size);

// Asynchronous accesses. key: warpgroup, warp, or shared address of the mbarrier. race_ticket starts an operation of an
// agent; race_async_* record its accesses, ordered by the clock of warp w; race_join_ticket orders warp w after it.
u32 race_ticket(Machine* m, Cta* cta, Agent agent, u32 key);
void race_async_read(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket, u32 address, u32 size, u32 pc);
void race_async_write(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket, u32 address, u32 size, u32 pc);
void race_join_ticket(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket);

// A copy of the warp's clock (to be freed), including the agent's newest ticket if agent >= 0.
u32* race_snapshot(Machine* m, Warp* w, int agent, u32 key);

// Synchronisation. Releases join the warp's clock into the barrier's, acquires the other way round.
void race_mbarrier_release(Machine* m, Warp* w, Cta* cta, u32 address);
void race_mbarrier_release_clock(Machine* m, Cta* cta, u32 address, const u32* clock, int agent, u32 key, u32 ticket);
void race_mbarrier_phase(Machine* m, Cta* cta, u32 address);
void race_mbarrier_acquire(Machine* m, Warp* w, Cta* cta, u32 address);
void race_barrier_arrive(Machine* m, Warp* w, u32 id);
void race_barrier_complete(Machine* m, Cta* cta, u32 id);
void race_barrier_acquire(Machine* m, Warp* w, u32 id);
void race_cluster_arrive(Machine* m, Warp* w);
void race_cluster_complete(Machine* m);
void race_cluster_acquire(Machine* m, Warp* w);
// All warps of a warpgroup meet (the issue of a wgmma is collective).
void race_meet(Machine* m, Cta* cta, u32 first_warp, u32 num_warps);
#endif
