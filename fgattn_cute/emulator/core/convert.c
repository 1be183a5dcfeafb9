// SPDX-License-Identifier: Apache-2.0
// Conversions (PTX ISA 9.7.9.21, cvt).
#include "lanes.h"
#include "numeric.h"

// ---- common ones, vectorised
UNARY(CVT_U64_U32, u64, u32, (u64)a)
UNARY(CVT_S64_S32, u64, s32, (u64)(s64)a)
UNARY(CVT_U32_U64, u32, u64, (u32)a)
UNARY(CVT_F32_S32, f32, s32, (f32)a)
UNARY(CVT_F32_U32, f32, u32, (f32)a)
UNARY(CVT_F32_BF16, u32, u32, a << 16)
UNARY(CVT_U32_U16, u32, u32, a & 0xffff)
// tf32 keeps 10 bits of mantissa; rna rounds ties away from zero, which for sign-magnitude numbers is an addition.
UNARY(CVT_TF32_RNA, u32, u32, (a & 0x7fffffff) > 0x7f800000 ? CANONICAL_NAN : (a + 0x1000) & 0xffffe000u)

static inline u32 bf16_bits_rn(u32 x) {  // result in the upper half
  return (x & 0x7fffffff) > 0x7f800000 ? (u32)NAN16 << 16 : (x + 0x7fff + ((x >> 16) & 1)) & 0xffff0000u;
}
#define X_RELU 1u
#define X_RZ 2u
static inline f32 relu(f32 v) { return v < 0 ? 0 : v; }

HANDLER(CVT_BF16X2) {  // d = {a high, b low}
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const f32 *A = (const f32*)(w->rf + I->a), *B = (const f32*)(w->rf + I->b);
  if (I->x == 0) {
    LANES({ D[l] = bf16_bits_rn(bits_of(A[l])) | bf16_bits_rn(bits_of(B[l])) >> 16; })
  } else {
    LANES({
      f32 a = I->x & X_RELU ? relu(A[l]) : A[l];
      f32 b = I->x & X_RELU ? relu(B[l]) : B[l];
      D[l] =
          I->x & X_RZ ? (u32)f32_to_bf16_rz(a) << 16 | f32_to_bf16_rz(b) : (u32)f32_to_bf16(a) << 16 | f32_to_bf16(b);
    })
  }
  return FLOW_NEXT;
}
HANDLER(CVT_F16X2) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const f32 *A = (const f32*)(w->rf + I->a), *B = (const f32*)(w->rf + I->b);
  LANES({
    f32 a = I->x & X_RELU ? relu(A[l]) : A[l];
    f32 b = I->x & X_RELU ? relu(B[l]) : B[l];
    D[l] = I->x & X_RZ ? (u32)f32_to_f16_rz(a) << 16 | f32_to_f16_rz(b) : (u32)f32_to_f16(a) << 16 | f32_to_f16(b);
  })
  return FLOW_NEXT;
}
#define X_E5M2 4u
HANDLER(CVT_FP8X2_F32) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const f32 *A = (const f32*)(w->rf + I->a), *B = (const f32*)(w->rf + I->b);
  int e5m2 = (I->x & X_E5M2) != 0;
  LANES({
    f32 a = I->x & X_RELU ? relu(A[l]) : A[l];
    f32 b = I->x & X_RELU ? relu(B[l]) : B[l];
    D[l] = (u32)f32_to_fp8(a, e5m2) << 8 | f32_to_fp8(b, e5m2);
  })
  return FLOW_NEXT;
}
HANDLER(CVT_FP8X2_F16X2) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const u32* A = reg32(w, I->a);
  int e5m2 = (I->x & X_E5M2) != 0;
  LANES({ D[l] = (u32)f32_to_fp8(f16_to_f32((u16)(A[l] >> 16)), e5m2) << 8 | f32_to_fp8(f16_to_f32((u16)A[l]), e5m2); })
  return FLOW_NEXT;
}
HANDLER(CVT_F16X2_FP8X2) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const u32* A = reg32(w, I->a);
  const f32* table = I->x & X_E5M2 ? fp8_e5m2_table : fp8_e4m3_table;
  LANES({ D[l] = (u32)f32_to_f16(table[A[l] >> 8 & 255]) << 16 | f32_to_f16(table[A[l] & 255]); })
  return FLOW_NEXT;
}

// ---- the general case
enum Type { U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64 };
enum Rounding { RN, RZ, RM, RP, RNI, RZI, RMI, RPI };

static const f64 type_min[] = {0, -128, 0, -32768, 0, -2147483648.0, 0, -9223372036854775808.0};
static const f64 type_max[] = {
    255, 127, 65535, 32767, 4294967295.0, 2147483647.0, 18446744073709551615.0, 9223372036854775807.0};

