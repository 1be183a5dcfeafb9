// SPDX-License-Identifier: Apache-2.0
// Macros for elementwise handlers: one loop over the 32 lanes of each register slot. The full-warp loop is what
// compilers vectorise.
#ifndef FGE_LANES_H
#define FGE_LANES_H
#include "machine.h"

#define LANES(...)                                                    \
  if (mask == FULL) {                                                 \
    _Pragma("GCC ivdep") for (int l = 0; l < 32; l++) { __VA_ARGS__ } \
  } else {                                                            \
    for (int l = 0; l < 32; l++)                                      \
      if (mask >> l & 1) { __VA_ARGS__ }                              \
  }

#define HANDLER(NAME) Flow op_##NAME(Machine* m, Warp* w, const Ins* I, u32 mask)
#define UNUSED(x) (void)(x)

// d = expression of a (b, c): TD, TA, ... are the C types of the slots.
#define UNARY(NAME, TD, TA, EXPRESSION)      \
  HANDLER(NAME) {                            \
    UNUSED(m);                               \
    TD* D = (TD*)(w->rf + I->d);             \
    const TA* A = (const TA*)(w->rf + I->a); \
    LANES({                                  \
      TA a = A[l];                           \
      D[l] = (TD)(EXPRESSION);               \
    })                                       \
    return FLOW_NEXT;                        \
  }
#define BINARY(NAME, TD, TA, TB, EXPRESSION) \
  HANDLER(NAME) {                            \
    UNUSED(m);                               \
    TD* D = (TD*)(w->rf + I->d);             \
    const TA* A = (const TA*)(w->rf + I->a); \
    const TB* B = (const TB*)(w->rf + I->b); \
    LANES({                                  \
      TA a = A[l];                           \
      TB b = B[l];                           \
      D[l] = (TD)(EXPRESSION);               \
    })                                       \
    return FLOW_NEXT;                        \
  }
#define TERNARY(NAME, TD, TA, TB, TC, EXPRESSION) \
  HANDLER(NAME) {                                 \
    UNUSED(m);                                    \
    TD* D = (TD*)(w->rf + I->d);                  \
    const TA* A = (const TA*)(w->rf + I->a);      \
    const TB* B = (const TB*)(w->rf + I->b);      \
    const TC* C = (const TC*)(w->rf + I->c);      \
    LANES({                                       \
      TA a = A[l];                                \
      TB b = B[l];                                \
      TC c = C[l];                                \
      D[l] = (TD)(EXPRESSION);                    \
    })                                            \
    return FLOW_NEXT;                             \
  }
#endif
