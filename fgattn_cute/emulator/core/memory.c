// SPDX-License-Identifier: Apache-2.0
// Address spaces and bounds (PTX ISA 5.1, 6.4.1.1). Device memory is host memory: a global address is a host address,
// and every access is checked against the regions of the launch, to the byte.
#include "memory.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t atomics = PTHREAD_MUTEX_INITIALIZER;
void atomic_lock(void) { pthread_mutex_lock(&atomics); }
void atomic_unlock(void) { pthread_mutex_unlock(&atomics); }

static const MemoryRegion* regions_of(const Machine* m) { return (const MemoryRegion*)m->launch->regions; }

static _Noreturn void out_of_bounds(Machine* m, u64 address, u64 size, int lane, const char* what, u32 next) {
  char near[200] = "";
  const MemoryRegion* r = regions_of(m);
  if (next) {
    s64 past = (s64)(address + size - r[next - 1].hi);
    snprintf(near, sizeof near, "; the nearest tensor below is [%#lx, %#lx): %ld bytes past its end",
             (long)r[next - 1].lo, (long)r[next - 1].hi, (long)past);
  } else if (m->launch->num_regions) {
    snprintf(near, sizeof near, "; the lowest tensor starts at %#lx", (long)r[0].lo);
  }
  fail_at(m, KIND_BOUNDS, lane, address, "%s of %lu bytes at %#lx is outside the tensors of the launch%s", what,
          (unsigned long)size, (long)address, near);
}

static inline const MemoryRegion* find_region(Machine* m, u64 address, u64 size, int lane, const char* what) {
  const MemoryRegion* r = regions_of(m);
  u32 count = m->launch->num_regions;
  if (m->last_region < count && address >= r[m->last_region].lo && address + size <= r[m->last_region].hi)
    return &r[m->last_region];
  u32 lo = 0, hi = count;
  while (lo < hi) {
    u32 mid = (lo + hi) / 2;
    if (r[mid].lo <= address)
      lo = mid + 1;
    else
      hi = mid;
  }
  if (!lo || address + size > r[lo - 1].hi || address + size < address) out_of_bounds(m, address, size, lane, what, lo);
  m->last_region = lo - 1;
  return &r[lo - 1];
}

// Sets bits [first, last] of a bitmap that other host threads may be writing too.
static inline void mark_bits(u64 bitmap, u64 first, u64 last) {
  u8* bytes = (u8*)bitmap;
  if (first == last) {
    u8 bit = (u8)(1u << (first & 7));
    if (!(bytes[first >> 3] & bit)) __atomic_fetch_or(&bytes[first >> 3], bit, __ATOMIC_RELAXED);
    return;
  }
  for (u64 i = first >> 3; i <= last >> 3; i++) {
    u32 from = i == first >> 3 ? first & 7 : 0, to = i == last >> 3 ? last & 7 : 7;
    u8 bits = (u8)((0xffu << from) & (0xffu >> (7 - to)));
    if ((bytes[i] & bits) != bits) __atomic_fetch_or(&bytes[i], bits, __ATOMIC_RELAXED);
  }
}

// Index of the first clear bit in [first, last], or -1.
static inline s64 first_clear(const u8* bytes, u64 first, u64 last) {
  for (u64 i = first; i <= last; i++) {
    if (!(i & 7) && i + 7 <= last && bytes[i >> 3] == 0xff) {
      i += 7;
      continue;
    }
    if (!(bytes[i >> 3] >> (i & 7) & 1)) return (s64)i;
  }
  return -1;
}

void global_bounds(Machine* m, u64 address, u64 size, int lane, const char* what) {
  if (size) find_region(m, address, size, lane, what);
}

u8* global_read(Machine* m, u64 address, u64 size, int lane, const char* what) {
  const MemoryRegion* r = find_region(m, address, size, lane, what);
  u64 offset = address - r->lo;
  mark_bits(r->read_sectors, offset >> 5, (offset + size - 1) >> 5);
  if (r->written && (m->checks & CHECK_UNINIT_GLOBAL)) {
    s64 bad = first_clear((const u8*)r->written, offset, offset + size - 1);
    if (bad >= 0)
      warn(m, KIND_UNINITIALISED, current_pc(m), lane, r->lo + (u64)bad,
           "%s of %lu bytes at %#lx reads global memory that has not been written (byte %ld of the tensor)", what,
           (unsigned long)size, (long)address, (long)bad);
  }
  return (u8*)address;
}

