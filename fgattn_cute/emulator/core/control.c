// SPDX-License-Identifier: Apache-2.0
// Control flow, fences and setmaxnreg (PTX ISA 9.7.12, 9.7.13.4, 9.7.19.5).
#include "lanes.h"

HANDLER(BRA) {  // imm: target
  u32 target = (u32)I->imm;
  if (mask == m->fragment->mask) {
    m->fragment->pc = target;
    return FLOW_JUMP;
  }
  return split_fragment(m, w, mask, target);
}
HANDLER(EXIT) {
  UNUSED(I);
  w->alive &= ~mask;
  m->fragment->mask &= ~mask;
  m->progress++;
  if (m->fragment->mask) return FLOW_NEXT;
  drop_fragment(w, m->fragment);
  return FLOW_LEAVE;
}
HANDLER(TRAP) {
  UNUSED(w)
  , UNUSED(I)
  , UNUSED(mask);
  fail(m, KIND_TRAP, "trap executed");
}
HANDLER(UNSUPPORTED) {
  UNUSED(w)
  , UNUSED(I)
  , UNUSED(mask);
  fail(m, KIND_UNSUPPORTED, "the emulator does not know this instruction");
}
HANDLER(YIELD) {  // nanosleep
  UNUSED(I)
  , UNUSED(mask);
  w->yielded = true;
  m->fragment->pc++;
  return FLOW_LEAVE;
}

HANDLER(FENCE_PROXY) {  // fence.proxy.async: this warp's generic accesses so far are ordered before later ones of the
                        // async proxy
  UNUSED(I)
  , UNUSED(mask);
  w->proxy_fence = ++m->proxy_time;
  m->proxy_time++;
  return FLOW_NEXT;
}

// setmaxnreg: imm registers per thread. The CTA holds what it was launched with; dec gives registers back to the CTA's
// pool, inc takes from it and waits until there are enough.
HANDLER(SETMAXNREG) {
  u32 wanted = (u32)I->imm;
  if (!converged(m, w, FULL)) return FLOW_LEAVE;
  UNUSED(mask);
  if (wanted < 24 || wanted > 256 || wanted % 8)
    fail(m, KIND_REGISTERS, "setmaxnreg %u: must be a multiple of 8 from 24 to 256", wanted);
  u32* per_warp = (u32*)m->launch->warp_registers;
  if (per_warp) __atomic_store_n(&per_warp[w->id], wanted, __ATOMIC_RELAXED);
  if (!(m->checks & CHECK_SETMAXNREG) || !w->registers) return FLOW_NEXT;
  if (wanted <= w->registers) {  // also an inc of a warp that was launched with more: it ends up with what it names
    w->cta->register_pool += (w->registers - wanted) * 32;
    w->registers = wanted;
    m->progress++;
    return FLOW_NEXT;
  }
  u32 needed = (wanted - w->registers) * 32;
  if (needed > w->cta->register_pool) {
    block(m, WAIT_REGISTERS, wanted, 0);
    return FLOW_LEAVE;
  }
  w->cta->register_pool -= needed;
  w->registers = wanted;
  return FLOW_NEXT;
}
