// SPDX-License-Identifier: Apache-2.0
// Asynchronous loads that complete on an mbarrier: TMA tiles and cp.async.bulk to shared memory, with multicast
// (PTX ISA 9.7.9.25.4, 9.7.9.25.5). complete_tx always counts the full box, also where it is out of bounds.
#include <stdlib.h>
#include <string.h>
#include "async.h"
#include "barrier.h"
#include "lanes.h"
#include "memory.h"
#include "race.h"
#include "tile.h"

static u32 load_bytes(Machine* m, const TmaLoad* o) {
  if (o->linear) return o->size;
  TensorMap t = read_tensor_map(m, o->tmap);
  return tile_bytes(&t);
}
static bool goes_to(const TmaLoad* o, u32 rank) {
  return o->multicast ? o->multicast >> rank & 1 : rank == o->cta->rank;
}
// Multicast: the same offsets in every destination CTA; else the addresses as given (they may name another CTA of the
// cluster).
static u32 in_cta(const TmaLoad* o, u32 address, u32 rank) {
  return o->multicast ? (address & OFFSET_MASK) | rank << RANK_SHIFT : address;
}

static void execute(Machine* m, TmaLoad* o) {
  m->async_pc = o->pc;
  u32 bytes = load_bytes(m, o);
  for (u32 r = 0; r < (u32)m->num_ctas; r++) {
    if (!goes_to(o, r)) continue;
    u32 smem = in_cta(o, o->smem, r), mbar = in_cta(o, o->mbar, r);
    if (o->linear) {
      const u8* source = o->gptr >> 56 == WINDOW_SHARED
                             ? shared_pointer(m, o->cta, (u32)o->gptr, bytes, "bulk copy source")
                             : global_read(m, o->gptr, bytes, -1, "bulk copy");
      memcpy(shared_pointer(m, o->cta, smem, bytes, "bulk copy destination"), source, bytes);
      shared_wrote_async(m, o->cta, smem, bytes);
    } else {
      TensorMap t = read_tensor_map(m, o->tmap);
      tile_load(m, o->cta, &t, o->coord, smem);
    }
    if (m->checks & CHECK_RACE)
      race_mbarrier_release_clock(m, o->cta, mbar, o->clock, AGENT_TMA, mbar, o->ticket[r & 15]);
    mbarrier_add_tx(m, o->cta, mbar, -(s32)bytes, "complete_tx of an asynchronous load");
  }
  free(o->clock);
  o->clock = NULL;
  m->progress++;
  m->async_pc = NONE;
}

static void issue(Machine* m, Warp* w, TmaLoad* o) {
  if (o->multicast >> m->num_ctas)
    fail(m, KIND_LAUNCH, "multicast mask %#x names CTAs beyond the %d of the cluster", o->multicast, m->num_ctas);
  u32 bytes = load_bytes(m, o), destinations = 0;
  for (u32 r = 0; r < (u32)m->num_ctas; r++) {
    if (!goes_to(o, r)) continue;
    destinations++;
    u32 smem = in_cta(o, o->smem, r), mbar = in_cta(o, o->mbar, r);
    mbarrier_word(m, o->cta, mbar, "mbarrier of an asynchronous load");
    shared_pointer(m, o->cta, smem, bytes, "destination of an asynchronous load");
    if (m->checks & CHECK_RACE) {
      o->ticket[r & 15] = race_ticket(m, o->cta, AGENT_TMA, mbar);
      race_async_write(m, w, AGENT_TMA, mbar, o->ticket[r & 15], smem, bytes, o->pc);
    }
  }
  if (m->checks & CHECK_RACE) o->clock = race_snapshot(m, w, -1, 0);
  count(w, COUNT_TMA_LOAD_BYTES, (u64)bytes * destinations);
  u32 mode = m->launch->async_tma;
  if (mode == COMPLETE_EAGER || (mode == COMPLETE_RANDOM && (random_next(m) & 1))) {
    execute(m, o);
    return;
  }
  if (m->num_tma == m->cap_tma) {
    m->cap_tma = m->cap_tma ? 2 * m->cap_tma : 64;
    m->tma = realloc(m->tma, (size_t)m->cap_tma * sizeof(TmaLoad));
  }
  m->tma[m->num_tma++] = *o;
}

