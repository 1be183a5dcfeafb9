// SPDX-License-Identifier: Apache-2.0
// Copies of TMA tiles between global and shared memory.
#ifndef FGE_TILE_H
#define FGE_TILE_H
#include "tensor_map.h"

// One whole tile; coord are element coordinates of its corner, signed. Out-of-bounds elements load as zero and are not
// stored.
void tile_load(Machine* m, Cta* cta, const TensorMap* t, const s32* coord, u32 smem);
void tile_store(Machine* m, Cta* cta, const TensorMap* t, const s32* coord, u32 smem, u32 reduction, u32 pc);
#endif
