// SPDX-License-Identifier: Apache-2.0
// Decoding of tensor maps, and the reductions of cp.reduce.async.bulk.
#include "tensor_map.h"
#include <string.h>
#include "memory.h"
#include "numeric.h"

u32 element_bytes(u32 type) {
  static const u8 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  return type < sizeof bytes ? bytes[type] : 0;
}

static const char* decode(const u32* w, TensorMap* t) {
  if ((w[2] & 15) != 2) return "it is not a tensor map (bad version)";
  t->address = (u64)w[1] << 32 | w[0];
  t->rank = (w[2] >> 4 & 7) + 1;
  t->type = w[2] >> 7 & 15;
  t->element_bytes = element_bytes(t->type);
  t->swizzle = w[2] >> 13 & 7;
  if (t->rank > 5) return "its rank is above 5";
  if (!t->element_bytes) return "its element type is unknown";
  if (w[2] >> 11 & 3) return "it is interleaved (not supported)";
  if (t->swizzle > 3) return "its swizzle mode is unknown";
  if (w[2] >> 16 & ~0x3eu) return "it has unknown flags (NaN fill is not supported)";
  if (w[13] & 0xffffff) return "it has element strides other than 1 (not supported)";
  for (u32 i = 0; i < 5; i++) t->dim[i] = i < t->rank ? (u64)w[8 + i] + 1 : 1;
  for (u32 i = 0; i < 4; i++) t->stride[i] = i + 1 < t->rank ? ((u64)(w[7] >> (4 * i) & 15) << 32 | w[3 + i]) << 4 : 0;
  t->box[0] = (w[13] >> 24) + 1;
  for (u32 i = 1; i < 5; i++) t->box[i] = i < t->rank ? (w[14] >> (8 * (i - 1)) & 255) + 1 : 1;
  if (t->address & 15) return "its global address is not a multiple of 16";
  if (t->box[0] * t->element_bytes & 15) return "the inner dimension of its box is not a multiple of 16 bytes";
  u32 span = t->swizzle ? 16u << t->swizzle : 0;
  if (span && t->box[0] * t->element_bytes > span) return "the inner dimension of its box exceeds the swizzle span";
  if (span && t->box[0] * t->element_bytes < span)
    return "the inner dimension of its box is below the swizzle span (not supported)";
  return NULL;
}

TensorMap read_tensor_map(Machine* m, u64 address) {
  if (address & 63)
    fail_at(m, KIND_MISALIGNED, -1, address, "tensor map address %#lx is not a multiple of 64", (long)address);
  const u32* words;
  if (address >> 56 == WINDOW_PARAM)
    words = (const u32*)param_pointer(m, address & 0xffffffff, 128);
  else
    words = (const u32*)global_read(m, address, 128, -1, "tensor map");
  TensorMap t;
  const char* error = decode(words, &t);
  if (error)
    fail_at(m, KIND_DESCRIPTOR, -1, address,
            "the tensor map cannot be used: %s (words 2, 3, 13, 14: %08x %08x %08x %08x)", error, words[2], words[3],
            words[13], words[14]);
  return t;
}

u32 tile_bytes(const TensorMap* t) {
  u32 n = t->element_bytes;
  for (u32 i = 0; i < t->rank; i++) n *= t->box[i];
  return n;
}

static u64 reduce_integer(u32 reduction, u64 a, u64 b, bool is_signed) {
  bool less = is_signed ? (s64)b < (s64)a : b < a;
  switch (reduction) {
    case REDUCE_ADD: return a + b;
    case REDUCE_MIN: return less ? b : a;
    case REDUCE_MAX: return less ? a : b;
    case REDUCE_AND: return a & b;
    case REDUCE_OR: return a | b;
    default: return a ^ b;
  }
}
static f32 reduce_float(u32 reduction, f32 a, f32 b) {
  return reduction == REDUCE_ADD ? a + b : reduction == REDUCE_MIN ? min_number(a, b) : max_number(a, b);
}

void reduce_element(Machine* m, u32 reduction, u32 type, u8* into, const u8* value) {
  u64 a = 0, b = 0;
  u32 bytes = element_bytes(type);
  memcpy(&a, into, bytes);
  memcpy(&b, value, bytes);
  switch (type) {
    case TM_U8:
    case TM_U16:
    case TM_U32:
    case TM_U64: a = reduce_integer(reduction, a, b, false); break;
    case TM_S32: a = reduce_integer(reduction, (u64)(s64)(s32)a, (u64)(s64)(s32)b, true); break;
    case TM_S64: a = reduce_integer(reduction, a, b, true); break;
    case TM_F16: a = f32_to_f16(reduce_float(reduction, f16_to_f32((u16)a), f16_to_f32((u16)b))); break;
    case TM_BF16: a = f32_to_bf16(reduce_float(reduction, bf16_to_f32((u16)a), bf16_to_f32((u16)b))); break;
    case TM_F32:
    case TM_F32_FTZ: a = bits_of(reduce_float(reduction, f32_of((u32)a), f32_of((u32)b))); break;
    case TM_F64: a = bits_of64(f64_of(a) + f64_of(b)); break;
    default: fail(m, KIND_UNSUPPORTED, "a bulk reduction of element type %u", type);
  }
  memcpy(into, &a, bytes);
}
