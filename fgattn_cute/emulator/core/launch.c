// SPDX-License-Identifier: Apache-2.0
// A launch: host threads take clusters in order, each thread is a machine of its own. Everything random depends on the
// seed and on the cluster's index only, and results are merged by cluster, so a launch is the same with any number of
// threads.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "async.h"
#include "barrier.h"
#include "machine.h"
#include "memory.h"
#include "numeric.h"
#include "race.h"
#include "wgmma.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_THREADS 64u
#define WARPS_PER_CTA 32u
#define POISON_SMEM 0xff  // a NaN in every float format
#define THREAD_STACK (16u << 20)

typedef struct {
  const Kernel* kernel;
  const Launch* launch;
  u64 *next, *stop_at;  // next cluster to run; clusters from stop_at on need not run, because an earlier one failed
  u64 total;
  const u32* order;
  Machine* machine;
  u64* counters;  // [warp][CLASS_COUNT + COUNT_COUNTERS]
} Job;

static void set_special(const Kernel* k, u8* rf, u32 id, u32 value) {
  u32 offset = ((const u32*)k->special)[id];
  if (offset == NONE) return;
  for (int l = 0; l < 32; l++) ((u32*)(rf + offset))[l] = value;
}
static void set_special_lane(const Kernel* k, u8* rf, u32 id, u32 lane, u32 value) {
  u32 offset = ((const u32*)k->special)[id];
  if (offset != NONE) ((u32*)(rf + offset))[lane] = value;
}

static void start_registers(Machine* m, Cta* cta, Warp* w) {
  const Kernel* k = m->kernel;
  const Launch* L = m->launch;
  u8* rf = w->rf;
  memcpy(rf, (const void*)k->image, k->image_bytes);
  for (u32 l = 0; l < 32; l++) {
    u32 tid = w->id * 32 + l;
    set_special_lane(k, rf, SPECIAL_TID_X, l, tid % L->block[0]);
    set_special_lane(k, rf, SPECIAL_TID_Y, l, tid / L->block[0] % L->block[1]);
    set_special_lane(k, rf, SPECIAL_TID_Z, l, tid / L->block[0] / L->block[1]);
    set_special_lane(k, rf, SPECIAL_LANEID, l, l);
    set_special_lane(k, rf, SPECIAL_LANEMASK_EQ, l, 1u << l);
    set_special_lane(k, rf, SPECIAL_LANEMASK_LT, l, (1u << l) - 1);
    set_special_lane(k, rf, SPECIAL_LANEMASK_LE, l, (2u << l) - 1);
    set_special_lane(k, rf, SPECIAL_LANEMASK_GT, l, ~((2u << l) - 1));
    set_special_lane(k, rf, SPECIAL_LANEMASK_GE, l, ~((1u << l) - 1));
  }
  for (u32 i = 0; i < 3; i++) {
    set_special(k, rf, SPECIAL_NTID_X + i, L->block[i]);
    set_special(k, rf, SPECIAL_CTAID_X + i, cta->id[i]);
    set_special(k, rf, SPECIAL_NCTAID_X + i, L->grid[i]);
    set_special(k, rf, SPECIAL_CLUSTERID_X + i, cta->id[i] / L->cluster[i]);
    set_special(k, rf, SPECIAL_NCLUSTERID_X + i, L->grid[i] / L->cluster[i]);
    set_special(k, rf, SPECIAL_CLUSTER_CTAID_X + i, cta->id[i] % L->cluster[i]);
    set_special(k, rf, SPECIAL_CLUSTER_NCTAID_X + i, L->cluster[i]);
  }
  set_special(k, rf, SPECIAL_CLUSTER_CTARANK, cta->rank);
  set_special(k, rf, SPECIAL_CLUSTER_NCTARANK, (u32)m->num_ctas);
  set_special(k, rf, SPECIAL_WARPID, w->id);
  set_special(k, rf, SPECIAL_NWARPID, 64);
  set_special(k, rf, SPECIAL_SMID, (cta->id[0] + cta->id[1] * L->grid[0]) % L->num_sms);
  set_special(k, rf, SPECIAL_NSMID, L->num_sms);
  set_special(k, rf, SPECIAL_DYNAMIC_SMEM_SIZE, L->dynamic_smem);
  set_special(k, rf, SPECIAL_TOTAL_SMEM_SIZE, cta->smem_size);
  set_special(k, rf, SPECIAL_GRIDID, 1);
  const SharedSymbol* symbols = (const SharedSymbol*)k->symbols;
  for (u32 i = 0; i < k->num_symbols; i++) {
    u32 value = (cta->rank << RANK_SHIFT) + SMEM_BASE + symbols[i].value;
    for (int l = 0; l < 32; l++) {
      if (symbols[i].wide)
        ((u64*)(rf + symbols[i].offset))[l] = value;
      else
        ((u32*)(rf + symbols[i].offset))[l] = value;
    }
  }
}

