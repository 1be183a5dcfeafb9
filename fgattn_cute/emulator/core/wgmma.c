// SPDX-License-Identifier: Apache-2.0
// Issue, completion and hazards of wgmma.mma_async (PTX ISA 9.7.15.1 to 9.7.15.7).
//
// Between its issue and the wait_group that covers it, a wgmma owns its accumulator registers and reads its A
// registers. Compilers move accumulators in that window (ptxas turns such moves into renaming), so a pure move of a
// register in flight joins the queue; any other access is a fault. ptx/flow.py marks the instructions that can meet a
// register in flight (INS_FLIGHT) and those whose access may fall between a wgmma.fence and its wgmma (INS_TOUCH): only
// these are looked at.
#include "wgmma.h"
#include <stdlib.h>
#include <string.h>
#include "lanes.h"
#include "race.h"

#define ACCUMULATORS 0xffu  // flight: low byte
#define SOURCE_UNIT 0x100u  // flight: one use as A operand
#define DEFINES 0x80000000u

static u32 slot_of(u32 offset) { return offset >> 7; }

// Without the check and with completion at issue nothing needs to know what is in flight.
static bool follows_flight(const Machine* m) {
  return (m->checks & CHECK_WGMMA) || m->launch->async_wgmma != COMPLETE_EAGER;
}

static void change_flight(const Machine* m, Warp* w, const WgmmaShape* s, int delta) {
  if (!follows_flight(m)) return;
  for (u32 i = 0; i < s->num_d; i++) w->flight[slot_of(s->d[i])] += (u16)delta;
  if (s->a_in_registers)
    for (int i = 0; i < 4; i++) w->flight[slot_of(s->a[i])] += (u16)(delta * (int)SOURCE_UNIT);
  w->num_flight += (u32)delta;
}
static const u32* accesses(const Machine* m, u32 pc, u32* number) {
  const u32* index = (const u32*)m->kernel->du_ptr;
  *number = index[pc + 1] - index[pc];
  return (const u32*)m->kernel->du + index[pc];
}
static void change_flight_move(Machine* m, Warp* w, u32 pc, int delta) {
  u32 n;
  const u32* du = accesses(m, pc, &n);
  for (u32 i = 0; i < n; i++)
    if (du[i] & DEFINES) w->flight[du[i] & ~DEFINES] += (u16)delta;
  w->num_flight += (u32)delta;
}

static WgmmaOp* append(Warp* w) {
  if (w->num_wgmma == w->cap_wgmma) {
    w->cap_wgmma = w->cap_wgmma ? 2 * w->cap_wgmma : 32;
    w->wgmma = realloc(w->wgmma, (size_t)w->cap_wgmma * sizeof(WgmmaOp));
  }
  WgmmaOp* o = &w->wgmma[w->num_wgmma++];
  memset(o, 0, sizeof *o);
  return o;
}
static bool all_done(const Warp* w) {
  for (int i = 0; i < w->num_wgmma; i++)
    if (!w->wgmma[i].done) return false;
  return true;
}
static void execute_move(Machine* m, Warp* w, u32 pc) {
  const Ins* I = &m->code[pc];
  ((Handler*)I->handler)(m, w, I, FULL);
}

// Does the queued operation define the slot?
static bool defines(const Machine* m, const WgmmaOp* o, u32 slot) {
  if (o->move) {
    u32 n;
    const u32* du = accesses(m, o->pc, &n);
    for (u32 i = 0; i < n; i++)
      if (du[i] == (slot | DEFINES)) return true;
    return false;
  }
  const WgmmaShape* s = wgmma_shape(m, m->code[o->pc].aux);
  for (u32 i = 0; i < s->num_d; i++)
    if (slot_of(s->d[i]) == slot) return true;
  return false;
}

// Queues a move behind the wgmma (or move) that produces its source. False if no source is in flight.
static bool defer_move(Machine* m, Warp* w, u32 pc) {
  u32 n, group = 0;
  const u32* du = accesses(m, pc, &n);
  bool in_flight = false;
  for (u32 i = 0; i < n; i++) {
    if ((du[i] & DEFINES) || !(w->flight[du[i]] & ACCUMULATORS)) continue;
    in_flight = true;
    for (int j = w->num_wgmma - 1; j >= 0; j--) {
      if (!defines(m, &w->wgmma[j], du[i])) continue;
      if (w->wgmma[j].group > group) group = w->wgmma[j].group;
      break;
    }
  }
  if (!in_flight) return false;
  bool done = all_done(w);
  WgmmaOp* o = append(w);
  o->pc = pc, o->group = group, o->move = true, o->done = done;
  if (done) execute_move(m, w, pc);
  change_flight_move(m, w, pc, 1);
  return true;
}

