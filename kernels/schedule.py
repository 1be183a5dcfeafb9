# SPDX-License-Identifier: Apache-2.0
"""Who does what in a CTA, and every synchronisation edge between them, as data.

::

    warps 0 .. 4w-1   consumers: w warpgroups, 64 query rows each
    warps 4w .. 4w+3  producer:  one warpgroup; its first warp also issues the TMA load of Q

                 Q  (TMA, transaction bytes)
      producer ------------------------------> consumers       release: one lane of each consumer warp
               ---- K[stage] ---------------->                 (Q is released only when the CTA is persistent)
               ---- V[stage] ---------------->
                 cp.async, own copies waited for,
                 proxy fence, 128 arrivals

      consumer warpgroup g --ORDER--> g+1 --> ... --> g        tensor cores handed round (ping_pong)

K and V have barriers of their own, so that K of tile i+1 can land before V of tile i has been consumed.
"""

import enum
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from .ptx import mbarrier_wait, unsigned_divmod
from .spec import WARPGROUP_THREADS


class NamedBarrier(enum.IntEnum):
    """Hardware barrier ids; 0 is ``__syncthreads``. ORDER: one id per consumer warpgroup from here on. LIST: of the
    halves of a union, which have no order."""

    ORDER = LIST = 1


class Edge(NamedTuple):
    """One producer -> consumer channel: ``stages`` slots with a full and an empty mbarrier each."""

    name: str
    stages: int
    full_arrivals: int
    empty_arrivals: int


def edges(spec) -> tuple:
    """The CTA's channels in the order of their barriers in shared memory."""
    consumer_warps = 4 * spec.consumer_warpgroups
    # Every producer thread arrives once its own copies have landed, or every warp with its boxes' transaction bytes.
    copies = spec.box_warps if spec.kv_loads == "boxes" else WARPGROUP_THREADS
    return (
        Edge("q", 1, 1, consumer_warps),
        Edge("k", spec.kv_stages, copies, consumer_warps),
        Edge("v", spec.kv_stages, copies, consumer_warps),
    )


class Pipe:
    """Device side of an ``Edge``: waits and arrivals by the running number ``i`` of the item that passes through."""

    def __init__(self, edge: Edge, barriers, suspend: bool = False):
        self.edge = edge
        self.suspend = suspend
        self.full = barriers
        self.empty = barriers + edge.stages
        # Floor division of a signed number is several instructions, and every warp needs one per tile and barrier.
        stages = edge.stages
        self.shift = stages.bit_length() - 1 if stages & (stages - 1) == 0 else None

    def slot(self, i: Int32):
        return unsigned_divmod(i, self.edge.stages)[1] if self.shift is None else i & (self.edge.stages - 1)

    def phase(self, i: Int32):
        return (unsigned_divmod(i, self.edge.stages)[0] if self.shift is None else i >> self.shift) & 1

    @cute.jit
    def init(self):
        """One thread, before the CTA's first barrier."""
        for s in cutlass.range_constexpr(self.edge.stages):
            cute.arch.mbarrier_init(self.full + s, self.edge.full_arrivals)
            cute.arch.mbarrier_init(self.empty + s, self.edge.empty_arrivals)

    @cute.jit
    def acquire(self, i: Int32):
        """Producer: wait until slot of item ``i`` is free. Passes at once during the first round.

        The producer waits most of its time. Suspended, it takes no issue slots from the consumers (1 % of the M = 128
        kernel on an H200). The suspended form's slow path wants more than 32 registers, and at M = 64 a producer of 32
        registers that spins is 2 to 5 % faster.
        """
        if const_expr(self.suspend):
            cute.arch.mbarrier_wait(self.empty + self.slot(i), self.phase(i) ^ 1)
        else:
            mbarrier_wait((self.empty + self.slot(i)).toint(), self.phase(i) ^ 1)

    @cute.jit
    def wait(self, i: Int32):
        """Consumer: wait until item ``i`` has landed."""
        mbarrier_wait((self.full + self.slot(i)).toint(), self.phase(i))

    @cute.jit
    def arrive(self, i: Int32):
        """Producer: this thread's part of item ``i`` is visible."""
        cute.arch.mbarrier_arrive(self.full + self.slot(i))

    @cute.jit
    def expect(self, i: Int32, num_bytes: cutlass.Constexpr[int]):
        """Producer warp: TMA will bring ``num_bytes`` more for item ``i``; not an arrival."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_expect_tx(self.full + self.slot(i), num_bytes)

    @cute.jit
    def arrive_and_expect(self, i: Int32, num_bytes: cutlass.Constexpr[int]):
        """Producer warp: one arrival, complete when TMA has brought ``num_bytes`` for item ``i``."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full + self.slot(i), num_bytes)

    @cute.jit
    def arrive_all_and_expect(self, i: Int32, num_bytes: cutlass.Constexpr[int], arrivals: cutlass.Constexpr[int]):
        """As ``arrive_and_expect``, for so many threads at once (PTX ISA: mbarrier.arrive, count)."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_expect_tx(self.full + self.slot(i), num_bytes)
            cute.arch.mbarrier_arrive(self.full + self.slot(i), arrive_count=arrivals)

    @cute.jit
    def arrive_when_copied(self, i: Int32):
        """Producer: arrive for this thread once its earlier cp.async have landed (no fence included)."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + self.slot(i))

    @cute.jit
    def release(self, i: Int32, arrivals=1):
        """Consumer warp: item ``i`` has been read. arrivals: more than one for warps that do not read it as well."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty + self.slot(i), arrive_count=arrivals)


def make_pipes(spec, barriers) -> tuple:
    """(Q, K, V) pipes over consecutive mbarriers."""
    pipes = []
    for edge in edges(spec):
        pipes.append(Pipe(edge, barriers, suspend=spec.producer_registers > 32))
        barriers = barriers + 2 * edge.stages
    return tuple(pipes)


class TensorCoreOrder:
    """Ping-pong: consumer warpgroups take turns to issue their WGMMAs, so one's softmax runs under another's products.

    Measured on an H200 with fixed_ref at M = 192: 3 to 5 %; with the exact softmax it costs 2 %.
    """

    def __init__(self, spec):
        self.enabled = spec.ping_pong
        self.warpgroups = spec.consumer_warpgroups

    @cute.jit
    def start(self, warpgroup: Int32):
        if const_expr(self.enabled):
            if warpgroup == 0:
                cute.arch.barrier_arrive(barrier_id=int(NamedBarrier.ORDER), number_of_threads=2 * WARPGROUP_THREADS)

    @cute.jit
    def wait_turn(self, warpgroup: Int32):
        if const_expr(self.enabled):
            cute.arch.barrier(barrier_id=int(NamedBarrier.ORDER) + warpgroup, number_of_threads=2 * WARPGROUP_THREADS)

    @cute.jit
    def pass_on(self, warpgroup: Int32):
        if const_expr(self.enabled):
            if const_expr(self.warpgroups == 2):
                following = 1 - warpgroup
            else:
                following = (warpgroup + 1) % self.warpgroups
            cute.arch.barrier_arrive(
                barrier_id=int(NamedBarrier.ORDER) + following, number_of_threads=2 * WARPGROUP_THREADS
            )
