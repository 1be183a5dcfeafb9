// SPDX-License-Identifier: Apache-2.0
// See race.h. Reads of a granule are kept per reader (a compact index), the last write as (actor, epoch).
#include "race.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "memory.h"

#define GRANULES (SMEM_ADDRESSES / 4 + 16)
#define MAX_RACE_MBARRIERS 128
#define NUM_BARRIERS 17  // 16 named barriers, and the cluster's

typedef struct {
  u32 address;
  u32 *pending, *done;  // clocks: arrivals of the current phase, and of the completed ones
} MbarrierClock;

struct Race {
  u32 num_mbarriers;
  MbarrierClock mbarrier[MAX_RACE_MBARRIERS];
  u32 *barrier_pending[NUM_BARRIERS], *barrier_done[NUM_BARRIERS];
  u32* write_actor;
  u64 *write, *read;  // epoch << 32 | instruction; read: [granule][reader]
};

// Actors of the cluster: CTA by CTA its warps, wgmma groups, bulk and cp.async agents, and TMA agents (one per
// mbarrier).
static u32 warps_of(const Machine* m) { return (u32)m->ctas[0].num_warps; }
static u32 groups_of(const Machine* m) { return (warps_of(m) + 3) / 4; }
static u32 readers_of(const Machine* m) { return warps_of(m) * 2 + groups_of(m); }  // warps, bulk agents, wgmma groups
static u32 actors_of(const Machine* m) { return readers_of(m) + warps_of(m) + MAX_RACE_MBARRIERS; }
static u32 clock_size(const Machine* m) { return actors_of(m) * (u32)m->num_ctas; }

static u32* new_clock(const Machine* m) { return calloc(clock_size(m), 4); }
static void join(const Machine* m, u32* into, const u32* from) {
  u32 n = clock_size(m);
  for (u32 i = 0; i < n; i++) into[i] = into[i] > from[i] ? into[i] : from[i];
}

static Race* race_of(Machine* m, Cta* cta) {
  if (cta->race) return cta->race;
  Race* r = cta->race = calloc(1, sizeof *r);
  for (int i = 0; i < NUM_BARRIERS; i++) r->barrier_pending[i] = new_clock(m), r->barrier_done[i] = new_clock(m);
  r->write_actor = calloc(GRANULES, 4);
  r->write = calloc(GRANULES, 8);
  r->read = calloc((size_t)GRANULES * readers_of(m) * (u32)m->num_ctas, 8);
  return r;
}

static MbarrierClock* mbarrier_clock(Machine* m, Cta* cta, u32 address, u32* index) {
  cta = shared_cta(m, cta, address);
  Race* r = race_of(m, cta);
  u32 i = 0;
  address &= OFFSET_MASK;
  while (i < r->num_mbarriers && r->mbarrier[i].address != address) i++;
  if (i == r->num_mbarriers) {
    if (i == MAX_RACE_MBARRIERS)
      fail(m, KIND_LIMIT, "the race detector follows at most %d mbarriers per CTA", MAX_RACE_MBARRIERS);
    r->mbarrier[r->num_mbarriers++].address = address;
    if (!r->mbarrier[i].pending) r->mbarrier[i].pending = new_clock(m), r->mbarrier[i].done = new_clock(m);
  }
  if (index) *index = i;
  return &r->mbarrier[i];
}

// Index of an actor in the clocks. The first readers_of() of a CTA may read.
static u32 actor_of(Machine* m, Cta* cta, int agent, u32 key) {
  u32 warps = warps_of(m), index;
  switch (agent) {
    case AGENT_BULK: index = warps + key; break;
    case AGENT_WGMMA: index = 2 * warps + key; break;
    case AGENT_CP: index = readers_of(m) + key; break;
    case AGENT_TMA:
      cta = shared_cta(m, cta, key);
      mbarrier_clock(m, cta, key, &index);
      index += readers_of(m) + warps;
      break;
    default: index = key;  // the warp itself
  }
  return cta->rank * actors_of(m) + index;
}
static u32 reader_index(const Machine* m, u32 actor) {
  return actor / actors_of(m) * readers_of(m) + actor % actors_of(m);
}
static u32 reader_actor(const Machine* m, u32 reader) {
  return reader / readers_of(m) * actors_of(m) + reader % readers_of(m);
}

static u32* epochs(Machine* m) {  // the newest epoch of every actor of the cluster
  return m->ctas[0].warps[0].clock + clock_size(m);
}