bool tma_complete_one(Machine* m) {
  if (!m->num_tma) return false;
  u32 mode = m->launch->async_tma;
  int i = mode == COMPLETE_RANDOM   ? (int)(random_next(m) % (u64)m->num_tma)
          : mode == COMPLETE_NEWEST ? m->num_tma - 1
                                    : 0;
  TmaLoad o = m->tma[i];
  memmove(m->tma + i, m->tma + i + 1, (size_t)(m->num_tma - 1 - i) * sizeof(TmaLoad));
  m->num_tma--;
  m->warp = &o.cta->warps[0];
  execute(m, &o);
  return true;
}

void tma_at_exit(Machine* m) {
  if (!m->num_tma) return;
  m->warp = NULL;
  if (m->checks & CHECK_EXIT)
    warn(m, KIND_EXIT, m->tma[0].pc, -1, m->tma[0].smem,
         "the CTA ends with %d asynchronous loads that nobody waited for", m->num_tma);
  while (tma_complete_one(m)) {}
}

// a destination (imm), b tensor map, c mbarrier; n coordinates. aux: coordinates, multicast mask or NONE, offset of the
// tensor map, offset of the mbarrier, whether the mbarrier address has 64 bits.
HANDLER(TMA_LOAD) {
  const u32* operand = m->aux + I->aux;
  u32 n = I->n;
  FOR_LANES(mask, l) {
    TmaLoad o = {.cta = w->cta,
                 .pc = m->fragment->pc,
                 .smem = (u32)lane_address(w, I, l),
                 .tmap = reg64(w, I->b)[l] + operand[n + 1]};
    o.mbar = (u32)(operand[n + 3] ? reg64(w, I->c)[l] : reg32(w, I->c)[l]) + operand[n + 2];
    for (u32 i = 0; i < n; i++) o.coord[i] = (s32)reg32(w, operand[i])[l];
    TensorMap t = read_tensor_map(m, o.tmap);
    if (t.rank != n)
      fail_at(m, KIND_DESCRIPTOR, (int)l, o.tmap, "a %u-dimensional TMA load through a tensor map of rank %u", n,
              t.rank);
    if (o.smem & 127)
      fail_at(m, KIND_MISALIGNED, (int)l, o.smem, "TMA load: shared address %#x is not a multiple of 128", o.smem);
    if (operand[n] != NONE) {
      o.multicast = reg32(w, operand[n])[l] & 0xffff;
      if (!o.multicast) fail_at(m, KIND_LAUNCH, (int)l, 0, "TMA multicast with an empty mask");
    }
    issue(m, w, &o);
  }
  return FLOW_NEXT;
}

// a destination (imm), b source, c size. aux: mbarrier, its offset, 64 bits?, multicast mask or NONE, source in shared
// memory?, offset of the source.
HANDLER(BULK_LOAD) {
  const u32* operand = m->aux + I->aux;
  FOR_LANES(mask, l) {
    TmaLoad o = {.linear = true,
                 .cta = w->cta,
                 .pc = m->fragment->pc,
                 .smem = (u32)lane_address(w, I, l),
                 .size = reg32(w, I->c)[l]};
    s64 offset = (s32)operand[5];
    o.gptr = operand[4] ? (WINDOW_SHARED << 56) + (u32)(reg32(w, I->b)[l] + offset) : reg64(w, I->b)[l] + (u64)offset;
    o.mbar = (u32)(operand[2] ? reg64(w, operand[0])[l] : reg32(w, operand[0])[l]) + operand[1];
    if (operand[3] != NONE) o.multicast = reg32(w, operand[3])[l] & 0xffff;
    if ((o.smem | o.gptr | o.size) & 15)
      fail_at(m, KIND_MISALIGNED, (int)l, o.gptr,
              "cp.async.bulk: destination %#x, source %#lx and size %u must be multiples of 16", o.smem, (long)o.gptr,
              o.size);
    if (!operand[4]) global_bounds(m, o.gptr, o.size, (int)l, "cp.async.bulk source");
    issue(m, w, &o);
  }
  return FLOW_NEXT;
}
