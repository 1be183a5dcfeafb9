// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies: TMA tiles, bulk copies, cp.async. When they take effect is decided by the launch (enum
// Completion).
#ifndef FGE_ASYNC_H
#define FGE_ASYNC_H
#include "machine.h"

// Completes one TMA or bulk load: the oldest, the newest or a random one. False if none is under way.
bool tma_complete_one(Machine* m);
void tma_at_exit(Machine* m);
void bulk_at_exit(Machine* m, Warp* w);
bool cp_async_complete_one(Machine* m, Warp* w);
void cp_async_at_exit(Machine* m, Warp* w);
#endif
