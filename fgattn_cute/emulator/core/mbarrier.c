// SPDX-License-Identifier: Apache-2.0
// mbarrier objects (PTX ISA 9.7.13.15).
#include "barrier.h"
#include "lanes.h"
#include "memory.h"
#include "race.h"

#define TX_LIMIT 0xfffff

static u64 pack(u32 pending, u32 expected, s32 tx, u32 phase) {
  return (u64)pending | (u64)expected << 20 | (u64)(u32)(tx + TX_LIMIT) << 40 | (u64)phase << 61 | 1ull << 62;
}
static int from_base(u32 address) { return (int)(address & OFFSET_MASK) - (int)SMEM_BASE; }

u64* mbarrier_word(Machine* m, Cta* cta, u32 address, const char* what) {
  if (address & 7)
    fail_at(m, KIND_MISALIGNED, -1, address, "%s: mbarrier address %#x is not a multiple of 8", what, address);
  u64* word = (u64*)shared_pointer(m, cta, address, 8, what);
  if (!mbarrier_valid(*word))
    fail_at(m, KIND_BARRIER, -1, address, "%s: no initialised mbarrier at smem+%d (the 8 bytes there are %#lx)", what,
            from_base(address), (long)*word);
  return word;
}

static void update(Machine* m, Cta* cta, u32 address, u64* word, u32 pending, u32 expected, s32 tx, u32 phase) {
  if (tx > TX_LIMIT || tx < -TX_LIMIT)
    fail_at(m, KIND_BARRIER, -1, address,
            "transaction count of the mbarrier at smem+%d overflows: %d bytes (limit 2^20 - 1)", from_base(address),
            tx);
  if (pending == 0 && tx == 0) {  // the phase completes
    phase ^= 1;
    pending = expected;
    if (m->checks & CHECK_RACE) race_mbarrier_phase(m, cta, address);
  }
  *word = pack(pending, expected, tx, phase);
  m->progress++;
}

u64 mbarrier_arrive(Machine* m, Cta* cta, u32 address, u32 arrivals, s32 tx, const char* what) {
  u64* word = mbarrier_word(m, cta, address, what);
  u64 v = *word;
  u32 pending = mbarrier_pending(v);
  if (arrivals > pending)
    fail_at(m, KIND_BARRIER, -1, address,
            "%s on the mbarrier at smem+%d: %u arrivals while %u of %u are pending (phase %u, tx %d): too many "
            "arrivals in this phase",
            what, from_base(address), arrivals, pending, mbarrier_expected(v), mbarrier_phase(v), mbarrier_tx(v));
  update(m, cta, address, word, pending - arrivals, mbarrier_expected(v), mbarrier_tx(v) + tx, mbarrier_phase(v));
  return v;
}
void mbarrier_add_tx(Machine* m, Cta* cta, u32 address, s32 tx, const char* what) {
  u64* word = mbarrier_word(m, cta, address, what);
  u64 v = *word;
  update(m, cta, address, word, mbarrier_pending(v), mbarrier_expected(v), mbarrier_tx(v) + tx, mbarrier_phase(v));
}
void mbarrier_increment_pending(Machine* m, Cta* cta, u32 address) {
  u64* word = mbarrier_word(m, cta, address, "cp.async.mbarrier.arrive");
  u64 v = *word;
  if (mbarrier_pending(v) == TX_LIMIT)
    fail_at(m, KIND_BARRIER, -1, address, "pending count of the mbarrier at smem+%d overflows", from_base(address));
  *word = pack(mbarrier_pending(v) + 1, mbarrier_expected(v), mbarrier_tx(v), mbarrier_phase(v));
}

// A CTA that ends with bytes still expected, or with some but not all arrivals of a phase, has a count that does not
// fit its program.
void mbarriers_at_exit(Machine* m, Cta* cta) {
  for (int i = 0; i < cta->num_mbarriers; i++) {
    u32 address = cta->mbarrier[i];
    u64 v = *(u64*)(cta->smem + (address & OFFSET_MASK));
    if (!mbarrier_valid(v)) continue;
    if (mbarrier_tx(v))
      warn(m, KIND_BARRIER, NONE, -1, address,
           "the CTA ends while the mbarrier at smem+%d holds a transaction count of %d bytes (phase %u)",
           from_base(address), mbarrier_tx(v), mbarrier_phase(v));
    else if (mbarrier_pending(v) != mbarrier_expected(v))
      warn(m, KIND_BARRIER, NONE, -1, address,
           "the CTA ends while the mbarrier at smem+%d has had %u of %u arrivals (phase %u): under-arrival, or a count "
           "that is too high",
           from_base(address), mbarrier_expected(v) - mbarrier_pending(v), mbarrier_expected(v), mbarrier_phase(v));
  }
}

