// SPDX-License-Identifier: Apache-2.0
// TMA tiles (PTX ISA 5.5.3 to 5.5.5): rows of the innermost dimension, walked in the order they lie in shared memory.
#include "tile.h"
#include <string.h>
#include "memory.h"

#define MAX_ROW_BYTES 4096  // 256 elements of 16 bytes at most

typedef struct {
  u64 global;       // address of the first in-bounds element
  u32 skip, bytes;  // bytes of the row that are out of bounds on the left, and bytes in bounds
} Row;

// The swizzle is a function of the shared address (PTX ISA 5.5.7): 16-byte chunks move within lines of 128 bytes.
static inline u32 swizzled(u32 address, u32 mode) {
  static const u32 chunk_bits[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & chunk_bits[mode]);
}

static Row locate_row(const TensorMap* t, const s32* coord, const u32* index) {
  Row row = {t->address, 0, 0};
  for (u32 d = 1; d < t->rank; d++) {
    s64 x = (s64)coord[d] + index[d];
    if (x < 0 || x >= (s64)t->dim[d]) return row;
    row.global += (u64)x * t->stride[d - 1];
  }
  s64 first = coord[0], lo = first < 0 ? -first : 0, hi = (s64)t->dim[0] - first;
  if (hi > (s64)t->box[0]) hi = t->box[0];
  if (lo >= hi) return row;
  row.skip = (u32)lo * t->element_bytes;
  row.bytes = (u32)(hi - lo) * t->element_bytes;
  row.global += (u64)(first + lo) * t->element_bytes;
  return row;
}

// Steps index[1..4] through the box; false when it is done.
static bool next_row(const TensorMap* t, u32* index) {
  for (u32 d = 1; d < 5; d++) {
    if (++index[d] < t->box[d]) return true;
    index[d] = 0;
  }
  return false;
}

static void check_tile(Machine* m, Cta* cta, const TensorMap* t, u32 smem, const char* what) {
  if (smem & 127) fail_at(m, KIND_MISALIGNED, -1, smem, "%s: shared address %#x is not a multiple of 128", what, smem);
  shared_pointer(m, cta, smem, tile_bytes(t), what);
}

void tile_load(Machine* m, Cta* cta, const TensorMap* t, const s32* coord, u32 smem) {
  check_tile(m, cta, t, smem, "TMA load");
  u8* shared = shared_cta(m, cta, smem)->smem;
  u32 row_bytes = t->box[0] * t->element_bytes, offset = smem & OFFSET_MASK, index[5] = {0};
  u8 buffer[MAX_ROW_BYTES];
  do {
    Row row = locate_row(t, coord, index);
    if (row.bytes < row_bytes) memset(buffer, 0, row_bytes);
    if (row.bytes) memcpy(buffer + row.skip, global_read(m, row.global, row.bytes, -1, "TMA load"), row.bytes);
    if (!t->swizzle)
      memcpy(shared + offset, buffer, row_bytes);
    else
      for (u32 b = 0; b < row_bytes; b += 16) memcpy(shared + swizzled(offset + b, t->swizzle), buffer + b, 16);
    offset += row_bytes;
  } while (next_row(t, index));
  shared_wrote_async(m, cta, smem, tile_bytes(t));
}

void tile_store(Machine* m, Cta* cta, const TensorMap* t, const s32* coord, u32 smem, u32 reduction, u32 pc) {
  check_tile(m, cta, t, smem, "TMA store");
  const u8* shared = shared_cta(m, cta, smem)->smem;
  u32 row_bytes = t->box[0] * t->element_bytes, offset = smem & OFFSET_MASK, index[5] = {0};
  u8 buffer[MAX_ROW_BYTES];
  do {
    Row row = locate_row(t, coord, index);
    for (u32 b = 0; row.bytes && b < row_bytes; b += 16) {
      u32 chunk = swizzled(offset + b, t->swizzle);
      bool stored = b + 16 > row.skip && b < row.skip + row.bytes;
      if (stored && (m->checks & CHECK_UNINIT_SHARED))
        shared_check_written(m, cta, chunk | (smem & ~OFFSET_MASK), 16, pc, -1, "TMA store");
      memcpy(buffer + b, shared + chunk, 16);
    }
    if (row.bytes && reduction == REDUCE_NONE) {
      memcpy(global_write(m, row.global, row.bytes, -1, "TMA store"), buffer + row.skip, row.bytes);
    } else if (row.bytes) {
      u8* into = global_write(m, row.global, row.bytes, -1, "TMA reduction");
      atomic_lock();
      for (u32 b = 0; b < row.bytes; b += t->element_bytes)
        reduce_element(m, reduction, t->type, into + b, buffer + row.skip + b);
      atomic_unlock();
    }
    offset += row_bytes;
  } while (next_row(t, index));
}
