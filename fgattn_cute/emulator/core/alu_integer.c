// SPDX-License-Identifier: Apache-2.0
// Integer and logic instructions (PTX ISA 9.7.1, 9.7.8). 8- and 16-bit values live zero-extended in 32-bit slots.
#include "lanes.h"

// ---- 32 bits
BINARY(ADD32, u32, u32, u32, a + b)
BINARY(SUB32, u32, u32, u32, a - b)
BINARY(MUL32, u32, u32, u32, a* b)
TERNARY(MAD32, u32, u32, u32, u32, a* b + c)
BINARY(MULHI_S32, u32, s32, s32, ((s64)a * b) >> 32)
BINARY(MULHI_U32, u32, u32, u32, ((u64)a * b) >> 32)
TERNARY(MADHI_S32, u32, s32, s32, u32, (u32)(((s64)a * b) >> 32) + c)
TERNARY(MADHI_U32, u32, u32, u32, u32, (u32)(((u64)a * b) >> 32) + c)
BINARY(MULWIDE_S32, u64, s32, s32, (s64)a* b)
BINARY(MULWIDE_U32, u64, u32, u32, (u64)a* b)
BINARY(MULWIDE_S16, u32, u32, u32, (s32)(s16)a*(s32)(s16)b)
BINARY(MULWIDE_U16, u32, u32, u32, (u32)(u16)a*(u16)b)
TERNARY(MADWIDE_S32, u64, s32, s32, u64, (u64)((s64)a* b) + c)
TERNARY(MADWIDE_U32, u64, u32, u32, u64, (u64)a* b + c)
TERNARY(MADWIDE_S16, u32, u32, u32, u32, (u32)((s32)(s16)a*(s32)(s16)b) + c)
TERNARY(MADWIDE_U16, u32, u32, u32, u32, (u32)(u16)a*(u16)b + c)
// Division by zero gives an unspecified, machine-specific value (PTX ISA, div); here all ones.
BINARY(DIV_S32, u32, s32, s32, b == 0 ? -1 : (s32)((s64)a / b))
BINARY(DIV_U32, u32, u32, u32, b == 0 ? FULL : a / b)
BINARY(REM_S32, u32, s32, s32, b == 0 ? a : (s32)((s64)a % b))
BINARY(REM_U32, u32, u32, u32, b == 0 ? a : a % b)
BINARY(MIN_S32, u32, s32, s32, a < b ? a : b)
BINARY(MAX_S32, u32, s32, s32, a > b ? a : b)
BINARY(MIN_U32, u32, u32, u32, a < b ? a : b)
BINARY(MAX_U32, u32, u32, u32, a > b ? a : b)
UNARY(ABS_S32, u32, u32, (s32)a < 0 ? 0u - a : a)
UNARY(NEG_S32, u32, u32, 0u - a)
BINARY(AND32, u32, u32, u32, a& b)
BINARY(OR32, u32, u32, u32, a | b)
BINARY(XOR32, u32, u32, u32, a ^ b)
UNARY(NOT32, u32, u32, ~a)
UNARY(CNOT32, u32, u32, a == 0)
// Shifts clamp: counts above the width give zero (or the sign).
BINARY(SHL32, u32, u32, u32, b > 31 ? 0 : a << b)
BINARY(SHR_U32, u32, u32, u32, b > 31 ? 0 : a >> b)
BINARY(SHR_S32, u32, s32, u32, a >> (b > 31 ? 31 : b))
TERNARY(SHF_L_WRAP, u32, u32, u32, u32, (((u64)b << 32 | a) << (c & 31)) >> 32)
TERNARY(SHF_L_CLAMP, u32, u32, u32, u32, (((u64)b << 32 | a) << (c > 32 ? 32 : c)) >> 32)
TERNARY(SHF_R_WRAP, u32, u32, u32, u32, ((u64)b << 32 | a) >> (c & 31))
TERNARY(SHF_R_CLAMP, u32, u32, u32, u32, ((u64)b << 32 | a) >> (c > 32 ? 32 : c))
UNARY(POPC32, u32, u32, __builtin_popcount(a))
UNARY(POPC64, u32, u64, __builtin_popcountll(a))
UNARY(CLZ32, u32, u32, a ? __builtin_clz(a) : 32)
UNARY(CLZ64, u32, u64, a ? __builtin_clzll(a) : 64)
UNARY(BFIND_U32, u32, u32, a ? 31 - __builtin_clz(a) : (int)FULL)
UNARY(BFIND_SHIFT_U32, u32, u32, a ? __builtin_clz(a) : (int)FULL)
TERNARY(SAD_S32, u32, s32, s32, u32, c + (u32)(a > b ? a - b : b - a))
TERNARY(SAD_U32, u32, u32, u32, u32, c + (a > b ? a - b : b - a))

