// SPDX-License-Identifier: Apache-2.0
// Floating-point instructions (PTX ISA 9.7.3 to 9.7.5). Multiplications and additions are never contracted here, while
// ptxas may fuse an unrounded mul and add into one fma: results may then differ from the chip's in the last bit. x: bit
// 0 .ftz, bit 1 .sat.
#include "lanes.h"
#include "numeric.h"

#define X_FTZ 1u
#define X_SAT 2u

static inline f32 finish(f32 r, u32 x) {
  if (x & X_FTZ) r = flush(r);
  return x & X_SAT ? saturate(r) : r;
}
static inline f32 operand(f32 a, u32 x) { return x & X_FTZ ? flush(a) : a; }

#define BINARY_F32(NAME, EXPRESSION)           \
  HANDLER(NAME) {                              \
    UNUSED(m);                                 \
    f32* D = (f32*)(w->rf + I->d);             \
    const f32* A = (const f32*)(w->rf + I->a); \
    const f32* B = (const f32*)(w->rf + I->b); \
    u32 x = I->x;                              \
    if (!x) {                                  \
      LANES({                                  \
        f32 a = A[l];                          \
        f32 b = B[l];                          \
        D[l] = (EXPRESSION);                   \
      })                                       \
    } else {                                   \
      LANES({                                  \
        f32 a = operand(A[l], x);              \
        f32 b = operand(B[l], x);              \
        D[l] = finish((EXPRESSION), x);        \
      })                                       \
    }                                          \
    return FLOW_NEXT;                          \
  }
#define UNARY_F32(NAME, EXPRESSION)            \
  HANDLER(NAME) {                              \
    UNUSED(m);                                 \
    f32* D = (f32*)(w->rf + I->d);             \
    const f32* A = (const f32*)(w->rf + I->a); \
    u32 x = I->x;                              \
    LANES({                                    \
      f32 a = operand(A[l], x);                \
      D[l] = finish((EXPRESSION), x);          \
    })                                         \
    return FLOW_NEXT;                          \
  }

BINARY_F32(ADD_F32, a + b)
BINARY_F32(SUB_F32, a - b)
BINARY_F32(MUL_F32, a* b)
BINARY_F32(DIV_F32, a / b)
BINARY_F32(MIN_F32, min_number(a, b))
BINARY_F32(MAX_F32, max_number(a, b))
BINARY_F32(MIN_NAN_F32, min_nan(a, b))
BINARY_F32(MAX_NAN_F32, max_nan(a, b))
BINARY(COPYSIGN_F32, u32, u32, u32, (b & 0x7fffffff) | (a & 0x80000000))
UNARY(ABS_F32, u32, u32, a & 0x7fffffff)
UNARY(NEG_F32, u32, u32, a ^ 0x80000000)
UNARY(FLUSH_F32, f32, f32, flush(a))

HANDLER(FMA_F32) {
  UNUSED(m);
  f32* D = (f32*)(w->rf + I->d);
  const f32 *A = (const f32*)(w->rf + I->a), *B = (const f32*)(w->rf + I->b), *C = (const f32*)(w->rf + I->c);
  u32 x = I->x;
  if (!x) {
    LANES({ D[l] = fmaf(A[l], B[l], C[l]); })
  } else {
    LANES({ D[l] = finish(fmaf(operand(A[l], x), operand(B[l], x), operand(C[l], x)), x); })
  }
  return FLOW_NEXT;
}

// Directed rounding of add, mul and fma: round the exact result, taken in double where that is exact enough, toward the
// wanted side. x bits 4-5: 1 rz, 2 rm, 3 rp; bits 6-7: 0 add, 1 sub, 2 mul, 3 fma.
static f32 round_directed(f64 exact, u32 mode) {
  f32 r = (f32)exact;
  f64 v = (f64)r;
  if (v == exact || r != r || isinf(exact)) return r;
  bool up = v > exact;
  bool want_down = mode == 2 || (mode == 1 && exact > 0), want_up = mode == 3 || (mode == 1 && exact < 0);
  if (want_down && up) return nextafterf(r, -INFINITY);
  if (want_up && !up) return nextafterf(r, INFINITY);
  return r;
}
HANDLER(DIRECTED_F32) {
  UNUSED(m);
  f32* D = (f32*)(w->rf + I->d);
  const f32 *A = (const f32*)(w->rf + I->a), *B = (const f32*)(w->rf + I->b), *C = (const f32*)(w->rf + I->c);
  u32 x = I->x, mode = x >> 4 & 3, kind = x >> 6 & 3;
  LANES({
    f64 a = operand(A[l], x);
    f64 b = operand(B[l], x);
    f64 c = operand(C[l], x);
    f64 exact = kind == 0 ? a + b : kind == 1 ? a - b : kind == 2 ? a * b : fma(a, b, c);
    D[l] = finish(round_directed(exact, mode), x);
  })
  return FLOW_NEXT;
}