HANDLER(MBARRIER_INIT) {
  FOR_LANES(mask, l) {
    u32 address = (u32)lane_address(w, I, l), expected = reg32(w, I->b)[l];
    if (address & 7)
      fail_at(m, KIND_MISALIGNED, (int)l, address, "mbarrier.init: address %#x is not a multiple of 8", address);
    if (!expected || expected > TX_LIMIT)
      fail_at(m, KIND_BARRIER, (int)l, address, "mbarrier.init: count %u is not within 1 and 2^20 - 1", expected);
    u64* word = (u64*)shared_pointer(m, w->cta, address, 8, "mbarrier.init");
    if (m->checks & CHECK_RACE) race_warp_write(m, w, address, 8);
    *word = pack(expected, expected, 0, 0);
    shared_wrote_generic(m, w, address, 8);
    Cta* cta = shared_cta(m, w->cta, address);
    int i = 0;
    while (i < cta->num_mbarriers && cta->mbarrier[i] != address) i++;
    if (i == MAX_MBARRIERS) fail(m, KIND_LIMIT, "more than %d mbarriers in one CTA", MAX_MBARRIERS);
    if (i == cta->num_mbarriers) cta->mbarrier[cta->num_mbarriers++] = address;
  }
  m->progress++;
  return FLOW_NEXT;
}
HANDLER(MBARRIER_INVAL) {
  FOR_LANES(mask, l) * mbarrier_word(m, w->cta, (u32)lane_address(w, I, l), "mbarrier.inval") = ~0ull;
  return FLOW_NEXT;
}
// b count or NONE (1), c bytes of expect_tx or NONE; d state or NONE; x bit 4: arrive_drop
HANDLER(MBARRIER_ARRIVE) {
  FOR_LANES(mask, l) {
    u32 address = (u32)lane_address(w, I, l), arrivals = I->b == NONE ? 1 : reg32(w, I->b)[l];
    s32 tx = I->c == NONE ? 0 : (s32)reg32(w, I->c)[l];
    if (I->x & 16) {
      u64* word = mbarrier_word(m, w->cta, address, "mbarrier.arrive_drop");
      u64 v = *word;
      if (arrivals > mbarrier_expected(v))
        fail_at(m, KIND_BARRIER, (int)l, address, "mbarrier.arrive_drop of more than the expected count");
      *word = pack(mbarrier_pending(v), mbarrier_expected(v) - arrivals, mbarrier_tx(v), mbarrier_phase(v));
    }
    if (m->checks & CHECK_RACE) {
      race_warp_read(m, w, address, 8);  // its initialisation must come before
      race_mbarrier_release(m, w, w->cta, address);
    }
    u64 state = mbarrier_arrive(m, w->cta, address, arrivals, tx, "mbarrier.arrive");
    if (I->d != NONE) reg64(w, I->d)[l] = state;
  }
  return FLOW_NEXT;
}
HANDLER(MBARRIER_TX) {  // x bit 4: complete_tx
  FOR_LANES(mask, l) {
    s32 tx = (s32)reg32(w, I->b)[l];
    if (I->x & 16)
      mbarrier_add_tx(m, w->cta, (u32)lane_address(w, I, l), -tx, "mbarrier.complete_tx");
    else
      mbarrier_add_tx(m, w->cta, (u32)lane_address(w, I, l), tx, "mbarrier.expect_tx");
  }
  return FLOW_NEXT;
}

// A try_wait may time out and return false at any time, so its not-ready path has to be taken now and then. The choice
// depends on the barrier and the phase only: the warps of a warpgroup take it alike, otherwise the rendezvous of wgmma
// would hide it.
static bool let_time_out(Machine* m, Warp* w, u32 address, u32 parity) {
  if (!m->launch->random_schedule || w->last_time_out == m->progress) return false;
  u32 hash = address * 2654435761u ^ parity * 40503u ^ m->launch->seed * 2246822519u;
  if (hash >> 13 & 3) return false;
  w->last_time_out = m->progress;
  return true;
}

// d predicate, b parity or state; x bit 4: b is a state, bit 5: test_wait (never blocks).
// The wait passes when the current phase bit differs from the parity asked for: parity 1 passes at once on a fresh
// barrier.
HANDLER(MBARRIER_WAIT) {
  Fragment* f = m->fragment;
  u32 ready = 0, waiting_parity = 0, waiting_address = 0;
  FOR_LANES(mask, l) {
    u32 address = (u32)lane_address(w, I, l), parity;
    if (I->x & 16) {
      parity = mbarrier_phase(reg64(w, I->b)[l]);
    } else {
      parity = reg32(w, I->b)[l];
      if (parity > 1) fail_at(m, KIND_BARRIER, (int)l, address, "mbarrier wait for parity %u", parity);
    }
    if ((address >> RANK_SHIFT) != w->cta->rank)
      fail_at(m, KIND_BARRIER, (int)l, address,
              "mbarrier wait on another CTA's barrier: only the CTA's own may be waited for");
    if ((m->checks & CHECK_RACE) && !f->blocked) race_warp_read(m, w, address, 8);
    if (mbarrier_phase(*mbarrier_word(m, w->cta, address, "mbarrier wait")) != parity)
      ready |= 1u << l;
    else
      waiting_parity = parity, waiting_address = address;
  }
  if (!f->blocked) count(w, COUNT_MBARRIER_WAITS, 1);
  if (!ready) {
    if (!f->blocked) count(w, COUNT_MBARRIER_NOT_READY, 1);
    bool may_block = !(I->x & 32), time_out = f->timed_out || let_time_out(m, w, waiting_address, waiting_parity);
    f->timed_out = false;
    if (may_block && !time_out) {
      f->blocked = true;
      block(m, WAIT_MBARRIER, waiting_parity, waiting_address);
      return FLOW_LEAVE;
    }
  }
  f->blocked = false;
  f->timed_out = false;
  set_pred(w, I->d, mask, ready);
  if (ready && (m->checks & CHECK_RACE))
    race_mbarrier_acquire(m, w, w->cta, (u32)lane_address(w, I, (u32)first_lane(ready)));
  if (!ready && (I->x & 32)) {  // a polling loop must let others run
    w->yielded = true;
    f->pc++;
    return FLOW_LEAVE;
  }
  return FLOW_NEXT;
}
HANDLER(MBARRIER_PENDING) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const u64* A = reg64(w, I->a);
  LANES({ D[l] = mbarrier_pending(A[l]); })
  return FLOW_NEXT;
}
