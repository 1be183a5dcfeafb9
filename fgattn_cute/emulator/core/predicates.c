// SPDX-License-Identifier: Apache-2.0
// Comparison, selection and predicate logic (PTX ISA 9.7.6). A predicate register is a 32-bit mask, one bit per lane.
#include "lanes.h"
#include "numeric.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// setp x: bit 0 inverts the comparison, bits 1-2 combine with c (0 no, 1 and, 2 or, 3 xor), bit 3 negates c; d gets the
// result, e (if present) that of the inverted comparison.
static inline Flow set_predicates(Warp *w, const Ins *I, u32 mask, u32 result) {
  if (I->x & 1) result = ~result;
  u32 inverse = ~result, combine = I->x >> 1 & 3;
  if (combine) {
    u32 c = *pred(w, I->c);
    if (I->x & 8) c = ~c;
    result = combine == 1 ? result & c : combine == 2 ? result | c : result ^ c;
    inverse = combine == 1 ? inverse & c : combine == 2 ? inverse | c : inverse ^ c;
  }
  if (I->d != NONE) set_pred(w, I->d, mask, result);
  if (I->e != NONE) set_pred(w, I->e, mask, inverse);
  return FLOW_NEXT;
}

#define COMPARE(NAME, T, EXPRESSION)                                        \
  HANDLER(NAME) {                                                           \
    UNUSED(m);                                                              \
    const T *A = (const T *)(w->rf + I->a), *B = (const T *)(w->rf + I->b); \
    u32 result = 0;                                                         \
    for (int l = 0; l < 32; l++) {                                          \
      T a = A[l], b = B[l];                                                 \
      result |= (u32)(EXPRESSION) << l;                                     \
    }                                                                       \
    return set_predicates(w, I, mask, result);                              \
  }