u8* global_write(Machine* m, u64 address, u64 size, int lane, const char* what) {
  const MemoryRegion* r = find_region(m, address, size, lane, what);
  u64 offset = address - r->lo;
  mark_bits(r->write_sectors, offset >> 5, (offset + size - 1) >> 5);
  if (r->written) mark_bits(r->written, offset, offset + size - 1);
  return (u8*)address;
}

Cta* shared_cta(Machine* m, Cta* cta, u32 address) {
  u32 rank = address >> RANK_SHIFT;
  if (rank == cta->rank) return cta;
  if (rank < (u32)m->num_ctas) {
    Cta* other = &m->ctas[rank];
    for (int i = 0; i < other->num_warps; i++)
      if (!other->warps[i].done) return other;
    fail_at(m, KIND_BOUNDS, -1, address,
            "shared address %#x lies in CTA rank %u of the cluster, all of whose warps have exited", address, rank);
  }
  fail_at(m, KIND_BOUNDS, -1, address, "shared address %#x names CTA rank %u of a cluster of %d", address, rank,
          m->num_ctas);
}

u8* shared_pointer(Machine* m, Cta* cta, u32 address, u32 size, const char* what) {
  if (UNLIKELY((address >> RANK_SHIFT) != cta->rank)) cta = shared_cta(m, cta, address);
  u32 offset = address & OFFSET_MASK;
  if (UNLIKELY(offset < SMEM_BASE || offset + size > SMEM_BASE + cta->smem_size))
    fail_at(m, KIND_BOUNDS, -1, address, "%s of %u bytes at shared address %#x is outside shared memory [%#x, %#x)",
            what, size, address, SMEM_BASE, SMEM_BASE + cta->smem_size);
  return cta->smem + offset;
}

void shared_check_written(Machine* m, Cta* cta, u32 address, u32 size, u32 pc, int lane, const char* what) {
  cta = shared_cta(m, cta, address);
  u32 offset = address & OFFSET_MASK;
  s64 bad = first_clear(cta->smem_written, offset, offset + size - 1);
  if (bad >= 0)
    warn(m, KIND_UNINITIALISED, pc, lane, (u64)bad | (u64)cta->rank << RANK_SHIFT,
         "%s of %u bytes at smem+%d reads shared memory that nobody has written (first at smem+%d)", what, size,
         (int)(offset - SMEM_BASE), (int)bad - (int)SMEM_BASE);
}

static inline void bump_pages(Cta* cta, u32 offset, u32 size) {
  for (u32 page = offset >> PAGE_SHIFT; page <= (offset + size - 1) >> PAGE_SHIFT; page++) cta->page_version[page]++;
}

static inline void mark_written(Cta* cta, u32 offset, u32 size) {
  if (!cta->smem_written) return;
  for (u32 i = offset; i < offset + size; i++) {
    if (!(i & 7) && i + 8 <= offset + size) {
      cta->smem_written[i >> 3] = 0xff;
      i += 7;
    } else {
      cta->smem_written[i >> 3] |= (u8)(1u << (i & 7));
    }
  }
}

// A generic-write mark: CTA rank and warp + 1 of the writer above the time of the write.
#define MARK_SHIFT 44
void shared_wrote_generic(Machine* m, Warp* w, u32 address, u32 size) {
  Cta* cta = shared_cta(m, w->cta, address);
  u32 offset = address & OFFSET_MASK;
  bump_pages(cta, offset, size);
  mark_written(cta, offset, size);
  if (!cta->generic_write) return;
  u64 mark = (u64)(w->cta->rank << 7 | (w->id + 1)) << MARK_SHIFT | m->proxy_time;
  for (u32 g = offset >> 4; g <= (offset + size - 1) >> 4; g++) cta->generic_write[g] = mark;
  for (u32 page = offset >> PAGE_SHIFT; page <= (offset + size - 1) >> PAGE_SHIFT; page++)
    cta->page_generic_write[page] = m->proxy_time;
}