static inline u32 reverse_bits(u32 v) {
  v = (v >> 1 & 0x55555555) | (v & 0x55555555) << 1;
  v = (v >> 2 & 0x33333333) | (v & 0x33333333) << 2;
  v = (v >> 4 & 0x0f0f0f0f) | (v & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(v);
}
UNARY(BREV32, u32, u32, reverse_bits(a))

static inline u32 extract_unsigned(u32 a, u32 start, u32 length) {
  start &= 255, length &= 255;
  if (start > 31 || !length) return 0;
  u32 v = a >> start;
  return length >= 32 ? v : v & ((1u << length) - 1);
}
static inline u32 extract_signed(u32 a, u32 start, u32 length) {
  start &= 255, length &= 255;
  if (!length) return 0;
  if (start > 31) return (s32)a < 0 ? FULL : 0;
  u32 v = (u32)((s32)a >> start);
  return length >= 32 ? v : (u32)((s32)(v << (32 - length)) >> (32 - length));
}
TERNARY(BFE_U32, u32, u32, u32, u32, extract_unsigned(a, b, c))
TERNARY(BFE_S32, u32, u32, u32, u32, extract_signed(a, b, c))

HANDLER(BFI32) {  // d = b with c.. bits of a inserted at c, length e
  UNUSED(m);
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b), *C = reg32(w, I->c), *E = reg32(w, I->e);
  u32* D = reg32(w, I->d);
  LANES({
    u32 start = C[l] & 255;
    u32 length = E[l] & 255;
    u32 field = length >= 32 ? FULL : (1u << length) - 1;
    D[l] = start > 31 || !length ? B[l] : (B[l] & ~(field << start)) | ((A[l] << start) & (field << start));
  })
  return FLOW_NEXT;
}

HANDLER(LOP3) {  // imm: truth table
  UNUSED(m);
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b), *C = reg32(w, I->c);
  u32* D = reg32(w, I->d);
  u32 table = (u32)I->imm;
  LANES({
    u32 r = 0;
    for (u32 row = 0; row < 8; row++)
      if (table >> row & 1) r |= (row & 4 ? A[l] : ~A[l]) & (row & 2 ? B[l] : ~B[l]) & (row & 1 ? C[l] : ~C[l]);
    D[l] = r;
  })
  return FLOW_NEXT;
}

// prmt (PTX ISA 9.7.8.7): x: 0 by selector, then the modes f4e b4e rc8 ecl ecr rc16.
static u32 permute_bytes(u32 a, u32 b, u32 selector, u32 mode) {
  u64 v = (u64)b << 32 | a;
  u32 r = 0, s = selector & 3;
  for (u32 i = 0; i < 4; i++) {
    u32 q = selector >> (4 * i) & 15, byte;
    switch (mode) {
      case 0: byte = q & 7; break;
      case 1: byte = s + i; break;
      case 2: byte = (8 + s - i) & 7; break;
      case 3: byte = s; break;
      case 4: byte = i < s ? s : i; break;
      case 5: byte = i > s ? s : i; break;
      default: byte = (s & 1) * 2 + (i & 1);
    }
    u32 value = (u32)(v >> (8 * byte)) & 255;
    if (mode == 0 && (q & 8)) value = value & 128 ? 255 : 0;  // replicate the sign
    r |= value << (8 * i);
  }
  return r;
}
HANDLER(PRMT) {
  UNUSED(m);
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b), *C = reg32(w, I->c);
  u32* D = reg32(w, I->d);
  LANES({ D[l] = permute_bytes(A[l], B[l], C[l], I->x); })
  return FLOW_NEXT;
}

