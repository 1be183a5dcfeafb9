// SPDX-License-Identifier: Apache-2.0
// Number formats: bf16, f16, fp8 and the PTX rules for rounding, flushing, minimum and maximum (PTX ISA 9.7.3, 9.7.9).
#ifndef FGE_NUMERIC_H
#define FGE_NUMERIC_H
#include <math.h>
#include <string.h>
#include "abi.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

#define CANONICAL_NAN 0x7fffffffu  // what PTX arithmetic returns for NaN
#define NAN16 0x7fff

static inline f32 f32_of(u32 bits) {
  f32 f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline u32 bits_of(f32 f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
static inline f64 f64_of(u64 bits) {
  f64 f;
  memcpy(&f, &bits, 8);
  return f;
}
static inline u64 bits_of64(f64 f) {
  u64 bits;
  memcpy(&bits, &f, 8);
  return bits;
}

static inline f32 bf16_to_f32(u16 h) { return f32_of((u32)h << 16); }
static inline u16 f32_to_bf16(f32 f) {  // round to nearest even
  u32 x = bits_of(f);
  if ((x & 0x7fffffff) > 0x7f800000) return NAN16;
  return (u16)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
static inline u16 f32_to_bf16_rz(f32 f) {
  u32 x = bits_of(f);
  return (x & 0x7fffffff) > 0x7f800000 ? NAN16 : (u16)(x >> 16);
}

#ifdef __F16C__
static inline f32 f16_to_f32(u16 h) { return _cvtsh_ss(h); }
static inline u16 f32_to_f16(f32 f) { return f != f ? NAN16 : _cvtss_sh(f, 0); }
static inline u16 f32_to_f16_rz(f32 f) { return f != f ? NAN16 : _cvtss_sh(f, 3); }
#else
static inline f32 f16_to_f32(u16 h) {
  u32 sign = (u32)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return f32_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return f32_of(bits_of((f32)mantissa * 0x1p-24f) | sign);
  return f32_of(sign | (exponent + 112) << 23 | mantissa << 13);
}
static inline u16 f32_to_f16_round(f32 f, int nearest) {
  if (f != f) return NAN16;
  u16 sign = (u16)(bits_of(f) >> 16 & 0x8000);
  f32 a = fabsf(f);
  if (a >= 65520.f) return sign | (nearest || isinf(a) ? 0x7c00 : 0x7bff);
  if (a >= 65504.f && !nearest) return sign | 0x7bff;
  int e;
  frexpf(a, &e);
  int quantum = e - 11 < -24 ? -24 : e - 11;  // exponent of the last place
  f32 scaled = ldexpf(a, -quantum), r = nearest ? rintf(scaled) : truncf(scaled);
  f32 v = ldexpf(r, quantum);
  if (v == 0) return sign;
  frexpf(v, &e);
  if (e < -13) return sign | (u16)ldexpf(v, 24);
  return sign | (u16)((e + 14) << 10) | (u16)((bits_of(v) >> 13) & 1023);
}
static inline u16 f32_to_f16(f32 f) { return f32_to_f16_round(f, 1); }
static inline u16 f32_to_f16_rz(f32 f) { return f32_to_f16_round(f, 0); }
#endif

extern f32 fp8_e4m3_table[256], fp8_e5m2_table[256];
void numeric_init(void);
// cvt.rn.satfinite to e4m3 or e5m2: nearest even, out-of-range values become the largest finite one.
u8 f32_to_fp8(f32 f, int is_e5m2);

static inline f32 flush(f32 x) {  // .ftz: subnormals become zeros of the same sign
  u32 u = bits_of(x);
  return (u & 0x7f800000) ? x : f32_of(u & 0x80000000);
}
// min and max return the operand that is a number; -0 < +0 (PTX ISA, min and max).
static inline f32 min_number(f32 a, f32 b) {
  if (a != a) return b != b ? f32_of(CANONICAL_NAN) : b;
  if (b != b) return a;
  return (a < b || (a == b && bits_of(a) >> 31)) ? a : b;
}
static inline f32 max_number(f32 a, f32 b) {
  if (a != a) return b != b ? f32_of(CANONICAL_NAN) : b;
  if (b != b) return a;
  return (a > b || (a == b && !(bits_of(a) >> 31))) ? a : b;
}
static inline f32 min_nan(f32 a, f32 b) { return (a != a || b != b) ? f32_of(CANONICAL_NAN) : min_number(a, b); }
static inline f32 max_nan(f32 a, f32 b) { return (a != a || b != b) ? f32_of(CANONICAL_NAN) : max_number(a, b); }
static inline f32 saturate(f32 a) { return a != a ? 0.f : a < 0.f ? 0.f : a > 1.f ? 1.f : a; }

// ex2.approx: the chip guarantees 2 ulp (PTX ISA, ex2); this polynomial is within 2 ulp of 2^x, and exact for integral
// x.
static inline f32 exp2_approx(f32 x) {
  f32 xc = x < -160.f ? -160.f : x;
  xc = xc > 130.f ? 130.f : xc;
  f32 n = rintf(xc), f = xc - n;
  f32 p = 1.5403530e-4f;
  p = fmaf(p, f, 1.3333558e-3f);
  p = fmaf(p, f, 9.6181291e-3f);
  p = fmaf(p, f, 5.5504109e-2f);
  p = fmaf(p, f, 2.4022651e-1f);
  p = fmaf(p, f, 6.9314718e-1f);
  p = fmaf(p, f, 1.0f);
  int i = (int)n, half = i >> 1, rest = i - half;  // two factors: 2^i itself may leave the range of normal numbers
  return p * f32_of((u32)(half + 127) << 23) * f32_of((u32)(rest + 127) << 23);
}
#endif