static void start_warp(Machine* m, Cta* cta, Warp* w, u32 id) {
  const Kernel* k = m->kernel;
  u32 threads = m->launch->block[0] * m->launch->block[1] * m->launch->block[2], slots = (k->image_bytes >> 7) + 2;
  if (!w->rf) {
    w->rf = aligned_alloc(128, (k->image_bytes + 255) & ~127u);
    w->flight = malloc(slots * sizeof(u16));
    w->touched = malloc(slots * sizeof(u32));
    w->initialised = malloc((k->num_tracked + 1) * sizeof(u32));
    if (k->local_bytes) w->local = malloc((size_t)k->local_bytes * 32);
  }
  memset(w->flight, 0, slots * sizeof(u16));
  memset(w->touched, 0, slots * sizeof(u32));
  memset(w->initialised, 0, (k->num_tracked + 1) * sizeof(u32));
  if (w->local) memset(w->local, POISON_SMEM, (size_t)k->local_bytes * 32);
  w->id = id, w->cta = cta;
  w->done = w->yielded = w->fenced = false;
  w->num_wgmma = w->num_cp = w->num_bulk = 0;
  w->wgmma_group = w->num_flight = w->sequence = w->fence_sequence = 0;
  w->proxy_fence = m->proxy_time;
  w->last_time_out = ~0ull;
  w->cluster_generation = 0;
  w->registers = m->launch->registers;
  memset(w->cp_group, 0, sizeof w->cp_group);
  memset(w->bulk_group, 0, sizeof w->bulk_group);
  w->alive = threads - id * 32 >= 32 ? FULL : (1u << (threads - id * 32)) - 1;
  w->num_fragments = 1;
  memset(&w->fragment[0], 0, sizeof(Fragment));
  w->fragment[0].mask = w->alive;
  start_registers(m, cta, w);
}

static void start_cta(Machine* m, Cta* cta, u32 rank, const u32 id[3]) {
  const Launch* L = m->launch;
  cta->rank = rank;
  memcpy(cta->id, id, sizeof cta->id);
  cta->smem_size = m->kernel->static_smem + L->dynamic_smem;
  memset(cta->smem, POISON_SMEM, SMEM_BASE + cta->smem_size + 64);
  memset(cta->barrier, 0, sizeof cta->barrier);
  memset(cta->meeting, 0, sizeof cta->meeting);
  cta->num_mbarriers = 0;
  cta->register_pool = 0;
  cta->num_warps = (int)((L->block[0] * L->block[1] * L->block[2] + 31) / 32);
  if ((m->checks & CHECK_PROXY) && !cta->generic_write)
    cta->generic_write = malloc((SMEM_ADDRESSES + 64) / 16 * sizeof(u64));
  if ((m->checks & CHECK_UNINIT_SHARED) && !cta->smem_written) cta->smem_written = malloc((SMEM_ADDRESSES + 64) / 8);
  shared_reset_shadow(m, cta);
  m->proxy_time++;
  for (int i = 0; i < cta->num_warps; i++) start_warp(m, cta, &cta->warps[i], (u32)i);
}

