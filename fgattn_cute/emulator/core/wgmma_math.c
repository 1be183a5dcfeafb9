// SPDX-License-Identifier: Apache-2.0
// The products of wgmma, in f32 fused multiply-adds along k. The chip aligns and truncates partial products, and keeps
// about 14 bits in fp8 accumulations (PTX ISA leaves it open): last bits differ, and no conclusion about fp8 precision
// may be drawn from here.
//
// Fragment layouts (PTX ISA 9.7.15.5.1). Accumulator register i of lane l holds, of the warp's 16 rows,
//   row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2.
// A register r of lane l holds row l / 4 + 8 (r % 2) and 4 / bytes elements of k, the first being
//   (4 (r / 2) + l % 4) 4 / bytes.
#include <string.h>
#include "numeric.h"
#include "wgmma.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// rows: [k][stride], of which the first 16 columns are this warp's rows.
void wgmma_spread_a(const f32* rows, u32 stride, u32 k_depth, bool negate, f32 (*a)[2][32]) {
#ifdef __AVX512F__
  const __m512i quads = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512 sign = _mm512_set1_ps(negate ? -1.f : 1.f);
  for (u32 k = 0; k < k_depth; k++) {
    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(rows + (size_t)k * stride), sign);
    for (int q = 0; q < 4; q++)
      _mm512_store_ps(&a[k][q >> 1][(q & 1) * 16],
                      _mm512_permutexvar_ps(_mm512_add_epi32(quads, _mm512_set1_epi32(4 * q)), v));
  }
#else
  for (u32 k = 0; k < k_depth; k++)
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < 32; l++) {
        f32 v = rows[(size_t)k * stride + (l >> 2) + 8 * h];
        a[k][h][l] = negate ? -v : v;
      }
#endif
}

#ifdef __AVX512F__
static void registers_bf16(const Warp* w, const WgmmaShape* s, f32 (*a)[2][32]) {
  const __m512 sign = _mm512_set1_ps(s->negate ? -1.f : 1.f);
  for (int r = 0; r < 4; r++)
    for (int half = 0; half < 2; half++) {
      __m512i v = _mm512_load_si512(w->rf + s->a[r] + 64 * half);
      for (int i = 0; i < 2; i++) {  // element i of each register: broadcast lane t of every quad over the quad
        __m512i bits = i ? _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(v, 16);
        __m512 f = _mm512_mul_ps(_mm512_castsi512_ps(bits), sign);
        int k = (r >> 1) * 8 + i, row = r & 1;
        _mm512_store_ps(&a[k][row][16 * half], _mm512_permute_ps(f, 0x00));
        _mm512_store_ps(&a[k + 2][row][16 * half], _mm512_permute_ps(f, 0x55));
        _mm512_store_ps(&a[k + 4][row][16 * half], _mm512_permute_ps(f, 0xaa));
        _mm512_store_ps(&a[k + 6][row][16 * half], _mm512_permute_ps(f, 0xff));
      }
    }
}
#endif

void wgmma_registers_a(const Warp* w, const WgmmaShape* s, f32 (*a)[2][32]) {
#ifdef __AVX512F__
  if (s->type_a == OPERAND_BF16) {
    registers_bf16(w, s, a);
    return;
  }
#endif
  u32 bytes = operand_bytes(s->type_a), per_register = 4 / bytes;
  for (u32 r = 0; r < 4; r++) {
    const u32* values = (const u32*)(w->rf + s->a[r]);
    for (u32 t = 0; t < 4; t++)
      for (u32 i = 0; i < per_register; i++) {
        f32* into = a[(r >> 1) * 4 * per_register + t * per_register + i][r & 1];
        for (u32 g = 0; g < 8; g++) {
          f32 v = operand_value(s->type_a, (const u8*)&values[g * 4 + t] + i * bytes);
          if (s->negate) v = -v;
          for (u32 lane = 0; lane < 4; lane++) into[g * 4 + lane] = v;
        }
      }
  }
}