void race_start_cluster(Machine* m) {
  u32 n = clock_size(m);
  if (!m->ctas[0].warps[0].clock) m->ctas[0].warps[0].clock = calloc(2 * n, 4);  // its own clock, then the epochs
  u32* now = epochs(m);
  for (u32 i = 0; i < n; i++) now[i]++;
  for (int c = 0; c < m->num_ctas; c++) {
    Cta* cta = &m->ctas[c];
    Race* r = race_of(m, cta);
    for (u32 i = 0; i < r->num_mbarriers; i++) {
      memset(r->mbarrier[i].pending, 0, n * 4);
      memset(r->mbarrier[i].done, 0, n * 4);
    }
    r->num_mbarriers = 0;
    for (int i = 0; i < NUM_BARRIERS; i++) {
      memset(r->barrier_pending[i], 0, n * 4);
      memset(r->barrier_done[i], 0, n * 4);
    }
    for (int i = 0; i < cta->num_warps; i++) {
      Warp* w = &cta->warps[i];
      if (!w->clock) w->clock = new_clock(m);
      for (u32 k = 0; k < n; k++) w->clock[k] = now[k] - 1;  // everything before this cluster is ordered before it
      u32 self = actor_of(m, cta, -1, w->id);
      w->clock[self] = now[self];
    }
  }
}

void race_free(Machine* m) {
  for (int c = 0; c < m->num_ctas; c++) {
    Race* r = m->ctas[c].race;
    if (!r) continue;
    for (u32 i = 0; i < MAX_RACE_MBARRIERS; i++) free(r->mbarrier[i].pending), free(r->mbarrier[i].done);
    for (int i = 0; i < NUM_BARRIERS; i++) free(r->barrier_pending[i]), free(r->barrier_done[i]);
    free(r->write_actor), free(r->write), free(r->read), free(r);
  }
}

static void tick(Machine* m, Warp* w) {
  u32 self = actor_of(m, w->cta, -1, w->id);
  epochs(m)[self]++;
  w->clock[self] = epochs(m)[self];
}

static void describe_actor(const Machine* m, u32 actor, char* text, size_t size) {
  u32 rank = actor / actors_of(m), index = actor % actors_of(m), warps = warps_of(m);
  int n = rank ? snprintf(text, size, "CTA rank %u, ", rank) : 0;
  text += n, size -= (size_t)n;
  if (index < warps)
    snprintf(text, size, "warp %u", index);
  else if (index < 2 * warps)
    snprintf(text, size, "the bulk store of warp %u", index - warps);
  else if (index < readers_of(m))
    snprintf(text, size, "the wgmma of warpgroup %u", index - 2 * warps);
  else if (index < readers_of(m) + warps)
    snprintf(text, size, "the cp.async of warp %u", index - readers_of(m));
  else
    snprintf(text, size, "the TMA load on mbarrier smem+%u",
             m->ctas[rank].race->mbarrier[index - readers_of(m) - warps].address - SMEM_BASE);
}
static void report(Machine* m, u32 pc, u32 granule, const char* what, const char* earlier, u32 actor, u64 access) {
  char who[96];
  describe_actor(m, actor, who, sizeof who);
  warn(m, KIND_RACE, pc, -1, granule * 4, "%s smem+%u is not ordered after the %s by %s (@pc%u@)", what,
       granule * 4 - SMEM_BASE, earlier, who, (u32)access);
}
static u32 epoch_of(u64 access) { return (u32)(access >> 32); }

static void read_by(Machine* m, Warp* w, u32 actor, u32 epoch, u32 address, u32 size, u32 pc, const char* what) {
  Cta* cta = shared_cta(m, w->cta, address);
  Race* r = race_of(m, cta);
  u32 offset = address & OFFSET_MASK, stride = readers_of(m) * (u32)m->num_ctas, reader = reader_index(m, actor);
  for (u32 g = offset >> 2; g <= (offset + size - 1) >> 2; g++) {
    if (epoch_of(r->write[g]) > w->clock[r->write_actor[g]])
      report(m, pc, g, what, "write", r->write_actor[g], r->write[g]);
    r->read[(size_t)g * stride + reader] = (u64)epoch << 32 | pc;
  }
}
static void write_by(Machine* m, Warp* w, u32 actor, u32 epoch, u32 address, u32 size, u32 pc, const char* what) {
  Cta* cta = shared_cta(m, w->cta, address);
  Race* r = race_of(m, cta);
  u32 offset = address & OFFSET_MASK, stride = readers_of(m) * (u32)m->num_ctas;
  for (u32 g = offset >> 2; g <= (offset + size - 1) >> 2; g++) {
    if (epoch_of(r->write[g]) > w->clock[r->write_actor[g]])
      report(m, pc, g, what, "write", r->write_actor[g], r->write[g]);
    u64* reads = r->read + (size_t)g * stride;
    for (u32 i = 0; i < stride; i++) {
      if (!reads[i]) continue;
      u32 by = reader_actor(m, i);
      if (epoch_of(reads[i]) > w->clock[by]) report(m, pc, g, what, "read", by, reads[i]);
      reads[i] = 0;
    }
    r->write_actor[g] = actor;
    r->write[g] = (u64)epoch << 32 | pc;
  }
}