static void run_one(Job* job, u64 index) {
  Machine* m = job->machine;
  const Launch* L = job->launch;
  u64 g = job->order ? job->order[index] : index;
  u32 across = L->grid[0] / L->cluster[0], down = L->grid[1] / L->cluster[1];
  u32 corner[3] = {(u32)(g % across) * L->cluster[0], (u32)(g / across % down) * L->cluster[1],
                   (u32)(g / across / down) * L->cluster[2]};
  m->cluster_index = index;
  m->random_state = 0x9E3779B97F4A7C15ull ^ (((u64)L->seed << 32 | (u32)g) * 0x2545F4914F6CDD1Dull + g);
  if (!m->random_state) m->random_state = 1;
  for (int i = 0; i < 8; i++) random_next(m);
  m->warp = NULL, m->fragment = NULL, m->async_pc = NONE;
  m->instructions = m->progress = m->clock_ticks = 0;
  m->num_tma = 0;
  m->cluster_arrived = m->cluster_generation = 0;
  for (u32 r = 0; r < (u32)m->num_ctas; r++) {
    u32 id[3] = {corner[0] + r % L->cluster[0], corner[1] + r / L->cluster[0] % L->cluster[1],
                 corner[2] + r / L->cluster[0] / L->cluster[1]};
    start_cta(m, &m->ctas[r], r, id);
  }
  if (m->checks & CHECK_RACE) race_start_cluster(m);
  run_cluster(m);
  tma_at_exit(m);
  for (int r = 0; r < m->num_ctas; r++) {
    m->warp = &m->ctas[r].warps[0];
    mbarriers_at_exit(m, &m->ctas[r]);
  }
}

