// SPDX-License-Identifier: Apache-2.0
// Tensor maps (PTX ISA 5.5.8). The 128-byte object is opaque in the ISA; this is the layout that the DSL's host code
// writes, found from dumps of nvidia-cutlass-dsl 4.8. 32-bit words:
//   0-1 address; 2: bits 0-3 = 2, 4-6 rank - 1, 7-10 element type, 11-12 interleave, 13-15 swizzle (0 none, 1 32B, 2
//   64B, 3 128B), 16-31 flags; 3-6 strides of dimensions 1-4 in 16 bytes (low 32 bits), 7 their upper 4 bits each; 8-12
//   dimensions - 1; 13: byte 3 = box[0] - 1, low bytes = element strides - 1; 14: bytes 0-3 = box[1..4] - 1.
#ifndef FGE_TENSOR_MAP_H
#define FGE_TENSOR_MAP_H
#include "machine.h"

enum ElementType {
  TM_U8,
  TM_U16,
  TM_U32,
  TM_S32,
  TM_U64,
  TM_S64,
  TM_F16,
  TM_F32,
  TM_F32_FTZ,
  TM_F64,
  TM_BF16,
  TM_TF32,
  TM_TF32_FTZ
};
enum Reduction { REDUCE_NONE, REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, REDUCE_AND, REDUCE_OR, REDUCE_XOR };

typedef struct {
  u64 address, dim[5], stride[4];  // stride[i]: bytes between elements of dimension i + 1
  u32 box[5], type, rank, swizzle, element_bytes;
} TensorMap;

u32 element_bytes(u32 type);  // 0: unknown type
// Reads the tensor map at a (parameter or global) address; fails on one the hardware would refuse.
TensorMap read_tensor_map(Machine* m, u64 address);
u32 tile_bytes(const TensorMap* t);
void reduce_element(Machine* m, u32 reduction, u32 type, u8* into, const u8* value);
#endif
