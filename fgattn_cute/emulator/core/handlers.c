// SPDX-License-Identifier: Apache-2.0
// The table from opcode to handler.
#include "machine.h"

#define DECLARE(name) Handler op_##name;
FOR_ALL_OPS(DECLARE)

#define ENTRY(name) op_##name,
Handler* const handlers[OP_COUNT] = {FOR_ALL_OPS(ENTRY)};
