// SPDX-License-Identifier: Apache-2.0
// Asynchronous stores and reductions that complete in bulk groups: TMA tiles and cp.async.bulk to global memory
// (PTX ISA 9.7.9.25.2, 9.7.9.25.5). Groups belong to threads. The emulator does both halves of a store, the read of
// shared memory and the write of global memory, when .read would be satisfied.
#include <stdlib.h>
#include <string.h>
#include "async.h"
#include "lanes.h"
#include "memory.h"
#include "race.h"
#include "tile.h"

static void execute(Machine* m, Warp* w, BulkStore* o) {
  m->async_pc = o->pc;
  if (!o->linear) {
    TensorMap t = read_tensor_map(m, o->tmap);
    tile_store(m, w->cta, &t, o->coord, o->smem, o->reduction, o->pc);
  } else {
    const u8* source = shared_pointer(m, w->cta, o->smem, o->size, "bulk store source");
    if (m->checks & CHECK_UNINIT_SHARED) shared_check_written(m, w->cta, o->smem, o->size, o->pc, -1, "bulk store");
    u8* into = global_write(m, o->gptr, o->size, -1, "bulk store");
    u32 type = o->reduction >> 8, bytes = element_bytes(type);
    if (!o->reduction)
      memcpy(into, source, o->size);
    else {
      atomic_lock();
      for (u32 b = 0; b < o->size; b += bytes) reduce_element(m, o->reduction & 255, type, into + b, source + b);
      atomic_unlock();
    }
  }
  o->done = true;
  m->progress++;
  m->async_pc = NONE;
}

static void check_proxy(Machine* m, Warp* w, const BulkStore* o, u32 bytes) {
  Cta* cta = shared_cta(m, w->cta, o->smem);
  for (u32 b = 0; b < bytes; b += 16) {
    u32 writer = unfenced_writer(m, cta, w->proxy_fence, o->smem + b);
    if (!writer) continue;
    warn(m, KIND_PROXY, o->pc, (int)o->lane, o->smem + b,
         "the store reads smem+%u, written through the generic proxy by warp %u with no fence.proxy.async after it",
         ((o->smem + b) & OFFSET_MASK) - SMEM_BASE, writer - 1);
    return;
  }
}

static void issue(Machine* m, Warp* w, BulkStore* o) {
  u32 bytes = o->size;
  if (!o->linear) {
    TensorMap t = read_tensor_map(m, o->tmap);
    bytes = tile_bytes(&t);
  }
  shared_pointer(m, w->cta, o->smem, bytes, "source of a bulk store");
  if (m->checks & CHECK_PROXY) check_proxy(m, w, o, bytes);
  if (m->checks & CHECK_RACE) {
    o->ticket = race_ticket(m, w->cta, AGENT_BULK, w->id);
    race_async_read(m, w, AGENT_BULK, w->id, o->ticket, o->smem, bytes, o->pc);
  }
  count(w, COUNT_TMA_STORE_BYTES, bytes);
  o->group = w->bulk_group[o->lane];
  u32 mode = m->launch->async_tma;
  if (mode == COMPLETE_EAGER || (mode == COMPLETE_RANDOM && (random_next(m) & 1))) execute(m, w, o);
  if (w->num_bulk == w->cap_bulk) {
    w->cap_bulk = w->cap_bulk ? 2 * w->cap_bulk : 16;
    w->bulk = realloc(w->bulk, (size_t)w->cap_bulk * sizeof(BulkStore));
  }
  w->bulk[w->num_bulk++] = *o;
}

// Completes and forgets the stores of `lanes` whose group is not among the `keep` newest committed ones.
static void wait_groups(Machine* m, Warp* w, u32 lanes, u32 keep) {
  int kept = 0;
  for (int i = 0; i < w->num_bulk; i++) {
    BulkStore* o = &w->bulk[i];
    if (!(lanes >> o->lane & 1) || (s64)o->group >= (s64)w->bulk_group[o->lane] - (s64)keep) {
      w->bulk[kept++] = *o;
      continue;
    }
    if (!o->done) execute(m, w, o);
    if (m->checks & CHECK_RACE) race_join_ticket(m, w, AGENT_BULK, w->id, o->ticket);
  }
  w->num_bulk = kept;
}