static void lower(u64* value, u64 to) {
  u64 now = __atomic_load_n(value, __ATOMIC_RELAXED);
  while (to < now && !__atomic_compare_exchange_n(value, &now, to, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static void* work(void* argument) {
  Job* job = argument;
  Machine* m = job->machine;
  const Launch* L = job->launch;
  m->kernel = job->kernel, m->launch = L;
  m->code = (const Ins*)job->kernel->code, m->aux = (const u32*)job->kernel->aux;
  m->checks = L->checks;
  m->proxy_time = 1;
  m->num_ctas = (int)(L->cluster[0] * L->cluster[1] * L->cluster[2]);
  m->ctas = calloc((size_t)m->num_ctas, sizeof(Cta));
  for (int i = 0; i < m->num_ctas; i++) {
    m->ctas[i].smem = aligned_alloc(1024, (SMEM_ADDRESSES + 2047) & ~1023u);
    m->ctas[i].warps = calloc(WARPS_PER_CTA, sizeof(Warp));
  }
  if (!setjmp(m->escape)) {
    for (;;) {
      u64 index = __atomic_fetch_add(job->next, 1, __ATOMIC_RELAXED);
      if (index >= job->total || index >= __atomic_load_n(job->stop_at, __ATOMIC_RELAXED)) break;
      run_one(job, index);
    }
  } else {
    lower(job->stop_at, m->cluster_index);
  }
  for (int i = 0; i < m->num_ctas; i++)
    for (u32 j = 0; j < WARPS_PER_CTA; j++)
      for (u32 c = 0; c < CLASS_COUNT + COUNT_COUNTERS; c++)
        __atomic_fetch_add(&job->counters[j * (CLASS_COUNT + COUNT_COUNTERS) + c], m->ctas[i].warps[j].counters[c],
                           __ATOMIC_RELAXED);
  return NULL;
}

static void free_machine(Machine* m) {
  race_free(m);
  operand_cache_free(m);
  for (int i = 0; i < m->num_ctas; i++) {
    for (u32 j = 0; j < WARPS_PER_CTA; j++) {
      Warp* w = &m->ctas[i].warps[j];
      for (int k = 0; k < w->num_cp; k++) free(w->cp[k].clock);
      free(w->rf), free(w->flight), free(w->touched), free(w->initialised), free(w->local);
      free(w->wgmma), free(w->cp), free(w->bulk), free(w->clock);
    }
    free(m->ctas[i].warps), free(m->ctas[i].smem), free(m->ctas[i].generic_write), free(m->ctas[i].smem_written);
  }
  free(m->ctas), free(m->tma), free(m->findings.list), free(m->report), free(m);
}

// Findings of all threads: those of clusters that a failure makes void are dropped, equal ones are merged into the
// earliest.
static void merge_findings(Result* result, Machine** machines, u32 threads, u64 stop_at) {
  for (u32 t = 0; t < threads; t++)
    for (u32 i = 0; i < machines[t]->findings.count; i++) {
      const FindingRecord* r = &machines[t]->findings.list[i];
      if (r->cluster > stop_at) continue;
      if (r->fatal && r->cluster == stop_at) {
        result->failed = 1;
        memcpy(result->report, machines[t]->report, sizeof result->report);
      }
      u32 k = 0;
      while (k < result->num_findings &&
             (result->findings[k].kind != r->kind || result->findings[k].pc != r->pc ||
              result->findings[k].fatal != r->fatal || (r->pc == NONE && result->findings[k].address != r->address)))
        k++;
      if (k < result->num_findings) {
        u64 total = result->findings[k].count + r->count;
        if (r->cluster < result->findings[k].cluster) result->findings[k] = *r;
        result->findings[k].count = total;
      } else if (k < sizeof result->findings / sizeof result->findings[0]) {
        result->findings[result->num_findings++] = *r;
      }
    }
}

static u32* shuffled_order(const Launch* L, u64 total) {
  if (!L->cta_order) return NULL;
  u32* order = malloc(total * sizeof(u32));
  for (u64 i = 0; i < total; i++) order[i] = (u32)(L->cta_order == 1 ? total - 1 - i : i);
  u64 state = L->seed * 7919ull + 12345;
  for (u64 i = total - 1; i > 0 && L->cta_order == 2; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    u64 j = (state >> 33) % (i + 1);
    u32 other = order[i];
    order[i] = order[j];
    order[j] = other;
  }
  return order;
}

// The checks of the arguments are Python's (machine.py). result->findings and the counters are filled in; returns 0.
EXPORT int fge_run(const Kernel* kernel, const Launch* launch, Result* result) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, numeric_init);
  Ins* code = (Ins*)kernel->code;
  for (u32 i = 0; i < kernel->num_code; i++) code[i].handler = (u64)handlers[code[i].op];
  u64 total = (u64)(launch->grid[0] / launch->cluster[0]) * (launch->grid[1] / launch->cluster[1]) *
              (launch->grid[2] / launch->cluster[2]);
  u64 next = 0, stop_at = ~0ull;
  u32* order = shuffled_order(launch, total);
  u32 threads = launch->threads < 1 ? 1 : launch->threads > MAX_THREADS ? MAX_THREADS : launch->threads;
  if (threads > total) threads = (u32)total;
  Job jobs[MAX_THREADS];
  Machine* machines[MAX_THREADS];
  pthread_t handles[MAX_THREADS];
  for (u32 i = 0; i < threads; i++) {
    machines[i] = calloc(1, sizeof(Machine));
    Job job = {kernel, launch, &next, &stop_at, total, order, machines[i], (u64*)launch->counters};
    jobs[i] = job;
  }
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, THREAD_STACK);
  for (u32 i = 1; i < threads; i++) pthread_create(&handles[i], &attributes, work, &jobs[i]);
  if (threads) work(&jobs[0]);
  for (u32 i = 1; i < threads; i++) pthread_join(handles[i], NULL);
  pthread_attr_destroy(&attributes);
  merge_findings(result, machines, threads, stop_at);
  for (u32 i = 0; i < threads; i++) free_machine(machines[i]);
  free(order);
  return 0;
}

// Sizes of the shared structures, so that Python can verify its reading of abi.h: Ins, Kernel, MemoryRegion, Launch,
// FindingRecord, Result.
EXPORT void fge_abi_sizes(u32 sizes[6]) {
  u32 actual[6] = {sizeof(Ins),    sizeof(Kernel),        sizeof(MemoryRegion),
                   sizeof(Launch), sizeof(FindingRecord), sizeof(Result)};
  memcpy(sizes, actual, sizeof actual);
}
