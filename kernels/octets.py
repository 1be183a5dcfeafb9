# SPDX-License-Identifier: Apache-2.0
"""Grouped lists of single keys: aligned runs of 8 keys by TMA, the others by the gather.

A grouped list holds the keys of all its aligned runs (keys 8 g to 8 g + 7, all kept) first, then the rest. Eight list
positions from a multiple of 8 on are then an aligned run exactly if all eights before them are, so that the last eight
of a full tile tell whether the whole tile consists of runs. Such tiles come as boxes of 8 rows. From the first other
tile on, which may hold the last few runs, the list is gathered, into the same layout (``FwdSpec.atoms_first``). Only
the list's partial tile is masked and that one is always gathered, so the consumers need not know how a tile came.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .loader import GatherLoader
from .ptx import unsigned_divmod
from .spec import BOX_ROWS, ELEMENT_BYTES, PRODUCER_WARPS, WARPGROUP_THREADS

SIDE_WARPS = PRODUCER_WARPS // 2  # the first half of the warps brings boxes of K, the other of V


class OctetLoader(GatherLoader):
    """Producer of kv_loads octets.

    For a tile of runs a warp waits for one slot, of K or of V, and arrives once for its share of the threads. It
    therefore follows only one pipe there, yet never falls a phase behind on the other: consumers release K of tile i
    after V of tile i - 2, and there are at least two stages.
    """

    def bind_boxes(self, k, v):
        """k, v: Boxes."""
        self.boxes = (k, v)

    @cute.jit
    def load_item(self, work, it: Int32, items: Int32) -> Int32:
        """As Loader.load_item. Q comes by a warp whose first box is V's, which is wanted last."""
        if self.warp == PRODUCER_WARPS - 1:
            self.load_q(work, items)
        mList = cute.make_tensor(self.mIds.iterator + work.list_start, cute.make_layout(1 << 30))
        tiles = self.load_runs(work, mList, it)
        it += tiles
        if tiles * self.spec.tile_n < work.num_keys:
            it = self.load_list(work, mList, tiles, it, None, False)
        return it

    @cute.jit
    def load_runs(self, work, mList: cute.Tensor, it: Int32) -> Int32:
        """The tiles that consist of runs, whose number is returned.

        The numbers that decide how far the loop goes are read a tile ahead, all by the same address in every thread:
        told by a shuffle they would be no uniform values to the compiler, and the ring's slots and phases, counted on
        from there, would take up registers that the gather needs.
        """
        tile_n = self.spec.tile_n
        full, _ = unsigned_divmod(work.num_keys, tile_n)
        head_kv = self.head_kv(work, self.k[0])
        keys = cute.make_rmem_tensor((self.spec.boxes_per_tile // SIDE_WARPS,), Int32)
        tile = Int32(0)
        first, last = self.last_eight(mList, tile)
        self.read_keys(keys, mList, tile)
        while tile < full and (first % BOX_ROWS == 0) & (last - first == BOX_ROWS - 1):
            following = cutlass.min(tile + 1, full - 1)
            first, last = self.last_eight(mList, following)
            if self.warp < SIDE_WARPS:
                self.load_boxes(0, it + tile, keys, head_kv, work.batch)
            else:
                self.load_boxes(1, it + tile, keys, head_kv, work.batch)
            self.read_keys(keys, mList, following)
            tile += 1
        return tile

    @cute.jit
    def last_eight(self, mList: cute.Tensor, tile: Int32) -> tuple:
        """First and last of a tile's last eight keys."""
        place = tile * self.spec.tile_n + (self.spec.tile_n - BOX_ROWS)
        return mList[place], mList[place + (BOX_ROWS - 1)]

    @cute.jit
    def read_keys(self, keys: cute.Tensor, mList: cute.Tensor, tile: Int32):
        """The first keys of this warp's boxes of a tile; their latency hides behind the wait for a slot."""
        for j in cutlass.range_constexpr(cute.size(keys)):
            keys[j] = mList[tile * self.spec.tile_n + self.box(j) * BOX_ROWS]

    @cute.jit
    def load_boxes(self, which: cutlass.Constexpr[int], i: Int32, keys: cute.Tensor, head_kv: Int32, batch: Int32):
        """This warp's boxes of tile ``i`` of K (which 0) or V (1)."""
        pipe = self.pipes[which]
        pipe.acquire(i)
        slot = pipe.slot(i)
        num_bytes = self.spec.tile_n // SIDE_WARPS * self.spec.head_dim * ELEMENT_BYTES
        pipe.arrive_all_and_expect(i, num_bytes, WARPGROUP_THREADS // SIDE_WARPS)
        for j in cutlass.range_constexpr(cute.size(keys)):
            self.boxes[which].copy(keys[j], head_kv, batch, slot, self.box(j), pipe.full + slot)

    def box(self, j: int) -> Int32:
        """Place in a tile of this warp's j-th box."""
        return self.warp % SIDE_WARPS + j * SIDE_WARPS
