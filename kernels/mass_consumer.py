# SPDX-License-Identifier: Apache-2.0
"""What the consumers of the mass kernel share: the walk over the tiles, Q K^T, and each query's log-sum-exp.

Subclasses say what becomes of a tile's scores: ``tile`` runs once per tile and ``batch`` when the scores of a batch of
words are complete.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from .fragments import multiply
from .spec import WARPGROUP_THREADS, WGMMA_ROWS

LOG2_E = math.log2(math.e)
ROWS = 2  # rows of a thread in a 64-row accumulator
BARRIER = 1  # hardware barrier of the consumers; 0 is ``__syncthreads``


class MassConsumer:
    """One consumer thread. lse: log2 of each row's sum of exponentials, +inf for rows that belong to no slice."""

    def __init__(self, spec, route, pipes, mma, sQ, sK, mLSE, thread, scale_log2):
        self.spec, self.route = spec, route
        self.pipe_q, self.pipe_k = pipes
        self.mma, self.mLSE = mma, mLSE
        self.thread = thread
        self.warp = cute.arch.make_warp_uniform(thread // 32)
        self.lane = cute.arch.lane_idx()
        self.quad_lane = self.lane % 4
        warpgroup_index = cute.arch.make_warp_uniform(thread // WARPGROUP_THREADS)
        self.first_row = warpgroup_index * WGMMA_ROWS + self.warp % 4 * 16 + self.lane // 4
        self.scale_log2 = scale_log2
        qk = mma.get_slice(0)
        self.tSrQ = qk.make_fragment_A(qk.partition_A(sQ))[None, None, None, warpgroup_index]
        self.tSrK = qk.make_fragment_B(qk.partition_B(sK))
        self.shape_S = qk.partition_shape_C((WGMMA_ROWS, spec.tile_n))
        self.lse = cute.make_rmem_tensor((ROWS,), Float32)

    @cute.jit
    def run(self):
        """tiles and items count what has been taken from the pipes of K and Q."""
        tiles, items = Int32(0), Int32(0)
        self.start()
        for word in cutlass.range(self.route.first_word, self.route.end_word, self.route.words, unroll=1):
            first, groups = self.route.first_group(word), self.route.groups(word)
            for part in cutlass.range(self.route.parts, unroll=1):
                if self.route.takes_q(word, part):
                    self.pipe_q.wait(items)
                    self.read_lse(part)
                    items += 1
                for group in cutlass.range(groups, unroll=1):
                    for tile in cutlass.range(self.route.group_tiles, unroll=1):
                        acc = self.scores(tiles)
                        self.tile(acc, first, group, tile, part)
                        tiles += 1
                if self.route.parts > 1:
                    self.pipe_q.release(items - 1)
            self.batch(word)
        self.finish()

    @cute.jit
    def scores(self, tiles: Int32) -> cute.Tensor:
        """Q K^T of one tile, in registers."""
        acc = cute.make_rmem_tensor(self.shape_S, Float32)
        self.pipe_k.wait(tiles)
        multiply(self.mma, acc, self.tSrQ, self.tSrK[None, None, None, self.pipe_k.slot(tiles)], True)
        warpgroup.wait_group(0)
        self.pipe_k.release(tiles)
        return acc

    @cute.jit
    def read_lse(self, part: Int32):
        """+inf makes the probability of a row zero whatever its score."""
        mLSE = self.mLSE
        for r in cutlass.range_constexpr(ROWS):
            row = self.route.row(part) + self.first_row + 8 * r
            value = Float32.inf
            if row < self.route.row_end():
                value = mLSE[self.route.batch, self.route.head, row]
            self.lse[r] = value * LOG2_E

    def start(self):
        """Before the first batch."""

    def tile(self, acc: cute.Tensor, first: Int32, group: Int32, tile: Int32, part: Int32):
        """acc: scores of a tile; group counts from ``first``, the first group of the batch."""
        raise NotImplementedError

    def batch(self, word: Int32):
        """After a batch."""

    def finish(self):
        """After the last batch."""

    @cute.jit
    def sync(self):
        """Barrier of all consumers; the producer warp stays out of it."""
        cute.arch.barrier(barrier_id=BARRIER, number_of_threads=WARPGROUP_THREADS * self.spec.consumer_warpgroups)