void shared_wrote_async(Machine* m, Cta* cta, u32 address, u32 size) {
  cta = shared_cta(m, cta, address);
  u32 offset = address & OFFSET_MASK;
  bump_pages(cta, offset, size);
  mark_written(cta, offset, size);
  if (cta->generic_write)
    for (u32 g = offset >> 4; g <= (offset + size - 1) >> 4; g++) cta->generic_write[g] = 0;
}

void shared_reset_shadow(Machine* m, Cta* cta) {
  for (u32 i = 0; i < sizeof cta->page_version / sizeof cta->page_version[0]; i++) cta->page_version[i]++;
  if (cta->generic_write) memset(cta->generic_write, 0, (SMEM_BASE + cta->smem_size + 16) / 16 * 8);
  memset(cta->page_generic_write, 0, sizeof cta->page_generic_write);
  if (cta->smem_written) memset(cta->smem_written, 0, (SMEM_BASE + cta->smem_size) / 8 + 1);
  (void)m;
}

u64 last_common_fence(const Cta* cta, u32 warps) {
  u64 time = ~0ull;
  for (int i = 0; i < cta->num_warps; i++)
    if ((warps >> i & 1) && cta->warps[i].proxy_fence < time) time = cta->warps[i].proxy_fence;
  return time;
}

bool pages_fenced(const Cta* cta, u64 fenced, u32 lo, u32 hi) {
  for (u32 page = lo >> PAGE_SHIFT; page <= hi >> PAGE_SHIFT; page++)
    if (cta->page_generic_write[page] >= fenced) return false;
  return true;
}

u32 unfenced_writer(const Machine* m, const Cta* cta, u64 fenced, u32 address) {
  u64 mark = cta->generic_write[(address & OFFSET_MASK) >> 4], time = mark & ((1ull << MARK_SHIFT) - 1);
  if (!mark || fenced > time) return 0;
  u32 writer = (u32)(mark >> MARK_SHIFT);
  return m->ctas[writer >> 7].warps[(writer & 127) - 1].proxy_fence > time ? 0 : writer & 127;
}

const u8* param_pointer(Machine* m, u64 offset, u64 size) {
  if (offset + size > m->kernel->param_bytes)
    fail_at(m, KIND_BOUNDS, -1, offset, "read of %lu bytes at byte %ld of the %u bytes of kernel parameters",
            (unsigned long)size, (long)offset, m->kernel->param_bytes);
  return (const u8*)m->launch->params + offset;
}

Place resolve(Machine* m, Warp* w, u64 address, u32 size, int lane, u32 space, bool write, const char* what) {
  u64 window = address >> 56;
  if (UNLIKELY(address & (size - 1)))
    fail_at(m, KIND_MISALIGNED, lane, address, "%s of %u bytes at address %#lx (lane %d) is not aligned to its size",
            what, size, (long)address, lane);
  if (space == SPACE_SHARED || (space == SPACE_GENERIC && window == WINDOW_SHARED)) {
    Place p = {shared_pointer(m, w->cta, (u32)address, size, what), true, (u32)address};
    return p;
  }
  if (space == SPACE_LOCAL || (space == SPACE_GENERIC && window == WINDOW_LOCAL)) {
    u64 offset = address & 0xffffffff;
    if (offset + size > m->kernel->local_bytes)
      fail_at(m, KIND_BOUNDS, lane, address, "%s of %u bytes at local offset %#lx outside the %u bytes of local memory",
              what, size, (long)offset, m->kernel->local_bytes);
    Place p = {w->local + (size_t)lane * m->kernel->local_bytes + offset, false, 0};
    return p;
  }
  if (window == WINDOW_PARAM && !write) {
    Place p = {(u8*)param_pointer(m, address & 0xffffffff, size), false, 0};
    return p;
  }
  if (window == WINDOW_SHARED)
    fail_at(m, KIND_BOUNDS, lane, address, "%s in the global space at a shared address %#lx", what, (long)address);
  Place p = {write ? global_write(m, address, size, lane, what) : global_read(m, address, size, lane, what), false, 0};
  return p;
}