// The approximations (ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh .approx) are as accurate here as the C library; the
// chip's are within the bounds the PTX ISA gives (ex2 and rcp: 2 and 1 ulp; tanh: 2^-11).
HANDLER(EX2_F32) {
  UNUSED(m);
  f32* D = (f32*)(w->rf + I->d);
  const f32* A = (const f32*)(w->rf + I->a);
  u32 x = I->x;
  LANES({ D[l] = finish(exp2_approx(operand(A[l], x)), x); })
  count(w, COUNT_EX2, (u64)__builtin_popcount(mask));
  return FLOW_NEXT;
}
UNARY_F32(LG2_F32, log2f(a))
UNARY_F32(RCP_F32, 1.0f / a)
UNARY_F32(SQRT_F32, sqrtf(a))
UNARY_F32(RSQRT_F32, (f32)(1.0 / sqrt((f64)a)))
UNARY_F32(SIN_F32, sinf(a))
UNARY_F32(COS_F32, cosf(a))
UNARY_F32(TANH_F32, tanhf(a))

// ---- f64
BINARY(ADD_F64, f64, f64, f64, a + b)
BINARY(SUB_F64, f64, f64, f64, a - b)
BINARY(MUL_F64, f64, f64, f64, a* b)
BINARY(DIV_F64, f64, f64, f64, a / b)
TERNARY(FMA_F64, f64, f64, f64, f64, fma(a, b, c))
BINARY(MIN_F64, f64, f64, f64, fmin(a, b))
BINARY(MAX_F64, f64, f64, f64, fmax(a, b))
UNARY(NEG_F64, f64, f64, -a)
UNARY(ABS_F64, f64, f64, fabs(a))
UNARY(SQRT_F64, f64, f64, sqrt(a))
UNARY(RCP_F64, f64, f64, 1.0 / a)
UNARY(RSQRT_F64, f64, f64, 1.0 / sqrt(a))

// ---- 16-bit floats, scalar or packed in pairs
enum { HALF_ADD, HALF_SUB, HALF_MUL, HALF_FMA, HALF_MIN, HALF_MAX, HALF_FMA_RELU, HALF_MAX_NAN, HALF_MIN_NAN };

static inline f32 half_to_f32(u32 h, bool bf16) { return bf16 ? bf16_to_f32((u16)h) : f16_to_f32((u16)h); }
static inline u32 half_of_f32(f32 f, bool bf16) { return bf16 ? f32_to_bf16(f) : f32_to_f16(f); }

u32 half_arithmetic(u32 operation, u32 a, u32 b, u32 c, u32 elements, bool bf16) {
  u32 r = 0;
  for (u32 i = 0; i < elements; i++) {
    f32 x = half_to_f32(a >> 16 * i, bf16), y = half_to_f32(b >> 16 * i, bf16), z = half_to_f32(c >> 16 * i, bf16), v;
    switch (operation) {
      case HALF_ADD: v = x + y; break;
      case HALF_SUB: v = x - y; break;
      case HALF_MUL: v = x * y; break;
      case HALF_FMA: v = fmaf(x, y, z); break;
      case HALF_MIN: v = min_number(x, y); break;
      case HALF_MAX: v = max_number(x, y); break;
      case HALF_FMA_RELU: v = fmaf(x, y, z), v = v < 0 ? 0 : v; break;
      case HALF_MAX_NAN: v = max_nan(x, y); break;
      default: v = min_nan(x, y);
    }
    r |= half_of_f32(v, bf16) << 16 * i;
  }
  return r;
}
HANDLER(HALF) {  // x: operation, bit 4 bf16; n elements
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b), *C = reg32(w, I->c);
  u32 operation = I->x & 15, n = I->n;
  bool bf16 = I->x >> 4 & 1;
  LANES({ D[l] = half_arithmetic(operation, A[l], B[l], C[l], n, bf16); })
  return FLOW_NEXT;
}
HANDLER(HALF_UNARY) {  // x: 0 neg, 1 abs, 2 ex2, 3 tanh, bit 4 bf16; n elements
  UNUSED(m);
  u32* D = reg32(w, I->d);
  const u32* A = reg32(w, I->a);
  u32 operation = I->x & 15, n = I->n, ones = n == 2 ? 0x00010001u : 1u;
  bool bf16 = I->x >> 4 & 1;
  LANES({
    u32 a = A[l], r = 0;
    if (operation == 0)
      r = a ^ (0x8000 * ones);
    else if (operation == 1)
      r = a & (0x7fff * ones);
    else
      for (u32 i = 0; i < n; i++) {
        f32 x = half_to_f32(a >> 16 * i, bf16);
        r |= half_of_f32(operation == 2 ? exp2_approx(x) : tanhf(x), bf16) << 16 * i;
      }
    D[l] = r;
  })
  if (operation == 2) count(w, COUNT_EX2, (u64)__builtin_popcount(mask) * n);
  return FLOW_NEXT;
}
