// SPDX-License-Identifier: Apache-2.0
// Register moves, packing and unpacking (PTX ISA 9.7.9.5), special registers and clocks.
#include <string.h>
#include "lanes.h"

UNARY(MOV32, u32, u32, a)
UNARY(MOV64, u64, u64, a)
UNARY(MOV16, u32, u32, a & 0xffff)

HANDLER(NOP) {
  UNUSED(m)
  , UNUSED(w)
  , UNUSED(I)
  , UNUSED(mask);
  return FLOW_NEXT;
}
HANDLER(MOV128) {
  UNUSED(m);
  u64* D = reg64(w, I->d);
  const u64* A = reg64(w, I->a);
  FOR_LANES(mask, l) {
    D[l] = A[l];
    D[l + 32] = A[l + 32];
  }
  return FLOW_NEXT;
}
BINARY(PACK32, u32, u32, u32, b << 16 | (a & 0xffff))
BINARY(PACK64, u64, u32, u32, (u64)b << 32 | a)
HANDLER(UNPACK32) {  // d low half, e high half, either may be absent
  UNUSED(m);
  const u32* A = reg32(w, I->a);
  if (I->d != NONE) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = A[l] & 0xffff; })
  }
  if (I->e != NONE) {
    u32* D = reg32(w, I->e);
    LANES({ D[l] = A[l] >> 16; })
  }
  return FLOW_NEXT;
}
HANDLER(UNPACK64) {
  UNUSED(m);
  const u64* A = reg64(w, I->a);
  if (I->d != NONE) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = (u32)A[l]; })
  }
  if (I->e != NONE) {
    u32* D = reg32(w, I->e);
    LANES({ D[l] = (u32)(A[l] >> 32); })
  }
  return FLOW_NEXT;
}
HANDLER(PACK128) {
  UNUSED(m);
  u64* D = reg64(w, I->d);
  const u64 *A = reg64(w, I->a), *B = reg64(w, I->b);
  FOR_LANES(mask, l) {
    D[l] = A[l];
    D[l + 32] = B[l];
  }
  return FLOW_NEXT;
}
HANDLER(UNPACK128) {
  UNUSED(m);
  const u64* A = reg64(w, I->a);
  FOR_LANES(mask, l) {
    if (I->d != NONE) reg64(w, I->d)[l] = A[l];
    if (I->e != NONE) reg64(w, I->e)[l] = A[l + 32];
  }
  return FLOW_NEXT;
}
// n parts of x bits each; aux: the registers of the parts, lowest first. The whole has 64 bits if n * x does.
HANDLER(PACK_PARTS) {
  const u32* parts = m->aux + I->aux;
  u32 bits = I->x;
  u64 part_mask = (1ull << bits) - 1;
  FOR_LANES(mask, l) {
    u64 v = 0;
    for (u32 i = 0; i < I->n; i++) v |= (reg32(w, parts[i])[l] & part_mask) << bits * i;
    if (bits * I->n == 64)
      reg64(w, I->d)[l] = v;
    else
      reg32(w, I->d)[l] = (u32)v;
  }
  return FLOW_NEXT;
}
HANDLER(UNPACK_PARTS) {
  const u32* parts = m->aux + I->aux;
  u32 bits = I->x;
  u64 part_mask = (1ull << bits) - 1;
  FOR_LANES(mask, l) {
    u64 v = bits * I->n == 64 ? reg64(w, I->a)[l] : reg32(w, I->a)[l];
    for (u32 i = 0; i < I->n; i++)
      if (parts[i] != NONE) reg32(w, parts[i])[l] = (u32)(v >> bits * i & part_mask);
  }
  return FLOW_NEXT;
}

// %clock and friends advance by a fixed step per read: the emulator has no timing. x bit 0: 64 bits.
HANDLER(CLOCK) {
  u64 t = m->clock_ticks += 10;
  if (I->x) {
    u64* D = reg64(w, I->d);
    LANES({ D[l] = t; })
  } else {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = (u32)t; })
  }
  return FLOW_NEXT;
}

// ---- bookkeeping of registers that some path reads before writing (ptx/flow.py inserts these around such accesses
// only). These are not instructions of the kernel, so they take themselves out of the counts.
static inline void uncount(Warp* w, const Ins* I) { w->counters[I->cls]--; }

// aux: indices of tracked registers; n of them.
HANDLER(MARK_WRITTEN) {
  uncount(w, I);
  for (u32 i = 0; i < I->n; i++) w->initialised[m->aux[I->aux + i]] |= mask;
  return FLOW_NEXT;
}
// A move copies the state: moving an unwritten register is harmless until something computes with it.
// aux: index of the destination, then of the n - 1 sources (all must be written).
HANDLER(COPY_WRITTEN) {
  uncount(w, I);
  const u32* index = m->aux + I->aux;
  u32 written = FULL;
  for (u32 i = 1; i < I->n; i++) written &= w->initialised[index[i]];
  w->initialised[index[0]] = (w->initialised[index[0]] & ~mask) | (written & mask);
  return FLOW_NEXT;
}
// aux: indices of the n registers about to be read. c: if present, a predicate without which they are not read. imm:
// distance to the instruction that reads.
HANDLER(CHECK_WRITTEN) {
  uncount(w, I);
  if (!(m->checks & CHECK_UNINIT_REGISTER)) return FLOW_NEXT;
  u32 readers = I->c == NONE ? mask : mask & *pred(w, I->c);
  for (u32 i = 0; i < I->n; i++) {
    u32 missing = readers & ~w->initialised[m->aux[I->aux + i]];
    if (!missing) continue;
    warn(m, KIND_UNINITIALISED, m->fragment->pc + (u32)I->imm, first_lane(missing), 0,
         "reads a register that has not been written in lanes %08x (operand %u of those in doubt)", missing, i);
    break;
  }
  return FLOW_NEXT;
}