void race_warp_read(Machine* m, Warp* w, u32 address, u32 size) {
  u32 self = actor_of(m, w->cta, -1, w->id);
  read_by(m, w, self, w->clock[self], address, size, m->fragment->pc, "read of");
}
void race_warp_write(Machine* m, Warp* w, u32 address, u32 size) {
  u32 self = actor_of(m, w->cta, -1, w->id);
  write_by(m, w, self, w->clock[self], address, size, m->fragment->pc, "write to");
}
u32 race_ticket(Machine* m, Cta* cta, Agent agent, u32 key) { return ++epochs(m)[actor_of(m, cta, (int)agent, key)]; }
void race_async_read(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket, u32 address, u32 size, u32 pc) {
  read_by(m, w, actor_of(m, w->cta, (int)agent, key), ticket, address, size, pc,
          agent == AGENT_WGMMA ? "wgmma read of" : "bulk store read of");
}
void race_async_write(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket, u32 address, u32 size, u32 pc) {
  write_by(m, w, actor_of(m, w->cta, (int)agent, key), ticket, address, size, pc,
           agent == AGENT_CP ? "cp.async write to" : "TMA write to");
}
void race_join_ticket(Machine* m, Warp* w, Agent agent, u32 key, u32 ticket) {
  u32* mine = &w->clock[actor_of(m, w->cta, (int)agent, key)];
  if (*mine < ticket) *mine = ticket;
}
u32* race_snapshot(Machine* m, Warp* w, int agent, u32 key) {
  u32* clock = new_clock(m);
  memcpy(clock, w->clock, clock_size(m) * 4);
  if (agent >= 0) {
    u32 actor = actor_of(m, w->cta, agent, key);
    clock[actor] = epochs(m)[actor];
  }
  tick(m, w);
  return clock;
}

void race_mbarrier_release(Machine* m, Warp* w, Cta* cta, u32 address) {
  join(m, mbarrier_clock(m, cta, address, NULL)->pending, w->clock);
  tick(m, w);
}
void race_mbarrier_release_clock(Machine* m, Cta* cta, u32 address, const u32* clock, int agent, u32 key, u32 ticket) {
  u32* pending = mbarrier_clock(m, cta, address, NULL)->pending;
  if (clock) join(m, pending, clock);
  if (agent < 0) return;
  u32 actor = actor_of(m, cta, agent, key);
  if (pending[actor] < ticket) pending[actor] = ticket;
}
void race_mbarrier_phase(Machine* m, Cta* cta, u32 address) {
  MbarrierClock* b = mbarrier_clock(m, cta, address, NULL);
  join(m, b->done, b->pending);
  memset(b->pending, 0, clock_size(m) * 4);
}
void race_mbarrier_acquire(Machine* m, Warp* w, Cta* cta, u32 address) {
  join(m, w->clock, mbarrier_clock(m, cta, address, NULL)->done);
}

void race_barrier_arrive(Machine* m, Warp* w, u32 id) {
  join(m, race_of(m, w->cta)->barrier_pending[id], w->clock);
  tick(m, w);
}
void race_barrier_complete(Machine* m, Cta* cta, u32 id) {
  Race* r = race_of(m, cta);
  memcpy(r->barrier_done[id], r->barrier_pending[id], clock_size(m) * 4);
  memset(r->barrier_pending[id], 0, clock_size(m) * 4);
}
void race_barrier_acquire(Machine* m, Warp* w, u32 id) { join(m, w->clock, race_of(m, w->cta)->barrier_done[id]); }

// The cluster's barrier keeps its clock with CTA 0.
void race_cluster_arrive(Machine* m, Warp* w) {
  join(m, race_of(m, &m->ctas[0])->barrier_pending[NUM_BARRIERS - 1], w->clock);
  tick(m, w);
}
void race_cluster_complete(Machine* m) { race_barrier_complete(m, &m->ctas[0], NUM_BARRIERS - 1); }
void race_cluster_acquire(Machine* m, Warp* w) {
  join(m, w->clock, race_of(m, &m->ctas[0])->barrier_done[NUM_BARRIERS - 1]);
}

void race_meet(Machine* m, Cta* cta, u32 first_warp, u32 num_warps) {
  u32* all = new_clock(m);
  for (u32 i = 0; i < num_warps; i++) join(m, all, cta->warps[first_warp + i].clock);
  for (u32 i = 0; i < num_warps; i++) {
    Warp* w = &cta->warps[first_warp + i];
    memcpy(w->clock, all, clock_size(m) * 4);
    tick(m, w);
  }
  free(all);
}
