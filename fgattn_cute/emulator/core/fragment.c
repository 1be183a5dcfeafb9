// SPDX-License-Identifier: Apache-2.0
// Fragments of a warp and the interpreter loop. Lanes that diverge form fragments of their own; fragments that reach
// the same pc merge.
#include <string.h>
#include "barrier.h"
#include "machine.h"
#include "memory.h"
#include "wgmma.h"

void drop_fragment(Warp* w, Fragment* f) { *f = w->fragment[--w->num_fragments]; }

void block(Machine* m, u32 wait, u32 want, u32 address) {
  Fragment* f = m->fragment;
  f->wait = wait;
  f->want = want;
  f->address = address;
  f->since = m->instructions;
}

// .sync and .aligned instructions need the named lanes (of those alive) together; if they are not, the fragment waits
// for them.
bool converged(Machine* m, Warp* w, u32 lanes) {
  lanes &= w->alive;
  if ((m->fragment->mask & lanes) == lanes) return true;
  block(m, WAIT_CONVERGE, lanes, 0);
  return false;
}

// The taken lanes go to the target, the others on; the lower pc stays in this fragment (it runs first, so that they can
// meet again).
Flow split_fragment(Machine* m, Warp* w, u32 taken, u32 target) {
  Fragment* f = m->fragment;
  u32 next = f->pc + 1, rest = f->mask & ~taken;
  if (target == next) {
    f->pc = next;
    return FLOW_JUMP;
  }
  Fragment* other = &w->fragment[w->num_fragments++];
  memset(other, 0, sizeof *other);
  bool taken_first = target < next;
  other->pc = taken_first ? next : target;
  other->mask = taken_first ? rest : taken;
  f->pc = taken_first ? target : next;
  f->mask = taken_first ? taken : rest;
  return FLOW_LEAVE;
}

static bool may_merge(const Fragment* f) {
  return f->wait != WAIT_BARRIER && f->wait != WAIT_CLUSTER && f->wait != WAIT_WGMMA;
}

static void merge_fragments(Warp* w) {
  for (int i = 0; i < w->num_fragments; i++)
    for (int j = i + 1; j < w->num_fragments;) {
      Fragment *a = &w->fragment[i], *b = &w->fragment[j];
      if (a->pc != b->pc || !may_merge(a) || !may_merge(b)) {
        j++;
        continue;
      }
      a->mask |= b->mask;
      a->wait = WAIT_NONE;
      a->timed_out = a->blocked = false;
      drop_fragment(w, b);
    }
}

bool fragment_ready(Machine* m, Warp* w, Fragment* f) {
  switch (f->wait) {
    case WAIT_NONE: return true;
    case WAIT_CONVERGE: return (f->mask & f->want & w->alive) == (f->want & w->alive);
    case WAIT_MBARRIER:
      return f->timed_out || mbarrier_phase(*mbarrier_word(m, w->cta, f->address, "mbarrier wait")) != f->want;
    case WAIT_REGISTERS: return (f->want - w->registers) * 32 <= w->cta->register_pool;
    default: return false;  // released by whoever completes the barrier or the rendezvous
  }
}

// The fragment with the lowest pc; one that waits for lanes to join it never holds back the others.
static Fragment* next_fragment(Machine* m, Warp* w) {
  Fragment *best = NULL, *ready = NULL;
  for (int i = 0; i < w->num_fragments; i++) {
    Fragment* f = &w->fragment[i];
    bool runnable = fragment_ready(m, w, f);
    if (f->wait == WAIT_CONVERGE && !runnable) continue;
    if (!best || f->pc < best->pc) best = f;
    if (runnable && (!ready || f->pc < ready->pc)) ready = f;
  }
  if (best && fragment_ready(m, w, best)) return best;
  return m->allow_secondary ? ready : NULL;  // independent thread scheduling, used only when everybody is blocked
}

// Runs one fragment until it leaves, meets another fragment, or has used up its quantum. Returns the instructions it
// ran.
static u64 run_fragment(Machine* m, Warp* w, Fragment* f, u64 quantum) {
  const Ins* code = m->code;
  u32 meeting = NONE;
  for (int i = 0; i < w->num_fragments; i++)
    if (w->fragment[i].pc > f->pc && w->fragment[i].pc < meeting) meeting = w->fragment[i].pc;
  f->wait = WAIT_NONE;
  m->warp = w;
  m->fragment = f;
  u64 n = 0, lanes = 0;
  for (;;) {
    u32 pc = f->pc, mask = f->mask;
    if (UNLIKELY(pc >= meeting || n >= quantum) && n) break;
    const Ins* I = &code[pc];
    if (I->guard != NONE) {
      u32 p = *(const u32*)(w->rf + I->guard);
      mask &= I->flags & INS_GUARD_NOT ? ~p : p;
      if (!mask) {
        f->pc++;
        n++;
        continue;
      }
    }
    n++;
    w->counters[I->cls]++;
    lanes += (u64)__builtin_popcount(mask);
    if (UNLIKELY(I->flags & (INS_FLIGHT | INS_TOUCH)) && wgmma_register_access(m, w, I, mask)) {
      f->pc++;
      continue;
    }
    Flow flow = ((Handler*)I->handler)(m, w, I, mask);
    if (flow == FLOW_NEXT)
      f->pc++;
    else if (flow == FLOW_LEAVE)
      break;
  }
  count(w, COUNT_LANE_INSTRUCTIONS, lanes);
  m->instructions += n;
  return n;
}

// Runs a warp until it blocks, yields, ends, or has run `quantum` instructions. Returns the instructions it ran.
u64 run_warp(Machine* m, Warp* w, u64 quantum) {
  u64 n = 0;
  w->yielded = false;
  while (!w->done && !w->yielded && n < quantum) {
    merge_fragments(w);
    Fragment* f = next_fragment(m, w);
    if (!f) break;
    n += run_fragment(m, w, f, quantum - n);
    if (!w->num_fragments) finish_warp(m, w);
  }
  return n;
}
