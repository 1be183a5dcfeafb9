// SPDX-License-Identifier: Apache-2.0
// Warp-wide instructions: elect, shuffles, votes, match, reductions (PTX ISA 9.7.9.6, 9.7.13.14 and following).
#include <string.h>
#include "lanes.h"
#include "numeric.h"

u32 uniform32(Machine* m, const u32* values, u32 mask, const char* what) {
  u32 v = values[first_lane(mask)];
  FOR_LANES(mask, l) {
    if (values[l] != v)
      fail_at(m, KIND_LAUNCH, (int)l, 0, "%s differs between the lanes of a warp (%#x and %#x)", what, v, values[l]);
  }
  return v;
}

// The member mask of a .sync instruction; the executing lanes must be in it.
static u32 members(Machine* m, Warp* w, u32 offset, u32 mask) {
  u32 named = reg32(w, offset)[first_lane(mask)];
  if (mask & ~named)
    fail_at(m, KIND_LAUNCH, first_lane(mask & ~named), 0,
            "lanes %08x execute a .sync instruction whose member mask is %08x", mask, named);
  return named;
}

HANDLER(ELECT) {  // a member mask; d elected lane or NONE, e predicate or NONE. The lowest lane is elected.
  u32 named = members(m, w, I->a, mask);
  if (!converged(m, w, named)) return FLOW_LEAVE;
  u32 leader = (u32)first_lane(named & mask);
  if (I->d != NONE) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = leader; })
  }
  if (I->e != NONE) set_pred(w, I->e, mask, 1u << leader);
  return FLOW_NEXT;
}

HANDLER(
    SHFL) {  // x: 0 idx 1 up 2 down 3 bfly; a value, b lane, c clamp and segment mask; aux: member mask; e predicate
  u32 named = members(m, w, m->aux[I->aux], mask);
  if (!converged(m, w, named)) return FLOW_LEAVE;
  u32 active = m->fragment->mask;
  const u32 *A = reg32(w, I->a), *B = reg32(w, I->b), *C = reg32(w, I->c);
  u32 result[32], in_range = 0;
  for (int l = 0; l < 32; l++) {
    int segment = C[l] >> 8 & 31, clamp = C[l] & 31, lane = B[l] & 31;
    int max_lane = (l & segment) | (clamp & ~segment), min_lane = l & segment, j;
    bool ok;
    switch (I->x) {
      case 1: j = l - lane, ok = j >= max_lane; break;
      case 2: j = l + lane, ok = j <= max_lane; break;
      case 3: j = l ^ lane, ok = j <= max_lane; break;
      default: j = min_lane | (lane & ~segment), ok = j <= max_lane;
    }
    if (!ok) j = l;
    if ((mask >> l & 1) && !((active & named) >> (j & 31) & 1))
      fail_at(m, KIND_LAUNCH, l, 0, "shfl.sync: lane %d reads lane %d, which does not take part", l, j);
    result[l] = A[j & 31];
    in_range |= (u32)ok << l;
  }
  if (I->d != NONE) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = result[l]; })
  }
  if (I->e != NONE) set_pred(w, I->e, mask, in_range);
  return FLOW_NEXT;
}

HANDLER(VOTE) {  // x: 0 all 1 any 2 uni 3 ballot, bit 4 negates; a predicate, b member mask
  u32 named = members(m, w, I->b, mask);
  if (!converged(m, w, named)) return FLOW_LEAVE;
  u32 voters = named & m->fragment->mask, p = *pred(w, I->a), mode = I->x & 15;
  if (I->x & 16) p = ~p;
  p &= voters;
  if (mode == 3) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = p; })
    return FLOW_NEXT;
  }
  bool v = mode == 0 ? p == voters : mode == 1 ? p != 0 : p == voters || p == 0;
  set_pred(w, I->d, mask, v ? FULL : 0);
  return FLOW_NEXT;
}

HANDLER(MATCH) {  // x bit 0: 64 bits, bit 1: .all (d mask or 0, e predicate); b member mask
  u32 named = members(m, w, I->b, mask);
  if (!converged(m, w, named)) return FLOW_LEAVE;
  u32 voters = named & m->fragment->mask, result[32];
  for (int l = 0; l < 32; l++) {
    result[l] = 0;
    FOR_LANES(voters, j) {
      bool same = I->x & 1 ? reg64(w, I->a)[l] == reg64(w, I->a)[j] : reg32(w, I->a)[l] == reg32(w, I->a)[j];
      result[l] |= (u32)same << j;
    }
    if ((I->x & 2) && result[l] != voters) result[l] = 0;
  }
  if (I->d != NONE) {
    u32* D = reg32(w, I->d);
    LANES({ D[l] = result[l]; })
  }
  if (I->e != NONE) set_pred(w, I->e, mask, result[first_lane(mask)] ? FULL : 0);
  return FLOW_NEXT;
}

HANDLER(ACTIVEMASK) {
  u32* D = reg32(w, I->d);
  u32 active = m->fragment->mask;
  LANES({ D[l] = active; })
  return FLOW_NEXT;
}

HANDLER(REDUX) {  // x: 0 add 1 min.s 2 max.s 3 min.u 4 max.u 5 and 6 or 7 xor; a value, b member mask
  u32 named = members(m, w, I->b, mask);
  if (!converged(m, w, named)) return FLOW_LEAVE;
  u32 voters = named & m->fragment->mask;
  const u32* A = reg32(w, I->a);
  u32 v = A[first_lane(voters)];
  FOR_LANES(voters & (voters - 1), l) {
    u32 a = A[l];
    switch (I->x) {
      case 0: v += a; break;
      case 1: v = (s32)a < (s32)v ? a : v; break;
      case 2: v = (s32)a > (s32)v ? a : v; break;
      case 3: v = a < v ? a : v; break;
      case 4: v = a > v ? a : v; break;
      case 5: v &= a; break;
      case 6: v |= a; break;
      default: v ^= a;
    }
  }
  u32* D = reg32(w, I->d);
  LANES({ D[l] = v; })
  return FLOW_NEXT;
}

HANDLER(WARPSYNC) {
  u32 named = members(m, w, I->a, mask);
  return converged(m, w, named) ? FLOW_NEXT : FLOW_LEAVE;
}
