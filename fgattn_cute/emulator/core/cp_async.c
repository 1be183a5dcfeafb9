// SPDX-License-Identifier: Apache-2.0
// Non-bulk asynchronous copies (PTX ISA 9.7.9.25.3): cp.async with zero fill, its groups, and its arrival on mbarriers.
// cp.async writes shared memory through the generic proxy.
#include <stdlib.h>
#include <string.h>
#include "async.h"
#include "barrier.h"
#include "lanes.h"
#include "memory.h"
#include "race.h"

static void execute(Machine* m, Warp* w, CpAsyncOp* o, u32 lanes) {
  m->async_pc = o->pc;
  FOR_LANES(lanes, l) {
    if (o->arrive) {
      if (m->checks & CHECK_RACE) race_mbarrier_release_clock(m, w->cta, o->dst[l], o->clock, -1, 0, 0);
      mbarrier_arrive(m, w->cta, o->dst[l], 1, 0, "cp.async.mbarrier.arrive");
      continue;
    }
    u8* into = shared_pointer(m, w->cta, o->dst[l], o->size, "cp.async destination");
    if (o->src_size[l]) memcpy(into, global_read(m, o->src[l], o->src_size[l], (int)l, "cp.async"), o->src_size[l]);
    if (o->src_size[l] < o->size) memset(into + o->src_size[l], 0, o->size - o->src_size[l]);
    shared_wrote_generic(m, w, o->dst[l], o->size);
  }
  m->progress++;
  m->async_pc = NONE;
}

static void forget(CpAsyncOp* o) {
  free(o->clock);
  o->clock = NULL;
}

// An arrival completes after the copies before it: it is executed only when none of them is pending, and retires them.
static void retire_before(Warp* w, int last) {
  for (int i = 0; i <= last; i++) forget(&w->cp[i]);
  memmove(w->cp, w->cp + last + 1, (size_t)(w->num_cp - last - 1) * sizeof(CpAsyncOp));
  w->num_cp -= last + 1;
}

static void issue(Machine* m, Warp* w, CpAsyncOp* o) {
  if (m->checks & CHECK_RACE) {
    if (o->arrive)
      o->clock = race_snapshot(m, w, AGENT_CP, w->id);
    else {
      o->ticket = race_ticket(m, w->cta, AGENT_CP, w->id);
      FOR_LANES(o->mask, l) race_async_write(m, w, AGENT_CP, w->id, o->ticket, o->dst[l], o->size, o->pc);
    }
  }
  bool pending = false;
  for (int i = 0; i < w->num_cp; i++) pending |= !w->cp[i].done;
  u32 mode = m->launch->async_cp;
  if (mode == COMPLETE_EAGER || (!pending && (o->arrive || (mode == COMPLETE_RANDOM && (random_next(m) & 1))))) {
    execute(m, w, o, o->mask);
    o->done = true;
    if (o->arrive) {
      forget(o);
      retire_before(w, w->num_cp - 1);
      return;
    }
  }
  memcpy(o->group, w->cp_group, sizeof o->group);
  if (w->num_cp == w->cap_cp) {
    w->cap_cp = w->cap_cp ? 2 * w->cap_cp : 32;
    w->cp = realloc(w->cp, (size_t)w->cap_cp * sizeof(CpAsyncOp));
  }
  w->cp[w->num_cp++] = *o;
}

static void wait_groups(Machine* m, Warp* w, u32 lanes, u32 keep, bool all) {
  int kept = 0;
  for (int i = 0; i < w->num_cp; i++) {
    CpAsyncOp* o = &w->cp[i];
    u32 finished = 0;
    FOR_LANES(o->mask & lanes, l) {
      if (all || (s64)o->group[l] < (s64)w->cp_group[l] - (s64)keep) finished |= 1u << l;
    }
    if (finished && !o->done) execute(m, w, o, finished);
    o->mask &= ~finished;
    if (o->mask) {
      if (kept != i) w->cp[kept] = *o;
      kept++;
      continue;
    }
    if ((m->checks & CHECK_RACE) && !o->arrive) race_join_ticket(m, w, AGENT_CP, w->id, o->ticket);
    forget(o);
  }
  w->num_cp = kept;
}

bool cp_async_complete_one(Machine* m, Warp* w) {
  for (int i = 0; i < w->num_cp; i++) {
    CpAsyncOp* o = &w->cp[i];
    if (o->done) continue;
    m->warp = w;
    execute(m, w, o, o->mask);
    o->done = true;
    if (o->arrive) retire_before(w, i);
    return true;
  }
  return false;
}
void cp_async_at_exit(Machine* m, Warp* w) {
  while (cp_async_complete_one(m, w)) {}
  retire_before(w, w->num_cp - 1);
}

// a destination (imm), b source, c bytes to read or NONE (all), e ignore-src predicate or NONE; n: size. aux: offset of
// the source.
HANDLER(CP_ASYNC) {
  CpAsyncOp o;
  o.mask = mask, o.pc = m->fragment->pc, o.size = I->n, o.arrive = o.done = false, o.ticket = 0, o.clock = NULL;
  s64 offset = (s32)m->aux[I->aux];
  u64 bytes = 0;
  FOR_LANES(mask, l) {
    o.dst[l] = (u32)lane_address(w, I, l);
    o.src[l] = reg64(w, I->b)[l] + (u64)offset;
    o.src_size[l] = I->c == NONE ? o.size : reg32(w, I->c)[l];
    if (I->e != NONE && (*pred(w, I->e) >> l & 1)) o.src_size[l] = 0;
    if (o.src_size[l] > o.size)
      fail_at(m, KIND_LAUNCH, (int)l, o.src[l], "cp.async: src-size %u exceeds cp-size %u", o.src_size[l], o.size);
    if ((o.dst[l] | o.src[l]) & (o.size - 1))
      fail_at(m, KIND_MISALIGNED, (int)l, o.src[l],
              "cp.async of %u bytes: destination %#x or source %#lx is misaligned", o.size, o.dst[l], (long)o.src[l]);
    shared_pointer(m, w->cta, o.dst[l], o.size, "cp.async destination");
    global_bounds(m, o.src[l], o.src_size[l], (int)l, "cp.async source");
    bytes += o.src_size[l];
  }
  count(w, COUNT_CP_ASYNC_BYTES, bytes);
  issue(m, w, &o);
  return FLOW_NEXT;
}
HANDLER(CP_ASYNC_COMMIT) {
  UNUSED(m)
  , UNUSED(I);
  FOR_LANES(mask, l) w->cp_group[l]++;
  return FLOW_NEXT;
}
HANDLER(CP_ASYNC_WAIT) {  // imm: groups that may stay under way; x: wait_all
  wait_groups(m, w, mask, (u32)I->imm, I->x);
  return FLOW_NEXT;
}
HANDLER(CP_ASYNC_ARRIVE) {  // x bit 4: noinc
  CpAsyncOp o;
  o.mask = mask, o.pc = m->fragment->pc, o.size = 8, o.arrive = true, o.done = false, o.ticket = 0, o.clock = NULL;
  FOR_LANES(mask, l) {
    o.dst[l] = (u32)lane_address(w, I, l);
    mbarrier_word(m, w->cta, o.dst[l], "cp.async.mbarrier.arrive");
    if (!(I->x & 16)) mbarrier_increment_pending(m, w->cta, o.dst[l]);
  }
  issue(m, w, &o);
  return FLOW_NEXT;
}
