# SPDX-License-Identifier: Apache-2.0
"""Where a CTA of the mass kernel is, and its producer: one warp that feeds Q and K by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute.nvgpu import cpasync

from .mask_spec import WORD_BITS
from .ptx import unsigned_divmod
from .spec import ELEMENT_BYTES, WGMMA_ROWS


class Route:
    """The walk of one CTA, the same for producer and consumers::

        for batch of words: for part of the slice's rows: for group of slices: for tile of the group

    first_block: the CTA's first query block. The rest are the fields of ``mask_spec.Cut``.
    """

    def __init__(self, spec, cut, seqlen_q, seqlen_k, heads, words_per_cta):
        self.tile_m, self.tile_n = spec.tile_m, spec.tile_n
        (
            self.slice_m,
            self.slice_n,
            self.slices,
            self.parts,
            self.group_slices,
            self.group_tiles,
            self.words,
            self.columns,
        ) = cut
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k
        index, range_index, entry = cute.arch.block_idx()
        self.batch, self.head = unsigned_divmod(entry, heads)
        self.first_block = index * self.slices
        self.first_word = range_index * words_per_cta
        self.end_word = cutlass.min(self.first_word + words_per_cta, cute.ceil_div(self.columns, WORD_BITS))

    def row(self, part):
        """First query row of a part."""
        return self.first_block * self.slice_m + part * self.tile_m

    def row_end(self):
        """End of the CTA's query rows."""
        return cutlass.min((self.first_block + self.slices) * self.slice_m, self.seqlen_q)

    def first_group(self, word):
        return unsigned_divmod(word * WORD_BITS, self.group_slices)[0]

    def groups(self, word):
        """Groups of the batch that starts with ``word``."""
        end = cutlass.min(word + self.words, self.end_word) * WORD_BITS
        end = cute.ceil_div(cutlass.min(end, self.columns), self.group_slices)
        return end - self.first_group(word)

    def takes_q(self, word, part) -> Boolean:
        """Q stays where it is from batch to batch, unless the slice has more rows than the CTA."""
        return (word == self.first_word) | (self.parts > 1)

    def keys(self, group, tile):
        """(first key, keys) of a tile: up to the end of its group and of the sequence."""
        group_keys = self.group_slices * self.slice_n
        start = group * group_keys + tile * self.tile_n
        end = cutlass.min((group + 1) * group_keys, self.seqlen_k)
        return start, end - start


class MassLoader:
    """The producer warp."""

    def __init__(self, spec, route, pipes, tma_q, mQ, sQ, tma_k, mK, sK):
        self.spec, self.route = spec, route
        self.pipe_q, self.pipe_k = pipes
        self.tma_q, self.mQ, self.sQ = tma_q, mQ, sQ
        self.tma_k, self.mK, self.sK = tma_k, mK, sK

    @cute.jit
    def run(self):
        """tiles and items count what has been put into the pipes of K and Q."""
        tiles, items = Int32(0), Int32(0)
        for word in cutlass.range(self.route.first_word, self.route.end_word, self.route.words, unroll=1):
            first, groups = self.route.first_group(word), self.route.groups(word)
            for part in cutlass.range(self.route.parts, unroll=1):
                if self.route.takes_q(word, part):
                    self.load_q(part, items)
                    items += 1
                for group in cutlass.range(first, first + groups, unroll=1):
                    for tile in cutlass.range(self.route.group_tiles, unroll=1):
                        self.load_k(group, tile, tiles)
                        tiles += 1

    @cute.jit
    def load_q(self, part: Int32, items: Int32):
        """A 64-row box per consumer warpgroup. Rows past Sq are zero-filled."""
        spec = self.spec
        self.pipe_q.acquire(items)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.pipe_q.full, spec.tile_m * spec.head_dim * ELEMENT_BYTES)
        mQ = cute.domain_offset((self.route.row(part), 0), self.mQ[None, None, self.route.head, self.route.batch])
        gQ = cute.local_tile(mQ, (WGMMA_ROWS, spec.head_dim), (None, 0))
        tQs, tQg = cpasync.tma_partition(
            self.tma_q, 0, cute.make_layout(1), cute.group_modes(self.sQ, 0, 2), cute.group_modes(gQ, 0, 2)
        )
        for w in cutlass.range_constexpr(spec.consumer_warpgroups):
            cute.copy(self.tma_q, tQg[None, w], tQs[None, w], tma_bar_ptr=self.pipe_q.full)

    @cute.jit
    def load_k(self, group: Int32, tile: Int32, tiles: Int32):
        """One tile. Keys past Sk are zero-filled; keys of the next group come along and are masked."""
        spec = self.spec
        slot = self.pipe_k.slot(tiles)
        self.pipe_k.acquire(tiles)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                self.pipe_k.full + slot, spec.tile_n * spec.head_dim * ELEMENT_BYTES
            )
        start, _ = self.route.keys(group, tile)
        group_size, _ = unsigned_divmod(self.mQ.shape[2], self.mK.shape[2])
        head, _ = unsigned_divmod(self.route.head, group_size)
        mK = cute.domain_offset((start, 0), self.mK[None, None, head, self.route.batch])
        gK = cute.local_tile(mK, (spec.tile_n, spec.head_dim), (0, 0))
        tKs, tKg = cpasync.tma_partition(
            self.tma_k, 0, cute.make_layout(1), cute.group_modes(self.sK, 0, 2), cute.group_modes(gK, 0, 2)
        )
        cute.copy(self.tma_k, tKg, tKs[None, slot], tma_bar_ptr=self.pipe_k.full + slot)