// ---- 16 bits
BINARY(ADD16, u32, u32, u32, (u16)(a + b))
BINARY(SUB16, u32, u32, u32, (u16)(a - b))
BINARY(MUL16, u32, u32, u32, (u16)(a* b))
TERNARY(MAD16, u32, u32, u32, u32, (u16)(a* b + c))
BINARY(AND16, u32, u32, u32, a& b)
BINARY(OR16, u32, u32, u32, a | b)
BINARY(XOR16, u32, u32, u32, a ^ b)
UNARY(NOT16, u32, u32, (u16)~a)
BINARY(SHL16, u32, u32, u32, b > 15 ? 0 : (u16)(a << b))
BINARY(SHR_U16, u32, u32, u32, b > 15 ? 0 : (a & 0xffff) >> b)
BINARY(SHR_S16, u32, u32, u32, (u16)((s16)a >> (b > 15 ? 15 : b)))
BINARY(MIN_S16, u32, u32, u32, (u16)((s16)a < (s16)b ? a : b))
BINARY(MAX_S16, u32, u32, u32, (u16)((s16)a > (s16)b ? a : b))
BINARY(MIN_U16, u32, u32, u32, (u16)a < (u16)b ? (u16)a : (u16)b)
BINARY(MAX_U16, u32, u32, u32, (u16)a > (u16)b ? (u16)a : (u16)b)
UNARY(NEG_S16, u32, u32, (u16)(0 - a))
UNARY(ABS_S16, u32, u32, (u16)((s16)a < 0 ? -(s16)a : (s16)a))
BINARY(DIV_S16, u32, u32, u32, (u16)((s16)b ? (s16)a / (s16)b : -1))
BINARY(DIV_U16, u32, u32, u32, (u16)((u16)b ? (u16)a / (u16)b : 0xffff))
BINARY(REM_S16, u32, u32, u32, (u16)((s16)b ? (s16)a % (s16)b : (s16)a))
BINARY(REM_U16, u32, u32, u32, (u16)((u16)b ? (u16)a % (u16)b : a))

// ---- 64 bits
BINARY(ADD64, u64, u64, u64, a + b)
BINARY(SUB64, u64, u64, u64, a - b)
BINARY(MUL64, u64, u64, u64, a* b)
TERNARY(MAD64, u64, u64, u64, u64, a* b + c)
BINARY(MULHI_S64, u64, s64, s64, ((__int128)a * b) >> 64)
BINARY(MULHI_U64, u64, u64, u64, ((unsigned __int128)a * b) >> 64)
BINARY(DIV_S64, u64, s64, s64, b == 0 ? -1 : b == -1 ? (s64)(0 - (u64)a) : a / b)
BINARY(DIV_U64, u64, u64, u64, b == 0 ? ~0ull : a / b)
BINARY(REM_S64, u64, s64, s64, b == 0 ? a : b == -1 ? 0 : a % b)
BINARY(REM_U64, u64, u64, u64, b == 0 ? a : a % b)
BINARY(MIN_S64, u64, s64, s64, a < b ? a : b)
BINARY(MAX_S64, u64, s64, s64, a > b ? a : b)
BINARY(MIN_U64, u64, u64, u64, a < b ? a : b)
BINARY(MAX_U64, u64, u64, u64, a > b ? a : b)
UNARY(NEG_S64, u64, u64, 0ull - a)
UNARY(ABS_S64, u64, s64, a < 0 ? 0ull - (u64)a : (u64)a)
BINARY(AND64, u64, u64, u64, a& b)
BINARY(OR64, u64, u64, u64, a | b)
BINARY(XOR64, u64, u64, u64, a ^ b)
UNARY(NOT64, u64, u64, ~a)
BINARY(SHL64, u64, u64, u32, b > 63 ? 0 : a << b)
BINARY(SHR_U64, u64, u64, u32, b > 63 ? 0 : a >> b)
BINARY(SHR_S64, u64, s64, u32, a >> (b > 63 ? 63 : b))
