# SPDX-License-Identifier: Apache-2.0
"""K and V by TMA: segments of 8 keys or more as boxes, and whole tiles of consecutive keys.

A copy of 16 bytes takes an issue slot from the consumers, and a box of kilobytes takes no more. Boxes of 8 keys are
five-dimensional (the elements of an atom's row, 8 rows, the atoms of a row) and land contiguously in a tile whose 8-row
groups hold all of D; larger ones span the rows of one atom, in the layout that the gather uses. Keys outside the
sequence arrive as zeros (PTX ISA: cp.async.bulk.tensor, out of bound access), which is what the list's tail needs.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from .loader import GatherLoader, Loader
from .ptx import unsigned_divmod
from .smem import swizzle_atom
from .spec import ELEMENT_BYTES

NEARLY_FULL = 8  # a list is nearly full if it leaves out at most a ninth of the segments between its ends


def make_box_atom(spec, mX: cute.Tensor) -> tuple:
    """(TMA atom, coordinate tensor (S, (E, A), H, B)) of one box, from mX (S, D, H, B).

    E: elements of a swizzle atom's row. A: atoms of a row.
    """
    elements = spec.swizzle_bytes // ELEMENT_BYTES
    layout = cute.make_layout(
        (mX.shape[0], (elements, spec.atoms_per_row), mX.shape[2], mX.shape[3]),
        stride=(mX.stride[0], (1, elements), mX.stride[2], mX.stride[3]),
    )
    box = cute.tile_to_shape(swizzle_atom(spec), (spec.box_rows, elements * spec.box_atoms), order=(0, 1))
    return cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(),
        cute.make_tensor(mX.iterator, layout),
        box,
        (spec.box_rows, (elements, spec.box_atoms)),
    )


class Boxes:
    """One operand, K or V: its atom, its tiles in shared memory, and copies of boxes between them."""

    def __init__(self, spec, atom, mX, sX):
        self.spec, self.atom = spec, atom
        self.mX, self.sX = mX, sX

    @cute.jit
    def copy(self, row: Int32, head: Int32, batch: Int32, slot: Int32, box: Int32, barrier):
        """One warp: keys ``row`` to ``row + box_rows - 1`` to place ``box`` of a stage, counted by ``barrier``."""
        spec = self.spec
        elements = spec.swizzle_bytes // ELEMENT_BYTES
        mX = cute.domain_offset((row, (0, 0)), self.mX[None, None, head, batch])
        for part in cutlass.range_constexpr(spec.atoms_per_row // spec.box_atoms):
            gX = cute.local_tile(mX, (spec.box_rows, (elements, spec.box_atoms)), (0, (0, part)))
            shape = (spec.box_rows, elements * spec.box_atoms)
            sX = cute.local_tile(self.sX[None, None, slot], shape, (box, part))
            tXs, tXg = cpasync.tma_partition(
                self.atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
            )
            cute.copy(self.atom, tXg, tXs, tma_bar_ptr=barrier)


class BoxLoader(Loader):
    """Producer of kv_loads boxes: each warp issues every ``box_warps``-th box of a tile, K and V in turn."""

    def bind_kv(self, k, v, mIds):
        """k, v: Boxes."""
        self.k, self.v, self.mIds = k, v, mIds
        self.mine = self.spec.boxes_per_tile // self.spec.box_warps

    @cute.jit
    def load_item(self, work, it: Int32, items: Int32) -> Int32:
        """As Loader.load_item. Ids are read one tile ahead."""
        spec = self.spec
        head_kv, seqlen_k = self.head_kv(work, self.k.mX), self.k.mX.shape[0]
        mList = cute.make_tensor(self.mIds.iterator + work.list_start, cute.make_layout(1 << 30))
        tiles = cute.ceil_div(work.num_keys, spec.tile_n)
        if self.warp == 0:
            self.load_q(work, items)
        ids = cute.make_rmem_tensor((self.mine,), Int32)
        rows = cute.make_rmem_tensor((self.mine,), Int32)
        if self.warp < spec.box_warps:
            self.read_ids(ids, mList, Int32(0))
            for tile in cutlass.range(tiles, unroll=1):
                self.expand(rows, ids, tile, work.num_keys, seqlen_k)
                self.read_ids(ids, mList, cutlass.min(tile + 1, tiles - 1))
                self.load_tile(self.pipe_k, it + tile, self.k, rows, head_kv, work.batch)
                self.load_tile(self.pipe_v, it + tile, self.v, rows, head_kv, work.batch)
        return it + tiles

    @cute.jit
    def load_tile(self, pipe, i: Int32, boxes, rows: cute.Tensor, head: Int32, batch: Int32):
        """This warp's boxes of tile ``i``."""
        spec = self.spec
        pipe.acquire(i)
        slot = pipe.slot(i)
        pipe.arrive_and_expect(i, self.mine * spec.box_rows * spec.head_dim * ELEMENT_BYTES)
        for j in cutlass.range_constexpr(self.mine):
            boxes.copy(rows[j], head, batch, slot, self.warp + j * spec.box_warps, pipe.full + slot)

    @cute.jit
    def segment(self, tile: Int32, j: cutlass.Constexpr[int]) -> tuple:
        """(list position of this warp's j-th box, its segment's place in the list, key inside the segment)."""
        spec = self.spec
        position = tile * spec.tile_n + (self.warp + j * spec.box_warps) * spec.box_rows
        place, within = unsigned_divmod(position, spec.slice_n)
        return position, place, within

    @cute.jit
    def read_ids(self, ids: cute.Tensor, mList: cute.Tensor, tile: Int32):
        for j in cutlass.range_constexpr(self.mine):
            _, place, _ = self.segment(tile, j)
            ids[j] = mList[place]

    @cute.jit
    def expand(self, rows: cute.Tensor, ids: cute.Tensor, tile: Int32, num_keys: Int32, seqlen_k: Int32):
        """Ids -> first key of each box; past the list's end a key outside the sequence, which reads nothing."""
        for j in cutlass.range_constexpr(self.mine):
            position, _, within = self.segment(tile, j)
            row = ids[j] * self.spec.slice_n + within
            rows[j] = row if position < num_keys else seqlen_k


