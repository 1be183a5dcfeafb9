// SPDX-License-Identifier: Apache-2.0
// Warp-level matrix instructions: ldmatrix, stmatrix (PTX ISA 9.7.14.5.15, 9.7.14.5.16) and mma.sync m16n8 (9.7.14.5.7
// and following).
#include <string.h>
#include "lanes.h"
#include "memory.h"
#include "numeric.h"
#include "race.h"
#include "wgmma.h"

static u32 matrix_row(Machine* m, Warp* w, const Ins* I, u32 lane, const char* what) {
  u32 address = (u32)lane_address(w, I, lane);
  if (address & 15)
    fail_at(m, KIND_MISALIGNED, (int)lane, address, "%s: row address %#x of lane %u is not a multiple of 16", what,
            address, lane);
  return address;
}

// n 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i. x bit 4: .trans. aux:
// registers.
HANDLER(LDMATRIX) {
  UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  const u32* registers = m->aux + I->aux;
  u32 result[4][32];
  for (u32 i = 0; i < I->n; i++)
    for (u32 r = 0; r < 8; r++) {
      u32 address = matrix_row(m, w, I, i * 8 + r, "ldmatrix");
      const u16* row = (const u16*)shared_pointer(m, w->cta, address, 16, "ldmatrix");
      if (m->checks & CHECK_UNINIT_SHARED)
        shared_check_written(m, w->cta, address, 16, m->fragment->pc, (int)(i * 8 + r), "ldmatrix");
      if (m->checks & CHECK_RACE) race_warp_read(m, w, address, 16);
      if (!(I->x & 16)) {
        for (u32 t = 0; t < 4; t++) result[i][r * 4 + t] = (u32)row[2 * t + 1] << 16 | row[2 * t];
      } else {
        for (u32 g = 0; g < 8; g++) {
          u32* d = &result[i][g * 4 + r / 2];
          *d = r & 1 ? (*d & 0xffff) | (u32)row[g] << 16 : row[g];
        }
      }
    }
  for (u32 i = 0; i < I->n; i++) memcpy(reg32(w, registers[i]), result[i], sizeof result[i]);
  count(w, COUNT_SHARED_LOAD_BYTES, 128ull * I->n);
  return FLOW_NEXT;
}
HANDLER(STMATRIX) {
  UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  const u32* registers = m->aux + I->aux;
  for (u32 i = 0; i < I->n; i++)
    for (u32 r = 0; r < 8; r++) {
      u32 address = matrix_row(m, w, I, i * 8 + r, "stmatrix");
      u16* row = (u16*)shared_pointer(m, w->cta, address, 16, "stmatrix");
      if (m->checks & CHECK_RACE) race_warp_write(m, w, address, 16);
      const u32* v = reg32(w, registers[i]);
      if (!(I->x & 16)) {
        for (u32 t = 0; t < 4; t++) {
          row[2 * t] = (u16)v[r * 4 + t];
          row[2 * t + 1] = (u16)(v[r * 4 + t] >> 16);
        }
      } else {
        for (u32 g = 0; g < 8; g++) row[g] = (u16)(v[g * 4 + r / 2] >> (r & 1 ? 16 : 0));
      }
      shared_wrote_generic(m, w, address, 16);
    }
  count(w, COUNT_SHARED_STORE_BYTES, 128ull * I->n);
  m->progress++;
  return FLOW_NEXT;
}

// mma.sync.m16n8kK. aux: 4 D, 4 A, 2 B, 4 C registers. x: type of A, type of B << 4, K << 8, f16 accumulators << 16.
HANDLER(MMA) {
  UNUSED(mask);
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  const u32 *D = m->aux + I->aux, *A = D + 4, *B = D + 8, *C = D + 10;
  u32 type_a = I->x & 15, type_b = I->x >> 4 & 15, depth = I->x >> 8 & 255, bytes = operand_bytes(type_a),
      per = 4 / bytes;
  u32 registers_a = depth * bytes / 8, registers_b = depth * bytes / 16;
  bool f16 = I->x >> 16;
  f32 a[16][64], b[64][8], c[16][8];
  for (u32 l = 0; l < 32; l++) {
    u32 g = l >> 2, t = l & 3;
    for (u32 r = 0; r < registers_a; r++)
      for (u32 i = 0; i < per; i++) {
        u32 k = (r >> 1) * 4 * per + t * per + i;
        a[g + 8 * (r & 1)][k] = operand_value(type_a, (const u8*)&reg32(w, A[r])[l] + i * bytes);
      }
    for (u32 r = 0; r < registers_b; r++)
      for (u32 i = 0; i < per; i++)
        b[r * 4 * per + t * per + i][g] = operand_value(type_b, (const u8*)&reg32(w, B[r])[l] + i * bytes);
    for (u32 i = 0; i < 4; i++) {
      u32 row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
      c[row][column] = f16 ? f16_to_f32((u16)(reg32(w, C[i >> 1])[l] >> 16 * (i & 1))) : f32_of(reg32(w, C[i])[l]);
    }
  }
  for (u32 row = 0; row < 16; row++)
    for (u32 column = 0; column < 8; column++)
      for (u32 k = 0; k < depth; k++) c[row][column] = fmaf(a[row][k], b[k][column], c[row][column]);
  for (u32 l = 0; l < 32; l++) {
    u32 g = l >> 2, t = l & 3;
    if (f16) {
      for (u32 i = 0; i < 2; i++)
        reg32(w, D[i])[l] = f32_to_f16(c[g + 8 * i][2 * t]) | (u32)f32_to_f16(c[g + 8 * i][2 * t + 1]) << 16;
    } else {
      for (u32 i = 0; i < 4; i++) reg32(w, D[i])[l] = bits_of(c[g + 8 * (i >> 1)][2 * t + (i & 1)]);
    }
  }
  count(w, COUNT_MMA_FLOPS, 2ull * 16 * 8 * depth);
  return FLOW_NEXT;
}