void bulk_at_exit(Machine* m, Warp* w) {
  if (w->num_bulk && (m->checks & CHECK_EXIT))
    warn(m, KIND_EXIT, w->bulk[0].pc, (int)w->bulk[0].lane, w->bulk[0].smem,
         "the warp exits with a bulk store whose read of shared memory was not waited for");
  for (int i = 0; i < w->num_bulk; i++)
    if (!w->bulk[i].done) execute(m, w, &w->bulk[i]);
  w->num_bulk = 0;
}

// a source (imm), b tensor map; n coordinates; x bits 8 and up: reduction. aux: coordinates, offset of the tensor map.
HANDLER(TMA_STORE) {
  const u32* operand = m->aux + I->aux;
  u32 n = I->n;
  BulkStore first;
  bool any = false;
  FOR_LANES(mask, l) {
    BulkStore o;
    memset(&o, 0, sizeof o);
    o.lane = l, o.pc = m->fragment->pc, o.smem = (u32)lane_address(w, I, l), o.tmap = reg64(w, I->b)[l] + operand[n];
    o.reduction = I->x >> 8;
    for (u32 i = 0; i < n; i++) o.coord[i] = (s32)reg32(w, operand[i])[l];
    TensorMap t = read_tensor_map(m, o.tmap);
    if (t.rank != n)
      fail_at(m, KIND_DESCRIPTOR, (int)l, o.tmap, "a %u-dimensional TMA store through a tensor map of rank %u", n,
              t.rank);
    if (o.smem & 127)
      fail_at(m, KIND_MISALIGNED, (int)l, o.smem, "TMA store: shared address %#x is not a multiple of 128", o.smem);
    // A whole warp may issue the same store (NVIDIA's FMHA example does): once is enough. A repeated reduction would
    // add up.
    if (any) {
      if (o.reduction) fail_at(m, KIND_LAUNCH, (int)l, 0, "a TMA reduction issued by more than one lane");
      o.lane = first.lane;
      if (!memcmp(&o, &first, sizeof o)) continue;
      o.lane = l;
    }
    first = o;
    any = true;
    issue(m, w, &o);
  }
  return FLOW_NEXT;
}
// a source (imm), b destination, c size; x bits 8 and up: reduction | type << 8. aux: offset of the destination.
HANDLER(BULK_STORE) {
  FOR_LANES(mask, l) {
    BulkStore o = {.linear = true,
                   .lane = l,
                   .pc = m->fragment->pc,
                   .smem = (u32)lane_address(w, I, l),
                   .size = reg32(w, I->c)[l]};
    o.gptr = reg64(w, I->b)[l] + (u64)(s64)(s32)m->aux[I->aux];
    o.reduction = I->x >> 8;
    if ((o.smem | o.gptr | o.size) & 15)
      fail_at(m, KIND_MISALIGNED, (int)l, o.gptr,
              "cp.async.bulk: source %#x, destination %#lx and size %u must be multiples of 16", o.smem, (long)o.gptr,
              o.size);
    global_bounds(m, o.gptr, o.size, (int)l, "cp.async.bulk destination");
    issue(m, w, &o);
  }
  return FLOW_NEXT;
}
HANDLER(BULK_COMMIT) {
  UNUSED(m)
  , UNUSED(I);
  FOR_LANES(mask, l) w->bulk_group[l]++;
  return FLOW_NEXT;
}
HANDLER(BULK_WAIT) {  // imm: groups that may stay under way
  wait_groups(m, w, mask, (u32)I->imm);
  return FLOW_NEXT;
}