class Run:
    """The tile that a producer is at: its keys are consecutive if its ends are as far apart in the sequence as in the
    list, which ascends."""

    def __init__(self, spec, head_kv, batch):
        self.spec = spec
        # One register instead of two, which spilled.
        self.place = head_kv | batch << 16 if spec.tight_producer else (head_kv, batch)
        self.ends = cute.make_rmem_tensor((2,), Int32)  # the tile's first and last segment, read ahead
        self.key = cute.make_rmem_tensor((1,), Int32)

    @property
    def head_kv(self) -> Int32:
        return self.place & 0xFFFF if self.spec.tight_producer else self.place[0]

    @property
    def batch(self) -> Int32:
        return self.place >> 16 if self.spec.tight_producer else self.place[1]

    def first_key(self) -> Int32:
        """Of the tile, or -1 where its keys are not consecutive."""
        return self.key[0]

    def places(self, tile: Int32) -> tuple:
        """Places in the list of the first and the last segment of a tile, and the first key inside the first."""
        tile_n, slice_n = self.spec.tile_n, self.spec.slice_n
        first, within = unsigned_divmod(tile * tile_n, slice_n)
        return first, unsigned_divmod(tile * tile_n + (tile_n - 1), slice_n)[0], within

    @cute.jit
    def read_ids(self, mList: cute.Tensor, tile: Int32):
        first, last, _ = self.places(tile)
        self.ends[0], self.ends[1] = mList[first], mList[last]

    @cute.jit
    def expand(self, tile: Int32, num_valid: Int32):
        first, last, within = self.places(tile)
        consecutive = (self.ends[1] - self.ends[0] == last - first) & (num_valid >= self.spec.tile_n)
        self.key[0] = self.ends[0] * self.spec.slice_n + within if consecutive else Int32(-1)


class RunLoader(GatherLoader):
    """Producer of kv_loads runs. In lists that are nearly full, a tile of consecutive keys comes as one box.

    Every thread arrives for every tile, so that the barriers' counts do not depend on how it came; a box adds its
    transaction bytes and leaves the threads' groups of copies empty. Other lists take the gather's own loop: asked for
    every tile, the question costs a list of scattered keys 7 % at M = 192 (H200).
    """

    def bind_boxes(self, k, v):
        """k, v: Boxes."""
        self.boxes = (k, v)

    @cute.jit
    def load_item(self, work, it: Int32, items: Int32) -> Int32:
        mList = cute.make_tensor(self.mIds.iterator + work.list_start, cute.make_layout(1 << 30))
        segments = cute.ceil_div(work.num_keys, self.spec.slice_n)
        span = mList[segments - 1] - mList[0] + 1
        if span - segments <= segments // NEARLY_FULL:
            it = self.load_list(work, mList, 0, it, items, True)
        else:
            it = self.load_list(work, mList, 0, it, items, False)
        return it

    def new_run(self, work, head_kv: Int32) -> Run:
        return Run(self.spec, head_kv, work.batch)

    @cute.jit
    def copy_run(self, which: cutlass.Constexpr[int], i: Int32, run):
        """The tile by TMA, issued by one warp."""
        if self.warp == 0:
            self.issue_run(which, i, run.key[0], run.head_kv, run.batch)

    @cute.jit
    def issue_run(self, which: cutlass.Constexpr[int], i: Int32, key: Int32, head_kv: Int32, batch: Int32):
        pipe = self.pipes[which]
        pipe.expect(i, self.spec.tile_n * self.spec.head_dim * ELEMENT_BYTES)
        self.boxes[which].copy(key, head_kv, batch, pipe.slot(i), Int32(0), pipe.full + pipe.slot(i))
