// SPDX-License-Identifier: Apache-2.0
// Named barriers of a CTA and the barrier of a cluster (PTX ISA 9.7.13.1, 9.7.13.3).
#include "barrier.h"
#include "lanes.h"
#include "race.h"

static u32 live_warps(const Cta* cta) {
  u32 live = 0;
  for (int i = 0; i < cta->num_warps; i++) live += !cta->warps[i].done;
  return live;
}

// bar.red: gives a warp the result. x: 0 popc, 1 and, 2 or; bit 4 negates the predicate.
static void deliver(const NamedBarrier* b, Warp* w, const Ins* I, u32 mask) {
  if (I->op != OP_BAR_RED) return;
  u32 mode = I->x & 15;
  if (mode == 0)
    FOR_LANES(mask, l) reg32(w, I->d)[l] = b->true_threads;
  else
    set_pred(w, I->d, mask, (mode == 1 ? b->true_threads == b->expected : b->true_threads > 0) ? FULL : 0);
}

// Lets every fragment of the CTA that waits at barrier `id` go on behind it.
static void release(Machine* m, Cta* cta, u32 id) {
  NamedBarrier* b = &cta->barrier[id];
  b->arrived = 0;
  if (m->checks & CHECK_RACE) race_barrier_complete(m, cta, id);
  for (int i = 0; i < cta->num_warps; i++) {
    Warp* w = &cta->warps[i];
    for (int k = 0; k < w->num_fragments; k++) {
      Fragment* f = &w->fragment[k];
      if (f->wait != WAIT_BARRIER || f->address != id) continue;
      deliver(b, w, &m->code[f->pc], f->mask);
      f->wait = WAIT_NONE;
      f->pc++;
      if (m->checks & CHECK_RACE) race_barrier_acquire(m, w, id);
    }
  }
  m->progress++;
}

// Arrival of a warp (32 threads) at barrier a; b thread count or NONE (all threads of the CTA).
static Flow arrive(Machine* m, Warp* w, const Ins* I, u32 mask, bool wait, u32 true_threads) {
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  Cta* cta = w->cta;
  u32 id = uniform32(m, reg32(w, I->a), mask, "the id of a barrier"), expected = live_warps(cta) * 32;
  if (id > 15) fail(m, KIND_BARRIER, "barrier id %u: there are 16", id);
  if (I->b != NONE) expected = uniform32(m, reg32(w, I->b), mask, "the thread count of a barrier");
  if (!expected || expected & 31)
    fail(m, KIND_BARRIER, "barrier %u: thread count %u is not a positive multiple of 32", id, expected);
  NamedBarrier* b = &cta->barrier[id];
  if (b->arrived && b->expected != expected)
    fail(m, KIND_BARRIER, "barrier %u is used with %u threads while another use of the same phase expects %u", id,
         expected, b->expected);
  if (!b->arrived) b->true_threads = 0;
  b->true_threads += true_threads;
  b->expected = expected;
  b->arrived += 32;
  count(w, COUNT_BARRIER_SYNCS, 1);
  if (m->checks & CHECK_RACE) race_barrier_arrive(m, w, id);
  m->progress++;
  if (b->arrived >= b->expected) {
    release(m, cta, id);
    deliver(b, w, I, mask);
    if (wait && (m->checks & CHECK_RACE)) race_barrier_acquire(m, w, id);
    return FLOW_NEXT;
  }
  if (!wait) return FLOW_NEXT;
  count(w, COUNT_BARRIER_BLOCKED, 1);
  block(m, WAIT_BARRIER, 0, id);
  return FLOW_LEAVE;
}

HANDLER(BAR) { return arrive(m, w, I, mask, I->x == 0, 0); }  // x: 0 sync, 1 arrive
HANDLER(BAR_RED) {
  u32 p = *pred(w, I->c);
  return arrive(m, w, I, mask, true, (u32)__builtin_popcount((I->x & 16 ? ~p : p) & mask));
}

static void check_cluster(Machine* m) {
  u32 live = 0;
  for (int i = 0; i < m->num_ctas; i++) live += live_warps(&m->ctas[i]);
  if (!m->cluster_arrived || m->cluster_arrived < live) return;
  m->cluster_arrived = 0;
  m->cluster_generation++;
  if (m->checks & CHECK_RACE) race_cluster_complete(m);
  for (int i = 0; i < m->num_ctas; i++)
    for (int j = 0; j < m->ctas[i].num_warps; j++) {
      Warp* w = &m->ctas[i].warps[j];
      for (int k = 0; k < w->num_fragments; k++) {
        if (w->fragment[k].wait != WAIT_CLUSTER) continue;
        w->fragment[k].wait = WAIT_NONE;
        w->fragment[k].pc++;
        if (m->checks & CHECK_RACE) race_cluster_acquire(m, w);
      }
    }
  m->progress++;
}

void barriers_after_exit(Machine* m) { check_cluster(m); }

HANDLER(CLUSTER_ARRIVE) {
  UNUSED(I)
  , UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  w->cluster_generation = m->cluster_generation;
  m->cluster_arrived++;
  m->progress++;
  if (m->checks & CHECK_RACE) race_cluster_arrive(m, w);
  check_cluster(m);
  return FLOW_NEXT;
}
HANDLER(CLUSTER_WAIT) {
  UNUSED(I)
  , UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  count(w, COUNT_BARRIER_SYNCS, 1);
  if (m->cluster_generation != w->cluster_generation) {
    if (m->checks & CHECK_RACE) race_cluster_acquire(m, w);
    return FLOW_NEXT;
  }
  count(w, COUNT_BARRIER_BLOCKED, 1);
  block(m, WAIT_CLUSTER, 0, 0);
  return FLOW_LEAVE;
}
