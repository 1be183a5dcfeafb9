# SPDX-License-Identifier: Apache-2.0
"""Unions in halves: two warpgroups share a list, and neither takes tiles of which none of its blocks keeps a key.

A WGMMA computes 64 rows whatever they keep, so what can be skipped are tiles that a whole warpgroup skips. The list of
the halves A and B has tiles of keys that both keep and tiles of either's own, spread over each other, because an own
tile needs the same loads for half the products::

    AB | A | B | AB | AB | A | B | AB | A

The plan says at which places of the list a half's tiles are and has the keep-bits of its blocks tile by tile as it
takes them (masking.KeepBits). All are full but the last that it takes, so for it the list is one like any other.

A warpgroup does not touch the tiles of the other, not even to release them: of its own it arrives twice instead. The
parity of a barrier tells two phases apart, so a slot may not have been filled twice since a warpgroup last saw a tile.
It has not, because the plan puts no more than ``HALVES_STAGES - 1`` others between a half's tiles, and all tiles before
one that has landed have landed.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from .parts import Share
from .schedule import NamedBarrier
from .spec import HALVES, HALVES_TILE_WORDS, PARTS_AHEAD, WARPGROUP_THREADS, halves_start


class Halves:
    """One consumer warp's walk through unions in halves."""

    def __init__(self, spec, mMembers, thread, half):
        self.spec = spec
        self.mMembers = mMembers  # (words, union_blocks)
        self.half = half
        self.quad_lane = thread % PARTS_AHEAD
        self.base = cute.make_rmem_tensor((1,), Int32)  # tiles before the list
        self.first = cute.make_rmem_tensor((1,), Int64)  # row of members in which the list's begin
        self.ahead = cute.make_rmem_tensor((1,), Int32)  # what the plan says of the next tile
        # Arrivals that release the tile at hand, and the one before, whose V is still to be multiplied.
        self.arrivals = cute.make_rmem_tensor((2,), Int32)

    @cute.jit
    def start(self, work, it: Int32) -> Share:
        """Begin a list at tile ``it``; reads its first place ahead."""
        self.base[0] = it
        self.first[0] = halves_start(Int64(work.first), work.list_start)
        self.read_ahead(Int32(0))
        keys = self.mMembers[self.first[0], self.half]
        return Share(work.first, keys, None, work.num_keys // self.spec.tile_n)

    @cute.jit
    def read_ahead(self, tile: Int32):
        """Reads what the plan says of tile ``tile``, and in other lanes of the tiles after it.

        Were it the same in all lanes, ptxas would keep it in a uniform register, and a warp would wait for it right
        after asking for it: 8 % of a list on an H200.
        """
        mine = tile + self.quad_lane
        self.ahead[0] = self.mMembers[self.first[0] + 1 + HALVES_TILE_WORDS * mine, self.half]

    @cute.jit
    def skip(self, share, it: Int32, tile: Int32) -> Int32:
        """Where this half's ``tile``-th tile is."""
        place = cute.arch.shuffle_sync(self.ahead[0], 0)
        self.read_ahead(tile + 1)
        self.arrivals[1] = self.arrivals[0]
        self.arrivals[0] = 1 + (place & 1)
        return self.base[0] + (place >> 1)

    @cute.jit
    def finish(self, share, it: Int32) -> Int32:
        """Where the list ends.

        In a CTA of several lists the halves wait for each other here. So when a half begins the next list, no slot has
        been filled twice since it last looked: of that list no more than one tile to a slot can have been loaded.
        """
        if const_expr(self.spec.takes_several):
            cute.arch.barrier(barrier_id=int(NamedBarrier.LIST), number_of_threads=HALVES * WARPGROUP_THREADS)
        return self.base[0] + share.end
