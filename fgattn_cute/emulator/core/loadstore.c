// SPDX-License-Identifier: Apache-2.0
// Loads, stores, atomics and address conversions (PTX ISA 9.7.9, 9.7.13).
// x of LD and ST: space, X_WIDE, element bytes << 4, bit 9 sign-extend, bit 10 64-bit registers; n elements in the
// registers at aux.
#include <string.h>
#include "lanes.h"
#include "memory.h"
#include "numeric.h"
#include "race.h"

#define ELEMENT_BYTES(x) ((x) >> 4 & 31)
#define SIGN_EXTEND(x) ((x) >> 9 & 1)
#define WIDE_REGISTERS(x) ((x) >> 10 & 1)

static inline u64 load_bytes(const u8* p, u32 bytes) {
  u64 v = 0;
  memcpy(&v, p, bytes);
  return v;
}
static inline u64 sign_extend(u64 v, u32 bytes) {
  return bytes == 1 ? (u64)(s64)(s8)v : bytes == 2 ? (u64)(s64)(s16)v : (u64)(s64)(s32)v;
}

HANDLER(LD_PARAM) {  // imm: byte in the parameter space
  const u32* registers = m->aux + I->aux;
  u32 bytes = ELEMENT_BYTES(I->x);
  const u8* p = param_pointer(m, (u64)I->imm, (u64)bytes * I->n);
  for (u32 i = 0; i < I->n; i++, p += bytes) {
    if (registers[i] == NONE) continue;
    u64 v = load_bytes(p, bytes);
    if (SIGN_EXTEND(I->x)) v = sign_extend(v, bytes);
    if (WIDE_REGISTERS(I->x)) {
      u64* D = reg64(w, registers[i]);
      LANES({ D[l] = v; })
    } else {
      u32* D = reg32(w, registers[i]);
      LANES({ D[l] = (u32)v; })
    }
  }
  return FLOW_NEXT;
}

HANDLER(LD) {
  const u32* registers = m->aux + I->aux;
  u32 bytes = ELEMENT_BYTES(I->x), total = bytes * I->n, space = I->x & X_SPACE;
  bool wide = WIDE_REGISTERS(I->x), shared = false;
  FOR_LANES(mask, l) {
    Place place = resolve(m, w, lane_address(w, I, l), total, (int)l, space, false, "load");
    if (place.shared) {
      shared = true;
      if (m->checks & CHECK_UNINIT_SHARED)
        shared_check_written(m, w->cta, place.address, total, m->fragment->pc, (int)l, "load");
      if (m->checks & CHECK_RACE) race_warp_read(m, w, place.address, total);
    }
    const u8* p = place.pointer;
    for (u32 i = 0; i < I->n; i++, p += bytes) {
      if (registers[i] == NONE) continue;
      if (bytes == 4 && !wide) {
        reg32(w, registers[i])[l] = *(const u32*)p;
      } else if (bytes == 16) {
        reg64(w, registers[i])[l] = *(const u64*)p;
        reg64(w, registers[i])[l + 32] = *(const u64*)(p + 8);
      } else {
        u64 v = load_bytes(p, bytes);
        if (SIGN_EXTEND(I->x)) v = sign_extend(v, bytes);
        if (wide)
          reg64(w, registers[i])[l] = v;
        else
          reg32(w, registers[i])[l] = (u32)v;
      }
    }
  }
  count(w, shared ? COUNT_SHARED_LOAD_BYTES : COUNT_GLOBAL_LOAD_BYTES, (u64)__builtin_popcount(mask) * total);
  return FLOW_NEXT;
}

HANDLER(ST) {
  const u32* registers = m->aux + I->aux;
  u32 bytes = ELEMENT_BYTES(I->x), total = bytes * I->n, space = I->x & X_SPACE;
  bool wide = WIDE_REGISTERS(I->x), shared = false;
  FOR_LANES(mask, l) {
    Place place = resolve(m, w, lane_address(w, I, l), total, (int)l, space, true, "store");
    u8* p = place.pointer;
    for (u32 i = 0; i < I->n; i++, p += bytes) {
      if (bytes == 16) {
        memcpy(p, &reg64(w, registers[i])[l], 8);
        memcpy(p + 8, &reg64(w, registers[i])[l + 32], 8);
      } else if (wide) {
        memcpy(p, &reg64(w, registers[i])[l], bytes);
      } else {
        memcpy(p, &reg32(w, registers[i])[l], bytes);
      }
    }
    if (place.shared) {
      shared = true;
      if (m->checks & CHECK_RACE) race_warp_write(m, w, place.address, total);
      shared_wrote_generic(m, w, place.address, total);
    }
  }
  count(w, shared ? COUNT_SHARED_STORE_BYTES : COUNT_GLOBAL_STORE_BYTES, (u64)__builtin_popcount(mask) * total);
  m->progress++;
  return FLOW_NEXT;
}

// ---- atomics
enum AtomicOp { ADD, MIN, MAX, AND, OR, XOR, EXCH, CAS, INC, DEC };
enum AtomicType { A_U16 = 2, A_S16, A_U32, A_S32, A_U64, A_S64, A_F16, A_BF16, A_F32, A_F64, A_F16X2, A_BF16X2 };

static u64 integer_atomic(u32 op, u64 old, u64 b, u64 swap, bool is_signed) {
  bool less = is_signed ? (s64)b < (s64)old : b < old;
  switch (op) {
    case ADD: return old + b;
    case MIN: return less ? b : old;
    case MAX: return less ? old : b;
    case AND: return old & b;
    case OR: return old | b;
    case XOR: return old ^ b;
    case EXCH: return b;
    case CAS: return old == b ? swap : old;
    case INC: return old >= b ? 0 : old + 1;
    default: return old == 0 || old > b ? b : old - 1;
  }
}
static f32 float_atomic(u32 op, f32 old, f32 b) {
  return op == ADD ? old + b : op == MIN ? min_number(old, b) : max_number(old, b);
}
u32 half_arithmetic(u32 operation, u32 a, u32 b, u32 c, u32 elements, bool bf16);