static void check_hazard(Machine* m, Warp* w, u32 pc) {
  u32 n;
  const u32* du = accesses(m, pc, &n);
  for (u32 i = 0; i < n; i++) {
    u16 flight = w->flight[du[i] & ~DEFINES];
    if (flight & ACCUMULATORS)
      fail(m, KIND_WGMMA, "the instruction %s an accumulator register of a wgmma that has not been waited for",
           du[i] & DEFINES ? "writes" : "reads");
    if (flight >= SOURCE_UNIT && (du[i] & DEFINES))
      fail(m, KIND_WGMMA, "the instruction overwrites an A-operand register of a wgmma that has not been waited for");
  }
}

bool wgmma_register_access(Machine* m, Warp* w, const Ins* I, u32 mask) {
  u32 pc = m->fragment->pc;
  if ((I->flags & INS_FLIGHT) && w->num_flight) {
    if ((I->flags & INS_MOVE) && mask == FULL && defer_move(m, w, pc)) return true;
    if (m->checks & CHECK_WGMMA) check_hazard(m, w, pc);
  }
  if (I->flags & INS_TOUCH) {
    u32 n;
    const u32* du = accesses(m, pc, &n);
    w->sequence++;
    for (u32 i = 0; i < n; i++) w->touched[du[i] & ~DEFINES] = w->sequence;
  }
  return false;
}

static void execute(Machine* m, Warp* w, const WgmmaOp* o) {
  const WgmmaShape* s = wgmma_shape(m, m->code[o->pc].aux);
  f32 a[32][2][32] __attribute__((aligned(64)));
  if (s->a_in_registers)
    wgmma_registers_a(w, s, a);
  else {
    const f32* rows = operand_decode(m, w->cta, o->desc_a, ROLE_A, 64, s->type_a, s->major_a);
    wgmma_spread_a(rows + (w->id & 3) * 16, 64, wgmma_k(s), s->negate, a);
  }
  const f32* b = operand_decode(m, w->cta, o->desc_b, ROLE_B, s->n, s->type_b, s->major_b);
  wgmma_multiply(m, w, s, (const f32(*)[2][32])a, b, o->accumulate);
}

// Completes and forgets what belongs to groups older than the `keep` newest committed ones.
static void complete(Machine* m, Warp* w, u32 keep) {
  int kept = 0;
  for (int i = 0; i < w->num_wgmma; i++) {
    WgmmaOp* o = &w->wgmma[i];
    if ((s64)o->group >= (s64)w->wgmma_group - (s64)keep) {
      if (kept != i) w->wgmma[kept] = *o;
      kept++;
      continue;
    }
    if (o->move) {
      if (!o->done) execute_move(m, w, o->pc);
      change_flight_move(m, w, o->pc, -1);
      continue;
    }
    if (!o->done) execute(m, w, o);
    if (m->checks & CHECK_RACE) race_join_ticket(m, w, AGENT_WGMMA, w->id >> 2, o->ticket);
    change_flight(m, w, wgmma_shape(m, m->code[o->pc].aux), -1);
  }
  w->num_wgmma = kept;
}

void wgmma_at_exit(Machine* m, Warp* w) {
  if (w->num_wgmma && (m->checks & (CHECK_WGMMA | CHECK_EXIT)))
    warn(m, KIND_WGMMA, w->wgmma[0].pc, -1, 0,
         "the warp exits with a wgmma that was not waited for (no wait_group, or not committed)");
  for (int i = 0; i < w->num_wgmma; i++)
    if (!w->wgmma[i].move)
      change_flight(m, w, wgmma_shape(m, m->code[w->wgmma[i].pc].aux), -1);
    else
      change_flight_move(m, w, w->wgmma[i].pc, -1);
  w->num_wgmma = 0;
}

static u64 uniform_descriptor(Machine* m, const Warp* w, u32 offset, const char* what) {
  const u64* values = reg64(w, offset);
  u64 differ = 0;
  for (int l = 1; l < 32; l++) differ |= values[l] ^ values[0];
  if (differ) fail(m, KIND_WGMMA, "the %s descriptor of a wgmma differs between the lanes of warp %u", what, w->id);
  return values[0];
}

// wgmma.fence orders register accesses of the warp before its wgmmas: none may come between (PTX ISA 9.7.15.7.1).
static void check_fence(Machine* m, Warp* w, const WgmmaShape* s) {
  u32 pc = m->fragment->pc;
  if (!w->fenced) warn(m, KIND_WGMMA, pc, -1, 0, "the first wgmma of the warp has no wgmma.fence before it");
  for (u32 i = 0; i < s->num_d; i++)
    if (w->touched[slot_of(s->d[i])] > w->fence_sequence) {
      warn(m, KIND_WGMMA, pc, -1, 0, "an accumulator register of this wgmma was accessed after the last wgmma.fence");
      break;
    }
  for (int i = 0; i < 4 && s->a_in_registers; i++) {
    if (w->touched[slot_of(s->a[i])] > w->fence_sequence) {
      warn(m, KIND_WGMMA, pc, -1, 0, "an A register of this wgmma was accessed after the last wgmma.fence");
      break;
    }
  }
}

