# SPDX-License-Identifier: Apache-2.0
"""Lists in parts: some tiles are for every warpgroup of a CTA, others for two of three, the rest for one each.

The tiles of a list of the blocks A, B and C, of which A keeps more::

    ABC | AB | AC | BC | A | B | C | ABC | AB | AC | BC | A | B | C | A

Tiles of one's own stand beside those of others, because warpgroups that took turns by parts would leave the tensor
cores to one alone. The plan says at which places of the list a warpgroup's tiles are. All are full but the last that
the warpgroup takes, so for it the list is one like any other.

A tile of others is passed over: waited for and released. An arrival before it is full would count for the tile that
held the slot before.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from .spec import PARTS_AHEAD, PARTS_KEYS, PARTS_PLACES, PARTS_ROUNDS


class Share:
    """What one warpgroup takes of a list: its keys. end: tiles of the list; rounds: those of whoever takes most."""

    def __init__(self, union, num_keys, rounds, end):
        self.union, self.num_keys, self.rounds, self.end = union, num_keys, rounds, end


class Parts:
    """One consumer warp's walk through lists in parts."""

    def __init__(self, spec, pipes, order, mMembers, thread, warpgroup_index):
        self.spec = spec
        self.order = order
        _, self.pipe_k, self.pipe_v = pipes
        self.mMembers = mMembers  # (unions, union_blocks, PARTS_PLACES + places)
        self.warpgroup_index = warpgroup_index
        self.quad_lane = thread % PARTS_AHEAD
        self.base = cute.make_rmem_tensor((1,), Int32)  # tiles before the list
        self.ahead = cute.make_rmem_tensor((1,), Int32)

    @cute.jit
    def start(self, work, it: Int32) -> Share:
        """Begin a list at tile ``it``; reads its first place ahead."""
        self.base[0] = it
        self.read_ahead(work.first, Int32(0))
        row = self.mMembers[work.first, self.warpgroup_index, None]
        return Share(work.first, row[PARTS_KEYS], row[PARTS_ROUNDS], work.num_keys // self.spec.tile_n)

    @cute.jit
    def read_ahead(self, union: Int32, tile: Int32):
        """Reads the place of tile ``tile``, and in other lanes of tiles after it.

        Were it the same in all lanes, ptxas would keep it in a uniform register, and a warp would wait for it as soon
        as it has asked for it.
        """
        self.ahead[0] = self.mMembers[union, self.warpgroup_index, PARTS_PLACES + tile + self.quad_lane]

    @cute.jit
    def place(self) -> Int32:
        """Where the tile read ahead stands."""
        return self.base[0] + cute.arch.shuffle_sync(self.ahead[0], 0)

    @cute.jit
    def skip(self, share, it: Int32, tile: Int32) -> Int32:
        """Pass over what stands from ``it`` on before this warpgroup's ``tile``-th tile; returns where that is.

        Past its last one: where others are when they begin theirs.
        """
        place = self.place()
        self.read_ahead(share.union, tile + 1)
        return self.pass_over(it, place)

    @cute.jit
    def pass_over(self, it: Int32, end: Int32) -> Int32:
        for i in cutlass.range(it, end, unroll=1):
            self.pipe_k.wait(i)
            self.pipe_k.release(i)
            self.pipe_v.wait(i)
            self.pipe_v.release(i)
        return cutlass.max(it, end)

    @cute.jit
    def finish(self, share, it: Int32) -> Int32:
        """Pass over what is left of the list, and the turns at the tensor cores. Returns where the list ends."""
        if const_expr(self.order.enabled):
            if share.num_keys == 0:
                self.read_ahead(share.union, Int32(1))
            tiles = cutlass.max(cute.ceil_div(share.num_keys, self.spec.tile_n), 1)
            for tile in cutlass.range(tiles, share.rounds, unroll=1):
                it = self.skip(share, it, tile)
                self.order.wait_turn(self.warpgroup_index)
                self.order.pass_on(self.warpgroup_index)
        return self.pass_over(it, self.base[0] + share.end)