static u64 atomic_value(u32 op, u32 type, u64 old, u64 b, u64 swap) {
  if (op == EXCH) return b;
  switch (type) {
    case A_S16: return integer_atomic(op, (u64)(s64)(s16)old, (u64)(s64)(s16)b, swap, true);
    case A_S32: return integer_atomic(op, (u64)(s64)(s32)old, (u64)(s64)(s32)b, (u64)(s64)(s32)swap, true);
    case A_S64: return integer_atomic(op, old, b, swap, true);
    case A_F16: return f32_to_f16(float_atomic(op, f16_to_f32((u16)old), f16_to_f32((u16)b)));
    case A_BF16: return f32_to_bf16(float_atomic(op, bf16_to_f32((u16)old), bf16_to_f32((u16)b)));
    case A_F32: return bits_of(float_atomic(op, f32_of((u32)old), f32_of((u32)b)));
    case A_F64: return bits_of64(f64_of(old) + f64_of(b));
    case A_F16X2:
    case A_BF16X2: return half_arithmetic(op == ADD ? 0 : op == MIN ? 4 : 5, (u32)old, (u32)b, 0, 2, type == A_BF16X2);
    default: return integer_atomic(op, old, b, swap, false);
  }
}
static u32 atomic_bytes(u32 type) {
  switch (type) {
    case A_U16:
    case A_S16:
    case A_F16:
    case A_BF16: return 2;
    case A_U64:
    case A_S64:
    case A_F64: return 8;
    default: return 4;
  }
}

// aux: the n values to combine, then n destinations (NONE: red); c: the swap value of cas. x: space, X_WIDE, operation
// << 4, type << 8.
HANDLER(ATOM) {
  const u32 *values = m->aux + I->aux, *results = values + I->n;
  u32 op = I->x >> 4 & 15, type = I->x >> 8 & 15, bytes = atomic_bytes(type);
  FOR_LANES(mask, l) {
    Place place = resolve(m, w, lane_address(w, I, l), bytes * I->n, (int)l, I->x & X_SPACE, true, "atomic");
    if (place.shared && (m->checks & CHECK_UNINIT_SHARED))
      shared_check_written(m, w->cta, place.address, bytes * I->n, m->fragment->pc, (int)l, "atomic");
    for (u32 i = 0; i < I->n; i++) {
      u8* p = place.pointer + i * bytes;
      u64 b = bytes == 8 ? reg64(w, values[i])[l] : reg32(w, values[i])[l];
      u64 swap = I->c == NONE ? 0 : bytes == 8 ? reg64(w, I->c)[l] : reg32(w, I->c)[l];
      if (bytes == 2) b &= 0xffff, swap &= 0xffff;
      atomic_lock();
      u64 old = load_bytes(p, bytes), updated = atomic_value(op, type, old, b, swap);
      memcpy(p, &updated, bytes);
      atomic_unlock();
      if (results[i] == NONE) continue;
      if (bytes == 8)
        reg64(w, results[i])[l] = old;
      else
        reg32(w, results[i])[l] = (u32)old;
    }
    // Atomics do not race with each other, and what they order is not modelled: the race detector does not see them.
    if (place.shared) shared_wrote_generic(m, w, place.address, bytes * I->n);
  }
  m->progress++;
  return FLOW_NEXT;
}

// ---- addresses
UNARY(CVTA_SHARED, u64, u64, a + (WINDOW_SHARED << 56))
UNARY(CVTA_LOCAL, u64, u64, a + (WINDOW_LOCAL << 56))
UNARY(CVTA_TO_WINDOW, u64, u64, a & 0xffffffff)
HANDLER(ISSPACEP) {  // x: the space asked for
  UNUSED(m);
  const u64* A = reg64(w, I->a);
  u32 result = 0;
  for (u32 l = 0; l < 32; l++) {
    u64 window = A[l] >> 56;
    u32 space = window == WINDOW_SHARED  ? SPACE_SHARED
                : window == WINDOW_LOCAL ? SPACE_LOCAL
                : window == WINDOW_PARAM ? SPACE_PARAM
                                         : SPACE_GLOBAL;
    result |= (u32)(space == I->x) << l;
  }
  set_pred(w, I->d, mask, result);
  return FLOW_NEXT;
}
HANDLER(MAPA) {  // the same offset in CTA b of the cluster
  UNUSED(m);
  const u32* B = reg32(w, I->b);
  if (I->x & X_WIDE) {
    u64* D = reg64(w, I->d);
    const u64* A = reg64(w, I->a);
    LANES({ D[l] = (A[l] & ~((u64)0xff << RANK_SHIFT)) | (u64)B[l] << RANK_SHIFT; })
  } else {
    u32* D = reg32(w, I->d);
    const u32* A = reg32(w, I->a);
    LANES({ D[l] = (A[l] & OFFSET_MASK) | B[l] << RANK_SHIFT; })
  }
  return FLOW_NEXT;
}
HANDLER(GETCTARANK) {
  UNUSED(m);
  u32* D = reg32(w, I->d);
  if (I->x & X_WIDE) {
    const u64* A = reg64(w, I->a);
    LANES({ D[l] = (u32)A[l] >> RANK_SHIFT; })
  } else {
    const u32* A = reg32(w, I->a);
    LANES({ D[l] = A[l] >> RANK_SHIFT; })
  }
  return FLOW_NEXT;
}
