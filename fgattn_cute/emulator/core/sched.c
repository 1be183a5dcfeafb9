// SPDX-License-Identifier: Apache-2.0
// The scheduler of a cluster. A warp runs until it blocks (or its quantum is over). When nobody can go on, one
// asynchronous operation completes; if there is none, fragments of diverged warps may overtake each other; then blocked
// try_waits time out; then it is a deadlock.
#include <alloca.h>
#include <stdio.h>
#include <string.h>
#include "async.h"
#include "barrier.h"
#include "machine.h"
#include "memory.h"
#include "wgmma.h"

#define TURN 4000000u        // instructions of a warp per turn without a quantum: guards against a warp that spins
#define TIME_OUT_ROUNDS 40u  // rounds in which every try_wait returned false and nothing happened

static const char* wait_name(u32 wait) {
  static const char* names[] = {"nothing",
                                "other lanes of its warp",
                                "mbarrier",
                                "named barrier",
                                "the other warps of its warpgroup (wgmma)",
                                "the cluster barrier",
                                "registers (setmaxnreg)"};
  return names[wait];
}

static int describe_wait(Machine* m, Cta* cta, const Warp* w, const Fragment* f, char* text, size_t size) {
  switch (f->wait) {
    case WAIT_MBARRIER: {
      u64 v = *(u64*)shared_pointer(m, cta, f->address, 8, "report");
      return snprintf(text, size, " at smem+%d for parity %u (phase %u, pending %u of %u, tx %d)",
                      (int)(f->address & OFFSET_MASK) - (int)SMEM_BASE, f->want, mbarrier_phase(v), mbarrier_pending(v),
                      mbarrier_expected(v), mbarrier_tx(v));
    }
    case WAIT_BARRIER:
      return snprintf(text, size, " %u (%u of %u threads have arrived)", f->address, cta->barrier[f->address].arrived,
                      cta->barrier[f->address].expected);
    case WAIT_CONVERGE: return snprintf(text, size, ": needs lanes %08x together", f->want & w->alive);
    case WAIT_WGMMA:
      return snprintf(text, size, ": %d of 4 warps are there", __builtin_popcount(cta->meeting[w->id >> 2].arrived));
    case WAIT_CLUSTER: return snprintf(text, size, ": %u warps have arrived", m->cluster_arrived);
    case WAIT_REGISTERS:
      return snprintf(
          text, size,
          ": wants %u per thread, has %u, which takes %u more; the CTA's pool holds %u (launched with %u per thread)",
          f->want, w->registers, (f->want - w->registers) * 32, cta->register_pool, m->launch->registers);
    default: return 0;
  }
}

// One line per blocked fragment: who waits on what, for which phase, since when. "@pc12@" stands for the source line
// (Python fills it in).
void describe_waits(Machine* m, char* text, size_t capacity) {
  size_t n = 0;
  text[0] = 0;
  for (int i = 0; i < m->num_ctas; i++) {
    Cta* cta = &m->ctas[i];
    for (int j = 0; j < cta->num_warps; j++) {
      Warp* w = &cta->warps[j];
      for (int k = 0; k < w->num_fragments && !w->done && n + 500 < capacity; k++) {
        const Fragment* f = &w->fragment[k];
        n += (size_t)snprintf(text + n, capacity - n, "  cta (%u,%u,%u) warp %2u lanes %08x waits on %s", cta->id[0],
                              cta->id[1], cta->id[2], w->id, f->mask, wait_name(f->wait));
        n += (size_t)describe_wait(m, cta, w, f, text + n, capacity - n);
        n += (size_t)snprintf(text + n, capacity - n, ", since instruction %llu of %llu, at @pc%u@\n",
                              (unsigned long long)f->since, (unsigned long long)m->instructions, f->pc);
      }
    }
  }
}

void finish_warp(Machine* m, Warp* w) {
  w->done = true;
  m->progress++;
  wgmma_at_exit(m, w);
  bulk_at_exit(m, w);
  barriers_after_exit(m);
}

