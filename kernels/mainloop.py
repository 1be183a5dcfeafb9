# SPDX-License-Identifier: Apache-2.0
"""Consumer role: S = Q K^T, softmax, O += P V over the packed tiles of a list.

Q K^T of tile i+1 and P V of tile i are in flight together; the softmax of tile i+1 runs under P V of tile i::

    QK 0 | softmax 0 | QK 1, PV 0 | softmax 1 | ... | QK t, PV t-1 | mask, softmax t | PV t

Tile 0 and the last tile t stand outside the loop: tile 0 sets the softmax reference, tile t alone is masked.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from .fragments import as_operand_a, convert, multiply
from .halves import Halves
from .masking import KeepBits, TailMask
from .parts import Parts
from .schedule import TensorCoreOrder
from .smem import element_type
from .softmax import Softmax
from .spec import WGMMA_ROWS


class Mainloop:
    """One consumer thread: fragments of its warpgroup's 64 rows. ``acc_O`` and ``softmax`` are the result."""

    def __init__(self, spec, mma_qk, mma_pv, sQ, sK, sV, pipes, mMembers, thread, warpgroup_index, scale_log2):
        self.spec = spec
        self.mma_qk, self.mma_pv = mma_qk, mma_pv
        self.pipe_q, self.pipe_k, self.pipe_v = pipes
        self.order = TensorCoreOrder(spec)
        self.thread, self.warpgroup_index = thread, warpgroup_index
        self.scale_log2 = scale_log2
        self.sQ = sQ
        self.dtype = element_type(spec)
        self.tail_mask = TailMask(spec)
        qk, pv = mma_qk.get_slice(0), mma_pv.get_slice(0)
        sVt = cute.composition(
            sV, cute.make_ordered_layout((spec.head_dim, spec.tile_n, spec.kv_stages), order=(1, 0, 2))
        )
        if const_expr(spec.q_source == "registers"):
            self.tSrQ = qk.make_fragment_A(qk.partition_shape_A((WGMMA_ROWS, spec.head_dim)))
        else:
            self.tSrQ = qk.make_fragment_A(qk.partition_A(sQ))[None, None, None, warpgroup_index]
        self.tSrK = qk.make_fragment_B(qk.partition_B(sK))
        self.tOrV = pv.make_fragment_B(pv.partition_B(sVt))
        self.shape_S = qk.partition_shape_C((WGMMA_ROWS, spec.tile_n))
        self.tOrP = pv.make_fragment_A(pv.partition_shape_A((WGMMA_ROWS, spec.tile_n)))
        self.acc_O = cute.make_rmem_tensor(pv.partition_shape_C((WGMMA_ROWS, spec.head_dim)), Float32)
        # Of shared lists: which tiles are this warpgroup's, and which of their keys.
        self.parts = self.halves = self.keep = None
        if const_expr(spec.parts):
            self.parts = Parts(spec, pipes, self.order, mMembers, thread, warpgroup_index)
        elif const_expr(spec.halves):
            self.parts = self.halves = Halves(spec, mMembers, thread, warpgroup_index)
        if const_expr(spec.keep_bits):
            self.keep = KeepBits(spec, mMembers, thread, warpgroup_index, self.halves)
        self.softmax = Softmax(spec, scale_log2, self.keep)

    @cute.jit
    def reset(self):
        """Before a work item: what an empty list leaves behind."""
        self.acc_O.fill(0.0)
        self.softmax.reset()

    @cute.jit
    def attend(self, work, it: Int32, items: Int32) -> Int32:
        """Attend to the list of a work item, of one key or more. it: tiles, items: work items consumed before.

        Returns the new number of tiles.
        """
        if const_expr(self.parts is None):
            it = self.attend_list(work, work, it, items)
        else:
            share = self.parts.start(work, it)
            if share.num_keys > 0:
                it = self.attend_list(work, share, it, items)
            else:
                self.pipe_q.wait(items)
                if const_expr(self.spec.stages_output):
                    self.pipe_q.release(items)
            it = self.parts.finish(share, it)
        return it

    @cute.jit
    def attend_list(self, work, share, it: Int32, items: Int32) -> Int32:
        """As ``attend``. share: of the list, what this warpgroup attends to: all of it, or what ``Parts`` says."""
        tile_n = self.spec.tile_n
        num_keys = share.num_keys
        last = cute.ceil_div(num_keys, tile_n) - 1
        if const_expr(self.keep is not None):
            self.keep.start(work.first, work.list_start)
        self.pipe_q.wait(items)
        self.read_q()

        it = self.own_tile(share, it, Int32(0))
        self.wait_tile(self.pipe_k, it)
        acc_S = self.new_scores()
        multiply(self.mma_qk, acc_S, self.tSrQ, self.tSrK[None, None, None, self.pipe_k.slot(it)], True)
        warpgroup.wait_group(0)
        self.pipe_k.release(it, self.arrivals(0))
        self.tail_mask.apply(acc_S, num_keys, self.thread)
        if const_expr(self.keep is not None):
            self.keep.advance(cutlass.min(1, last))
        self.softmax.first_tile(acc_S)
        self.store_p(acc_S)

        for i in cutlass.range(1, last, unroll=1):
            following = self.own_tile(share, it + 1, i)
            self.step(it, following, i, last, tile_n, False)
            it = following
        if last > 0:
            following = self.own_tile(share, it + 1, last)
            self.step(it, following, last, last, num_keys - last * tile_n, True)
            it = following

        if const_expr(self.spec.stages_output):
            self.pipe_q.release(items)
        self.wait_tile(self.pipe_v, it)
        self.multiply_v(it)
        warpgroup.wait_group(0)
        self.pipe_v.release(it, self.arrivals(0))
        return it + 1

    @cute.jit
    def own_tile(self, share, it: Int32, tile: Int32) -> Int32:
        """Where in the pipes this warpgroup's ``tile``-th is, which is ``it`` unless tiles of others come first."""
        if const_expr(self.parts is not None):
            it = self.parts.skip(share, it, tile)
        return it

    @cute.jit
    def step(
        self,
        it: Int32,
        following: Int32,
        tile: Int32,
        last: Int32,
        num_valid: Int32,
        is_tail: cutlass.Constexpr[bool],
    ):
        """Q K^T and softmax of tile ``following``, P V of tile ``it``. tile: number in the list of the former."""
        if const_expr(self.softmax.fixed):
            self.softmax.guard(self.acc_O, self.tOrP)
        self.wait_tile(self.pipe_k, following)
        acc_S = self.new_scores()
        self.order.wait_turn(self.warpgroup_index)
        multiply(self.mma_qk, acc_S, self.tSrQ, self.tSrK[None, None, None, self.pipe_k.slot(following)], True)
        self.wait_tile(self.pipe_v, it)
        self.multiply_v(it)
        self.order.pass_on(self.warpgroup_index)
        warpgroup.wait_group(1)
        self.pipe_k.release(following, self.arrivals(0))
        if const_expr(is_tail):
            self.tail_mask.apply(acc_S, num_valid, self.thread)
        if const_expr(self.keep is not None):
            self.keep.advance(cutlass.min(tile + 1, last))
        self.softmax.next_tile(acc_S)
        warpgroup.wait_group(0)
        self.pipe_v.release(it, self.arrivals(1))
        self.store_p(acc_S)
        if const_expr(not self.softmax.fixed):
            self.softmax.rescale_output(self.acc_O)

    def arrivals(self, before: int):
        """Arrivals by which a warp releases the tile at hand, or the one before it."""
        return 1 if self.halves is None else self.halves.arrivals[before]

    @cute.jit
    def wait_tile(self, pipe, i: Int32):
        """Wait until tile ``i`` of K or V has landed and WGMMA may read it."""
        pipe.wait(i)
        if const_expr(self.spec.proxy_fence == "consumer"):
            cute.arch.fence_view_async_shared()

    @cute.jit
    def multiply_v(self, it: Int32):
        multiply(self.mma_pv, self.acc_O, self.tOrP, self.tOrV[None, None, None, self.pipe_v.slot(it)], False)

    @cute.jit
    def read_q(self):
        """Q slab -> registers, where the spec holds it there (less shared-memory traffic per product)."""
        if const_expr(self.spec.q_source == "registers"):
            atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
            copy = cute.make_tiled_copy_A(atom, self.mma_qk).get_slice(self.thread)
            slab = self.sQ[None, None, self.warpgroup_index]
            cute.copy(atom, copy.partition_S(slab), copy.retile(self.tSrQ))

    def new_scores(self):
        return cute.make_rmem_tensor(self.shape_S, Float32)

    @cute.jit
    def store_p(self, acc_S: cute.Tensor):
        convert(as_operand_a(acc_S), self.tOrP, self.dtype)
