// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix multiplication (PTX ISA 9.7.15).
#ifndef FGE_WGMMA_H
#define FGE_WGMMA_H
#include "machine.h"

enum OperandType { OPERAND_BF16, OPERAND_F16, OPERAND_E4M3, OPERAND_E5M2, OPERAND_TF32 };
static inline u32 operand_bytes(u32 type) { return type <= OPERAND_F16 ? 2 : type == OPERAND_TF32 ? 4 : 1; }
f32 operand_value(u32 type, const u8* p);

// The aux words of a WGMMA instruction, in this order.
typedef struct {
  u32 num_d, n, type_a, type_b, f16_accumulator, negate, major_a, major_b, a_in_registers, scale, desc_a, desc_b;
  u32 a[4];
  u32 d[];
} WgmmaShape;
static inline const WgmmaShape* wgmma_shape(const Machine* m, u32 aux) { return (const WgmmaShape*)(m->aux + aux); }
static inline u32 wgmma_k(const WgmmaShape* s) {
  return 32 / operand_bytes(s->type_a);
}  // every shape is 32 bytes deep

// ---- wgmma_operand.c: matrices in shared memory
typedef enum { ROLE_A, ROLE_B } Role;
// The operand as f32, [k][extent]; B's columns in the order of fragments: column 8 j + 2 t + p at 8 j + 4 p + t.
const f32* operand_decode(Machine* m, Cta* cta, u64 desc, Role role, u32 extent, u32 type, u32 mn_major);
// Faults of an operand that is about to be read by a warpgroup: bad descriptors, bounds, proxy fences, unwritten bytes,
// races.
void operand_check(Machine* m, Warp* leader, u64 desc, Role role, u32 extent, u32 type, u32 mn_major, u32 ticket);
void operand_cache_free(Machine* m);

// ---- wgmma_math.c
// D (+)= A B for one warp: its 16 rows of A, all of B. a: [k][2][32], the value that lane l multiplies for row l / 4 (+
// 8).
void wgmma_multiply(Machine* m, Warp* w, const WgmmaShape* s, const f32 (*a)[2][32], const f32* b, bool accumulate);
void wgmma_spread_a(const f32* rows, u32 stride, u32 k, bool negate, f32 (*a)[2][32]);
void wgmma_registers_a(const Warp* w, const WgmmaShape* s, f32 (*a)[2][32]);

// ---- wgmma.c: queue and registers in flight
// Called before an instruction that touches registers a wgmma may own. True if the instruction (a pure move) was put
// into the queue.
bool wgmma_register_access(Machine* m, Warp* w, const Ins* I, u32 mask);
void wgmma_at_exit(Machine* m, Warp* w);
#endif
