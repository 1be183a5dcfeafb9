# SPDX-License-Identifier: Apache-2.0
"""Producer role: Q by TMA, K and V by gather, tile by tile. boxes.py has the producers that bring K and V by TMA.

Order of the gather's loads: K_0, then pairs (V_i, K_i+1), because both slots of a pair come free in the same consumer
step, then the last V. With the fence on the producer's side a thread publishes a tile only after waiting for its own
copies of it; the copies of the next tile are already in flight then. The list's partial tile comes last, so that the
softmax reference comes from a full tile; only the first and the last tile pay for predicated copies.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from .gather import Gather
from .ptx import unsigned_divmod
from .scheduler import Walker
from .spec import ELEMENT_BYTES, WARP_ROWS, WGMMA_ROWS


class Loader(Walker):
    """What every producer does: walk the work items and load Q. A subclass adds ``load_item``."""

    def __init__(self, spec, scheduler, pipes, thread, warp):
        self.spec = spec
        self.scheduler = scheduler
        self.thread, self.warp = thread, warp
        self.pipe_q, *self.pipes = pipes
        self.pipe_k, self.pipe_v = self.pipes

    def bind_q(self, tma_q, mQ, sQ):
        self.tma_q, self.mQ, self.sQ = tma_q, mQ, sQ

    @cute.jit
    def take(self, index: Int32, tiles: Int32, items: Int32):
        """tiles and items count what this producer has put into the pipes."""
        work = self.scheduler.fetch(index)
        if work.num_keys > 0:
            tiles = self.load_item(work, tiles, items)
            items += 1
        return tiles, items

    def head_kv(self, work, mK: cute.Tensor) -> Int32:
        """The K/V head of a work item. mK: (S, D, H, B)."""
        group_size, _ = unsigned_divmod(self.mQ.shape[2], mK.shape[2])
        return unsigned_divmod(work.head, group_size)[0]

    @cute.jit
    def load_q(self, work, items: Int32):
        """One warp: a 64-row box per consumer warpgroup, or 16-row boxes where the rows are those of several blocks.

        Rows past Sq are zero-filled; rows of the next query block may come along and are never stored.
        """
        spec = self.spec
        self.pipe_q.acquire(items)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.pipe_q.full, spec.tile_m * spec.head_dim * ELEMENT_BYTES)
        box = (spec.q_box_rows, spec.head_dim)
        for i in cutlass.range_constexpr(spec.tile_m // spec.q_box_rows):
            row = self.scheduler.warp_row(work, i * (spec.q_box_rows // WARP_ROWS))
            mQ = cute.domain_offset((row, 0), self.mQ[None, None, work.head, work.batch])
            gQ = cute.local_tile(mQ, box, (0, 0))
            slab, part = divmod(i * spec.q_box_rows, WGMMA_ROWS)
            sQ = cute.local_tile(self.sQ[None, None, slab], box, (part // spec.q_box_rows, 0))
            tQs, tQg = cpasync.tma_partition(
                self.tma_q, 0, cute.make_layout(1), cute.group_modes(sQ, 0, 2), cute.group_modes(gQ, 0, 2)
            )
            cute.copy(self.tma_q, tQg, tQs, tma_bar_ptr=self.pipe_q.full)


class GatherLoader(Loader):
    """Producer of kv_loads gather; those of runs and octets build on it."""

    def __init__(self, spec, *role):
        super().__init__(spec, *role)
        self.gather = Gather(spec)
        self.group = self.gather.group(self.thread)
        # With tiles before the gathered ones, a list's first tile wants more than a tight producer has.
        self.is_tight = spec.kv_loads == "octets" and spec.tight_producer

    def bind_kv(self, k, v, mIds, last_key):
        """k, v: (global tensor (S, D, H, B), shared tiles, bytes from row to row); last_key: Sk - 1."""
        self.k, self.v = k, v
        self.mIds, self.last_key = mIds, last_key

    @cute.jit
    def load_item(self, work, it: Int32, items: Int32) -> Int32:
        """Load everything of one non-empty work item. it: tiles loaded before; items: work items loaded before.

        Returns the new number of tiles.
        """
        mList = cute.make_tensor(self.mIds.iterator + work.list_start, cute.make_layout(1 << 30))
        return self.load_list(work, mList, 0, it, items, False)

    @cute.jit
    def load_list(
        self, work, mList: cute.Tensor, first: Int32, it: Int32, items: Int32, runs: cutlass.Constexpr[bool]
    ) -> Int32:
        """The tiles of an item from its ``first`` on, and Q unless ``items`` is None.

        Arguments and result as for ``load_item``. runs: whether tiles of consecutive keys may come as boxes.
        """
        tile_n = self.spec.tile_n
        last = cute.ceil_div(work.num_keys, tile_n) - 1
        head_kv = self.head_kv(work, self.k[0])
        k = self.side(self.k, head_kv, work.batch)
        v = self.side(self.v, head_kv, work.batch)
        ids = cute.make_rmem_tensor((self.gather.ids_per_thread,), Int32)
        rows = cute.make_rmem_tensor((self.spec.rows_per_thread,), Int32)
        run = self.new_run(work, head_kv) if const_expr(runs) else None

        num_valid = work.num_keys - first * tile_n
        self.read_ids(ids, run, mList, Int32(first))
        self.expand(rows, run, ids, Int32(first), num_valid)
        self.pipe_k.acquire(it)
        if const_expr(self.is_tight):
            self.pipe_v.acquire(it)
        self.copy(0, it, k, rows, run, num_valid, False)
        # From here on the ids of the next tile are read one tile ahead, so that their latency hides behind the copies.
        if const_expr(not self.is_tight):
            self.read_ids(ids, run, mList, cutlass.min(first + 1, last))
        if const_expr(items is not None):
            if self.warp == 0:
                self.load_q(work, items)
        self.publish(self.pipe_k, it, 0)
        if const_expr(not self.is_tight):
            self.pipe_v.acquire(it)
        self.copy(1, it, v, rows, run, num_valid, False)
        if const_expr(self.is_tight):
            self.read_ids(ids, run, mList, cutlass.min(first + 1, last))
        for i in cutlass.range(first + 1, last, unroll=1):
            self.expand(rows, run, ids, i, tile_n)
            self.read_ids(ids, run, mList, i + 1)
            self.load_pair(it, k, v, rows, run, tile_n, True)
            it += 1
        if last > first:
            self.expand(rows, run, ids, last, work.num_keys - last * tile_n)
            self.load_pair(it, k, v, rows, run, work.num_keys - last * tile_n, False)
            it += 1
        self.publish(self.pipe_v, it, 0)
        return it + 1

    @cute.jit
    def read_ids(self, ids: cute.Tensor, run, mList: cute.Tensor, tile: Int32):
        self.gather.load_ids(ids, mList, tile, self.group)
        if const_expr(run is not None):
            run.read_ids(mList, tile)

    @cute.jit
    def expand(self, rows: cute.Tensor, run, ids: cute.Tensor, tile: Int32, num_valid: Int32):
        """Ids read for ``tile`` -> this thread's key rows. num_valid: keys that are left of the list."""
        self.gather.expand(rows, ids, tile, self.group, self.last_key)
        if const_expr(run is not None):
            run.expand(tile, num_valid)

    @cute.jit
    def load_pair(self, it: Int32, k, v, rows: cute.Tensor, run, num_valid: Int32, whole: cutlass.Constexpr[bool]):
        """Copy K and then V of tile ``it + 1``; publish V of tile ``it`` and K of tile ``it + 1`` on the way."""
        self.pipe_k.acquire(it + 1)
        self.copy(0, it + 1, k, rows, run, num_valid, whole)
        self.publish(self.pipe_v, it, 1)
        self.publish(self.pipe_k, it + 1, 0)
        self.pipe_v.acquire(it + 1)
        self.copy(1, it + 1, v, rows, run, num_valid, whole)

    def side(self, operand: tuple, head: Int32, batch: Int32) -> tuple:
        """(shared address, global address, row bytes) of this thread's first chunk of K or V for one work item."""
        mX, sX, row_bytes = operand
        source = mX[None, None, head, batch].iterator.toint() + Int64(self.gather.chunk(self.thread) * 16)
        target = Int32(sX.iterator.toint()) + self.gather.smem_offset(self.thread)
        return target, source, row_bytes

    @cute.jit
    def copy(
        self, which: cutlass.Constexpr[int], i: Int32, side, rows, run, num_valid: Int32, whole: cutlass.Constexpr[bool]
    ):
        """Issue this thread's copies of tile ``i`` of K (which 0) or V (1) and close their group."""
        if const_expr(run is None):
            self.copy_rows(which, i, side, rows, num_valid, whole)
        else:
            if run.first_key() < 0:
                self.copy_rows(which, i, side, rows, num_valid, whole)
            else:
                self.copy_run(which, i, run)
        if const_expr(self.spec.proxy_fence == "producer"):
            cute.arch.cp_async_commit_group()
        else:
            self.pipes[which].arrive_when_copied(i)

    @cute.jit
    def copy_rows(self, which: cutlass.Constexpr[int], i: Int32, side, rows, num_valid, whole: cutlass.Constexpr[bool]):
        target, source, row_bytes = side
        target = target + self.pipes[which].slot(i) * (self.spec.tile_n * self.spec.head_dim * ELEMENT_BYTES)
        self.gather.copy_tile(target, source, row_bytes, rows, self.group, num_valid, whole)

    @cute.jit
    def publish(self, pipe, i: Int32, in_flight: cutlass.Constexpr[int]):
        """Make this thread's part of tile ``i`` visible to WGMMA, leaving ``in_flight`` younger groups of copies alone.

        cp.async writes through the generic proxy and WGMMA reads through the async one, so the PTX ISA (Async proxy)
        asks for a proxy fence between the completed copies and the arrival.
        """
        if const_expr(self.spec.proxy_fence == "producer"):
            cute.arch.cp_async_wait_group(in_flight)
            cute.arch.fence_view_async_shared()
            pipe.arrive(i)