static _Noreturn void deadlock(Machine* m, Warp** warps, int num_warps) {
  u32 kind = KIND_DEADLOCK;
  for (int i = 0; i < num_warps; i++)
    for (int k = 0; k < warps[i]->num_fragments && !warps[i]->done; k++)
      if (warps[i]->fragment[k].wait == WAIT_REGISTERS) kind = KIND_REGISTERS;
  m->warp = NULL;
  m->fragment = NULL;
  char text[24000];
  describe_waits(m, text, sizeof text);
  if (kind == KIND_REGISTERS)
    fail(m, kind, "setmaxnreg waits for registers that nobody will give back: a hang on the chip\n%s", text);
  fail(m, kind, "deadlock: every warp is blocked\n%s", text);
}

static bool time_out_waits(Warp** warps, int num_warps) {
  bool any = false;
  for (int i = 0; i < num_warps; i++)
    for (int k = 0; k < warps[i]->num_fragments && !warps[i]->done; k++)
      if (warps[i]->fragment[k].wait == WAIT_MBARRIER) warps[i]->fragment[k].timed_out = any = true;
  return any;
}

static void shuffle(Machine* m, Warp** warps, int num_warps) {
  for (int i = num_warps - 1; i > 0; i--) {
    int j = (int)(random_next(m) % (u64)(i + 1));
    Warp* other = warps[i];
    warps[i] = warps[j];
    warps[j] = other;
  }
}

static _Noreturn void too_many_instructions(Machine* m) {
  m->warp = NULL;
  m->fragment = NULL;
  char text[24000];
  describe_waits(m, text, sizeof text);
  fail(
      m, KIND_LIMIT,
      "%llu warp instructions in one cluster: an endless loop, or a wait for a CTA that runs later (CTAs run one after "
      "another unless host threads run them side by side)\n%s",
      (unsigned long long)m->instructions, text);
}

void run_cluster(Machine* m) {
  const Launch* launch = m->launch;
  int num_warps = 0;
  for (int i = 0; i < m->num_ctas; i++) num_warps += m->ctas[i].num_warps;
  Warp** warps = alloca(sizeof(Warp*) * (size_t)num_warps);
  num_warps = 0;
  for (int i = 0; i < m->num_ctas; i++)
    for (int j = 0; j < m->ctas[i].num_warps; j++) warps[num_warps++] = &m->ctas[i].warps[j];

  u32 time_outs = 0;
  bool timed_out = false;
  u64 last_progress = m->progress;
  m->allow_secondary = false;
  for (;;) {
    u64 ran = 0;
    int left = 0;
    if (launch->random_schedule) shuffle(m, warps, num_warps);
    for (int i = 0; i < num_warps; i++) {
      if (warps[i]->done) continue;
      u64 quantum = launch->quantum ? launch->quantum : TURN;
      if (launch->random_schedule && launch->quantum) quantum = 1 + random_next(m) % launch->quantum;
      ran += run_warp(m, warps[i], quantum);
      left += !warps[i]->done;
    }
    if (!left) break;
    if (launch->max_instructions && m->instructions > launch->max_instructions) too_many_instructions(m);
    if (launch->async_tma == COMPLETE_RANDOM && m->num_tma && (random_next(m) & 3) == 0) tma_complete_one(m);
    if (m->progress != last_progress) {
      last_progress = m->progress;
      time_outs = 0;
      timed_out = m->allow_secondary = false;
      continue;
    }
    if (ran && !timed_out) continue;
    if (tma_complete_one(m)) {
      timed_out = false;
      continue;
    }
    bool completed = false;
    for (int i = 0; i < num_warps && !completed; i++) completed = cp_async_complete_one(m, warps[i]);
    if (completed) {
      timed_out = false;
      continue;
    }
    if (!m->allow_secondary) {
      m->allow_secondary = true;
      timed_out = false;
      continue;
    }
    timed_out = true;
    if (!time_out_waits(warps, num_warps) || ++time_outs > TIME_OUT_ROUNDS) deadlock(m, warps, num_warps);
  }
  for (int i = 0; i < num_warps; i++) cp_async_at_exit(m, warps[i]);
}