#ifdef __AVX512F__
#define COMPARE_VECTOR(NAME, T, EXPRESSION, LOAD, INSTRUCTION, ...)         \
  HANDLER(NAME) {                                                           \
    UNUSED(m);                                                              \
    const u8 *A = w->rf + I->a, *B = w->rf + I->b;                          \
    u32 low = (u32)INSTRUCTION(LOAD(A), LOAD(B), ##__VA_ARGS__);            \
    u32 high = (u32)INSTRUCTION(LOAD(A + 64), LOAD(B + 64), ##__VA_ARGS__); \
    return set_predicates(w, I, mask, low | high << 16);                    \
  }
#define LOAD_PS(p) _mm512_load_ps((const f32 *)(p))
#else
#define COMPARE_VECTOR(NAME, T, EXPRESSION, ...) COMPARE(NAME, T, EXPRESSION)
#endif
COMPARE_VECTOR(SETP_EQ32, u32, a == b, _mm512_load_si512, _mm512_cmpeq_epi32_mask)
COMPARE_VECTOR(SETP_LT_S32, s32, a < b, _mm512_load_si512, _mm512_cmplt_epi32_mask)
COMPARE_VECTOR(SETP_LE_S32, s32, a <= b, _mm512_load_si512, _mm512_cmple_epi32_mask)
COMPARE_VECTOR(SETP_LT_U32, u32, a < b, _mm512_load_si512, _mm512_cmplt_epu32_mask)
COMPARE_VECTOR(SETP_LE_U32, u32, a <= b, _mm512_load_si512, _mm512_cmple_epu32_mask)
// Ordered comparisons are false for NaN; "ne" too (PTX ISA, setp: only neu is true).
COMPARE_VECTOR(SETP_EQ_F32, f32, a == b, LOAD_PS, _mm512_cmp_ps_mask, _CMP_EQ_OQ)
COMPARE_VECTOR(SETP_NE_F32, f32, a<b || a> b, LOAD_PS, _mm512_cmp_ps_mask, _CMP_NEQ_OQ)
COMPARE_VECTOR(SETP_LT_F32, f32, a < b, LOAD_PS, _mm512_cmp_ps_mask, _CMP_LT_OQ)
COMPARE_VECTOR(SETP_LE_F32, f32, a <= b, LOAD_PS, _mm512_cmp_ps_mask, _CMP_LE_OQ)
COMPARE_VECTOR(SETP_NAN_F32, f32, a != a || b != b, LOAD_PS, _mm512_cmp_ps_mask, _CMP_UNORD_Q)

COMPARE(SETP_EQ16, u32, (u16)a == (u16)b)
COMPARE(SETP_LT_S16, u32, (s16)a < (s16)b)
COMPARE(SETP_LE_S16, u32, (s16)a <= (s16)b)
COMPARE(SETP_LT_U16, u32, (u16)a < (u16)b)
COMPARE(SETP_LE_U16, u32, (u16)a <= (u16)b)
COMPARE(SETP_EQ64, u64, a == b)
COMPARE(SETP_LT_S64, s64, a < b)
COMPARE(SETP_LE_S64, s64, a <= b)
COMPARE(SETP_LT_U64, u64, a < b)
COMPARE(SETP_LE_U64, u64, a <= b)
COMPARE(SETP_EQ_F64, f64, a == b)
COMPARE(SETP_NE_F64, f64, a<b || a> b)
COMPARE(SETP_LT_F64, f64, a < b)
COMPARE(SETP_LE_F64, f64, a <= b)
COMPARE(SETP_NAN_F64, f64, a != a || b != b)

#define COMPARE_HALF(SUFFIX, TO_F32)                                                                 \
  COMPARE(SETP_EQ_##SUFFIX, u32, TO_F32((u16)a) == TO_F32((u16)b))                                   \
  COMPARE(SETP_NE_##SUFFIX, u32, TO_F32((u16)a) < TO_F32((u16)b) || TO_F32((u16)a) > TO_F32((u16)b)) \
  COMPARE(SETP_LT_##SUFFIX, u32, TO_F32((u16)a) < TO_F32((u16)b))                                    \
  COMPARE(SETP_LE_##SUFFIX, u32, TO_F32((u16)a) <= TO_F32((u16)b))                                   \
  COMPARE(SETP_NAN_##SUFFIX, u32, isnan(TO_F32((u16)a)) || isnan(TO_F32((u16)b)))
COMPARE_HALF(F16, f16_to_f32)
COMPARE_HALF(BF16, bf16_to_f32)

HANDLER(SELP32) {  // x bit 0: c negated
  UNUSED(m);
  u32 *D = reg32(w, I->d);
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b);
  u32 p = *pred(w, I->c);
  if (I->x & 1) p = ~p;
#ifdef __AVX512F__
  for (int half = 0; half < 2; half++) {
    __m512i chosen = _mm512_mask_blend_epi32((__mmask16)(p >> 16 * half), _mm512_load_si512(B + 16 * half),
                                             _mm512_load_si512(A + 16 * half));
    _mm512_mask_store_epi32(D + 16 * half, (__mmask16)(mask >> 16 * half), chosen);
  }
#else
  LANES({ D[l] = (p >> l & 1) ? A[l] : B[l]; })
#endif
  return FLOW_NEXT;
}
HANDLER(SELP64) {
  UNUSED(m);
  u64 *D = reg64(w, I->d);
  const u64 *A = reg64(w, I->a), *B = reg64(w, I->b);
  u32 p = *pred(w, I->c);
  if (I->x & 1) p = ~p;
  LANES({ D[l] = (p >> l & 1) ? A[l] : B[l]; })
  return FLOW_NEXT;
}
HANDLER(SELP_PRED) {
  UNUSED(m);
  u32 p = *pred(w, I->c);
  if (I->x & 1) p = ~p;
  set_pred(w, I->d, mask, (*pred(w, I->a) & p) | (*pred(w, I->b) & ~p));
  return FLOW_NEXT;
}

// and, or, xor of predicates; x bit 0 negates a, bit 1 negates b.
#define LOGIC_PRED(NAME, OPERATOR)              \
  HANDLER(NAME) {                               \
    UNUSED(m);                                  \
    u32 a = *pred(w, I->a), b = *pred(w, I->b); \
    if (I->x & 1) a = ~a;                       \
    if (I->x & 2) b = ~b;                       \
    set_pred(w, I->d, mask, a OPERATOR b);      \
    return FLOW_NEXT;                           \
  }
LOGIC_PRED(AND_PRED, &)
LOGIC_PRED(OR_PRED, |)
LOGIC_PRED(XOR_PRED, ^)

HANDLER(MOV_PRED) {  // x bit 0: negated
  UNUSED(m);
  u32 v = *pred(w, I->a);
  set_pred(w, I->d, mask, I->x & 1 ? ~v : v);
  return FLOW_NEXT;
}