#ifdef __AVX512F__
// `tiles` groups of 8 columns at once: 8 accumulators of 16 lanes each, so that an A value loaded is used `tiles`
// times. The small loops must be unrolled for the accumulators to stay in registers.
#define UNROLL _Pragma("GCC unroll 8")
static inline __attribute__((always_inline)) void multiply_columns(u8* rf, const u32* d, const f32 (*a)[2][32],
                                                                   const f32* b, u32 n, u32 k_depth, bool accumulate,
                                                                   const u32 tiles) {
  __m512 acc[2][4][2];
  UNROLL for (u32 j = 0; j < tiles; j++) {
    UNROLL for (u32 i = 0; i < 4; i++) {
      const f32* old = (const f32*)(rf + d[4 * j + i]);
      acc[j][i][0] = accumulate ? _mm512_load_ps(old) : _mm512_setzero_ps();
      acc[j][i][1] = accumulate ? _mm512_load_ps(old + 16) : _mm512_setzero_ps();
    }
  }
  for (u32 k = 0; k < k_depth; k++) {
    __m512 a00 = _mm512_load_ps(a[k][0]), a01 = _mm512_load_ps(a[k][0] + 16), a10 = _mm512_load_ps(a[k][1]),
           a11 = _mm512_load_ps(a[k][1] + 16);
    // Without this compilers fold the loads into the multiplications, and loads become the bottleneck.
    __asm__("" : "+v"(a00), "+v"(a01), "+v"(a10), "+v"(a11));
    UNROLL for (u32 j = 0; j < tiles; j++) {
      const f32* columns = b + (size_t)k * n + 8 * j;
      __m512 even = _mm512_broadcast_f32x4(_mm_load_ps(columns)),
             odd = _mm512_broadcast_f32x4(_mm_load_ps(columns + 4));
      acc[j][0][0] = _mm512_fmadd_ps(a00, even, acc[j][0][0]), acc[j][0][1] = _mm512_fmadd_ps(a01, even, acc[j][0][1]);
      acc[j][1][0] = _mm512_fmadd_ps(a00, odd, acc[j][1][0]), acc[j][1][1] = _mm512_fmadd_ps(a01, odd, acc[j][1][1]);
      acc[j][2][0] = _mm512_fmadd_ps(a10, even, acc[j][2][0]), acc[j][2][1] = _mm512_fmadd_ps(a11, even, acc[j][2][1]);
      acc[j][3][0] = _mm512_fmadd_ps(a10, odd, acc[j][3][0]), acc[j][3][1] = _mm512_fmadd_ps(a11, odd, acc[j][3][1]);
    }
  }
  UNROLL for (u32 j = 0; j < tiles; j++) {
    UNROLL for (u32 i = 0; i < 4; i++) {
      f32* into = (f32*)(rf + d[4 * j + i]);
      _mm512_store_ps(into, acc[j][i][0]);
      _mm512_store_ps(into + 16, acc[j][i][1]);
    }
  }
}
static void multiply_f32(u8* rf, const WgmmaShape* s, const f32 (*a)[2][32], const f32* b, u32 k_depth,
                         bool accumulate) {
  u32 j = 0;
  for (; j + 2 <= s->n / 8; j += 2) multiply_columns(rf, s->d + 4 * j, a, b + 8 * j, s->n, k_depth, accumulate, 2);
  if (j < s->n / 8) multiply_columns(rf, s->d + 4 * j, a, b + 8 * j, s->n, k_depth, accumulate, 1);
}
#else
static void multiply_f32(u8* rf, const WgmmaShape* s, const f32 (*a)[2][32], const f32* b, u32 k_depth,
                         bool accumulate) {
  for (u32 j = 0; j < s->n / 8; j++) {
    f32 acc[4][32];
    for (u32 i = 0; i < 4; i++) {
      if (accumulate)
        memcpy(acc[i], rf + s->d[4 * j + i], sizeof acc[i]);
      else
        memset(acc[i], 0, sizeof acc[i]);
    }
    for (u32 k = 0; k < k_depth; k++) {
      const f32* columns = b + (size_t)k * s->n + 8 * j;
      f32 even[32], odd[32];
      for (int l = 0; l < 32; l++) even[l] = columns[l & 3], odd[l] = columns[4 + (l & 3)];
      for (int l = 0; l < 32; l++) {
        acc[0][l] = fmaf(a[k][0][l], even[l], acc[0][l]);
        acc[1][l] = fmaf(a[k][0][l], odd[l], acc[1][l]);
        acc[2][l] = fmaf(a[k][1][l], even[l], acc[2][l]);
        acc[3][l] = fmaf(a[k][1][l], odd[l], acc[3][l]);
      }
    }
    for (u32 i = 0; i < 4; i++) memcpy(rf + s->d[4 * j + i], acc[i], sizeof acc[i]);
  }
}
#endif

// f16 accumulators: two columns per register, rounded once per instruction.
static void multiply_f16(u8* rf, const WgmmaShape* s, const f32 (*a)[2][32], const f32* b, u32 k_depth,
                         bool accumulate) {
  for (u32 j = 0; j < s->n / 8; j++)
    for (int h = 0; h < 2; h++) {
      u32* d = (u32*)(rf + s->d[2 * j + (u32)h]);
      for (int l = 0; l < 32; l++) {
        f32 x = accumulate ? f16_to_f32((u16)d[l]) : 0, y = accumulate ? f16_to_f32((u16)(d[l] >> 16)) : 0;
        for (u32 k = 0; k < k_depth; k++) {
          const f32* columns = b + (size_t)k * s->n + 8 * j;
          x = fmaf(a[k][h][l], columns[l & 3], x);
          y = fmaf(a[k][h][l], columns[4 + (l & 3)], y);
        }
        d[l] = f32_to_f16(x) | (u32)f32_to_f16(y) << 16;
      }
    }
}

void wgmma_multiply(Machine* m, Warp* w, const WgmmaShape* s, const f32 (*a)[2][32], const f32* b, bool accumulate) {
  (void)m;
  if (s->f16_accumulator)
    multiply_f16(w->rf, s, a, b, wgmma_k(s), accumulate);
  else
    multiply_f32(w->rf, s, a, b, wgmma_k(s), accumulate);
}
