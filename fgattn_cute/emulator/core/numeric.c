// SPDX-License-Identifier: Apache-2.0
// fp8 tables and rounding (PTX ISA 5.2.3, alternate floating-point formats).
#include "numeric.h"

f32 fp8_e4m3_table[256], fp8_e5m2_table[256];

static f32 decode_fp8(int exponent, int mantissa, int mantissa_bits, int bias) {
  int scale = 1 << mantissa_bits;
  if (exponent == 0) return ldexpf((f32)mantissa, 1 - bias - mantissa_bits);
  return ldexpf((f32)(scale + mantissa), exponent - bias - mantissa_bits);
}

void numeric_init(void) {
  for (int i = 0; i < 256; i++) {
    f32 sign = i >> 7 ? -1.f : 1.f;
    int e = (i >> 3) & 15, m = i & 7;
    fp8_e4m3_table[i] = sign * (e == 15 && m == 7 ? NAN : decode_fp8(e, m, 3, 7));  // e4m3 has no infinities
    e = (i >> 2) & 31, m = i & 3;
    fp8_e5m2_table[i] = sign * (e == 31 ? (m ? NAN : INFINITY) : decode_fp8(e, m, 2, 15));
  }
}

u8 f32_to_fp8(f32 f, int is_e5m2) {
  u8 sign = (u8)(bits_of(f) >> 31 << 7);
  if (f != f) return 0x7f;
  const f32* table = is_e5m2 ? fp8_e5m2_table : fp8_e4m3_table;
  int lo = 0, hi = is_e5m2 ? 0x7b : 0x7e;  // the largest finite code
  f32 a = fabsf(f);
  if (a >= table[hi]) return sign | (u8)hi;
  while (hi - lo > 1) {
    int mid = (lo + hi) / 2;
    if (table[mid] <= a)
      lo = mid;
    else
      hi = mid;
  }
  f32 below = a - table[lo], above = table[hi] - a;
  int nearest = below < above ? lo : above < below ? hi : (lo & 1 ? hi : lo);
  return sign | (u8)nearest;
}