static void issue(Machine* m, Warp* w, const Ins* I, u32 pc, u32 ticket) {
  const WgmmaShape* s = wgmma_shape(m, I->aux);
  if (m->checks & CHECK_WGMMA) check_fence(m, w, s);
  for (int i = 0; i < 4 && s->a_in_registers; i++)
    if (w->flight[slot_of(s->a[i])] & ACCUMULATORS)
      fail(m, KIND_WGMMA, "an A register of this wgmma is the accumulator of one that has not been waited for");
  u32 scale = *pred(w, s->scale);
  if (scale != 0 && scale != FULL)
    fail(m, KIND_WGMMA, "the scale-d predicate of a wgmma differs between lanes (%08x)", scale);
  bool pending = !all_done(w);
  WgmmaOp* o = append(w);
  o->pc = pc, o->group = w->wgmma_group, o->accumulate = scale != 0, o->ticket = ticket;
  o->desc_b = uniform_descriptor(m, w, s->desc_b, "B");
  if (!s->a_in_registers) o->desc_a = uniform_descriptor(m, w, s->desc_a, "A");
  change_flight(m, w, s, 1);
  count(w, COUNT_WGMMA_FLOPS, 2ull * 16 * s->n * wgmma_k(s));
  u32 mode = m->launch->async_wgmma;
  if (mode == COMPLETE_EAGER || (mode == COMPLETE_RANDOM && !pending && (random_next(m) & 1))) {
    execute(m, w, o);
    o->done = true;
  }
}

// The four warps of a warpgroup execute the instruction together. Each arrives; the last one issues for all.
HANDLER(WGMMA) {
  UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  if (w->alive != FULL) fail(m, KIND_WGMMA, "wgmma in a warp of which lanes have exited");
  Cta* cta = w->cta;
  u32 first = w->id & ~3u, pc = m->fragment->pc;
  if (first + 4 > (u32)cta->num_warps)
    fail(m, KIND_WGMMA, "wgmma in an incomplete warpgroup (%d warps in the CTA)", cta->num_warps);
  const WgmmaShape* s = wgmma_shape(m, I->aux);
  WarpgroupMeeting* meeting = &cta->meeting[w->id >> 2];
  u64 desc_a = s->a_in_registers ? 0 : reg64(w, s->desc_a)[0], desc_b = reg64(w, s->desc_b)[0];
  if (meeting->arrived && meeting->pc != pc)
    fail(m, KIND_WGMMA, "the warps of a warpgroup execute different wgmma instructions (@pc%u@ is another)",
         meeting->pc);
  if (meeting->arrived && (meeting->desc_a != desc_a || meeting->desc_b != desc_b))
    fail(m, KIND_WGMMA, "the descriptors of a wgmma differ between the warps of its warpgroup");
  meeting->pc = pc, meeting->desc_a = desc_a, meeting->desc_b = desc_b;
  meeting->arrived |= 1u << (w->id & 3);
  if (meeting->arrived != 15) {
    block(m, WAIT_WGMMA, 0, 0);
    return FLOW_LEAVE;
  }
  meeting->arrived = 0;
  u32 ticket = 0;
  if (m->checks & CHECK_RACE) {
    // NVIDIA's kernels rely on the issue of a wgmma gathering the four warps; CHECK_WGMMA_ORDER does not grant that.
    if (!(m->checks & CHECK_WGMMA_ORDER)) race_meet(m, cta, first, 4);
    ticket = race_ticket(m, cta, AGENT_WGMMA, w->id >> 2);
  }
  if (m->checks & (CHECK_PROXY | CHECK_RACE | CHECK_UNINIT_SHARED)) {
    operand_check(m, w, desc_b, ROLE_B, s->n, s->type_b, s->major_b, ticket);
    if (!s->a_in_registers) operand_check(m, w, desc_a, ROLE_A, 64, s->type_a, s->major_a, ticket);
  }
  for (u32 i = 0; i < 4; i++) {
    Warp* member = &cta->warps[first + i];
    m->warp = member;
    issue(m, member, I, pc, ticket);
    for (int k = 0; k < member->num_fragments; k++) {
      Fragment* f = &member->fragment[k];
      if (f->wait != WAIT_WGMMA) continue;
      f->wait = WAIT_NONE;
      f->pc = pc + 1;
    }
  }
  m->warp = w;
  m->progress++;
  return FLOW_NEXT;
}
HANDLER(WGMMA_FENCE) {
  UNUSED(I)
  , UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  w->fence_sequence = w->sequence;
  w->fenced = true;
  return FLOW_NEXT;
}
HANDLER(WGMMA_COMMIT) {
  UNUSED(I)
  , UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  w->wgmma_group++;
  return FLOW_NEXT;
}
HANDLER(WGMMA_WAIT) {  // imm: groups that may stay under way
  UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  complete(m, w, (u32)I->imm);
  return FLOW_NEXT;
}