static s64 extend(u32 type, u64 raw) {
  switch (type) {
    case U8: return (u8)raw;
    case S8: return (s8)raw;
    case U16: return (u16)raw;
    case S16: return (s16)raw;
    case U32: return (u32)raw;
    case S32: return (s32)raw;
    default: return (s64)raw;
  }
}
// An integer as its register holds it: signed 8-bit results are sign-extended to the 32-bit slot (PTX ISA, cvt), others
// truncated.
static u64 store_integer(u32 type, u64 v) {
  switch (type) {
    case U8: return (u8)v;
    case S8: return (u32)(s32)(s8)v;
    case U16:
    case S16: return (u16)v;
    case U32:
    case S32: return (u32)v;
    default: return v;
  }
}
static f64 round_integral(f64 v, u32 rounding) {
  switch (rounding) {
    case RZI:
    case RZ: return trunc(v);
    case RMI:
    case RM: return floor(v);
    case RPI:
    case RP: return ceil(v);
    default: return rint(v);
  }
}
static f32 narrow(f64 v, u32 rounding) {
  f32 f = (f32)v;
  if (rounding == RZ && fabs((f64)f) > fabs(v)) return nextafterf(f, 0);
  if (rounding == RM && (f64)f > v) return nextafterf(f, -INFINITY);
  if (rounding == RP && (f64)f < v) return nextafterf(f, INFINITY);
  return f;
}
static u64 store_float(u32 type, f64 v, u32 rounding) {
  if (type == F64) return bits_of64(v);
  if (type == F32) return bits_of(narrow(v, rounding));
  f32 f = (f32)v;
  if (type == F16) return rounding == RZ ? f32_to_f16_rz(f) : f32_to_f16(f);
  return rounding == RZ ? f32_to_bf16_rz(f) : f32_to_bf16(f);
}
static f64 load_float(u32 type, u64 raw, bool ftz) {
  switch (type) {
    case F16: return f16_to_f32((u16)raw);
    case BF16: return bf16_to_f32((u16)raw);
    case F32: return ftz ? flush(f32_of((u32)raw)) : f32_of((u32)raw);
    default: return f64_of(raw);
  }
}
static u64 integer_to_integer(u32 dt, u32 st, bool sat, u64 raw) {
  s64 v = extend(st, raw);
  if (sat && dt != U64 && st == U64) {
    if ((u64)v > (u64)(s64)type_max[dt]) v = dt == S64 ? INT64_MAX : (s64)type_max[dt];
  } else if (sat) {
    if (dt == U64)
      v = v < 0 ? 0 : v;
    else if (dt != S64)
      v = v < (s64)type_min[dt] ? (s64)type_min[dt] : v > (s64)type_max[dt] ? (s64)type_max[dt] : v;
  }
  return store_integer(dt, (u64)v);
}
static u64 float_to_integer(u32 dt, f64 v, u32 rounding) {  // clamps; NaN gives 0, or the most negative s64
  if (v != v) return dt == S64 ? 1ull << 63 : 0;
  f64 t = round_integral(v, rounding);
  if (t <= type_min[dt]) t = type_min[dt];
  if (t >= type_max[dt]) {
    if (dt == U64) return ~0ull;
    if (dt == S64) return INT64_MAX;
    t = type_max[dt];
  }
  return store_integer(dt, dt == U64 ? (u64)t : (u64)(s64)t);
}
static u64 convert(u32 dt, u32 st, u32 rounding, bool sat, bool ftz, bool relu_, u64 raw) {
  if (st <= S64) {
    if (dt <= S64) return integer_to_integer(dt, st, sat, raw);
    s64 v = extend(st, raw);
    if (dt == F32 && rounding == RN) return bits_of(st == U64 ? (f32)(u64)v : (f32)v);
    return store_float(dt, st == U64 ? (f64)(u64)v : (f64)v, rounding);
  }
  f64 v = load_float(st, raw, ftz);
  if (dt <= S64) return float_to_integer(dt, v, rounding);
  if (sat) v = v != v ? 0 : v < 0 ? 0 : v > 1 ? 1 : v;
  if (relu_ && v < 0) v = 0;
  if (rounding >= RNI) v = round_integral(v, rounding);
  u64 r = store_float(dt, v, rounding);
  return dt == F32 && ftz ? bits_of(flush(f32_of((u32)r))) : r;
}
// x: destination type, source type << 4, rounding << 8, .sat << 11, .ftz << 12, .relu << 13; n: bit 0 wide d, bit 1
// wide a.
HANDLER(CVT) {
  UNUSED(m);
  u32 x = I->x;
  FOR_LANES(mask, l) {
    u64 raw = I->n & 2 ? reg64(w, I->a)[l] : reg32(w, I->a)[l];
    u64 v = convert(x & 15, x >> 4 & 15, x >> 8 & 7, x >> 11 & 1, x >> 12 & 1, x >> 13 & 1, raw);
    if (I->n & 1)
      reg64(w, I->d)[l] = v;
    else
      reg32(w, I->d)[l] = (u32)v;
  }
  return FLOW_NEXT;
}
