# SPDX-License-Identifier: Apache-2.0
"""Mask bits -> unions in halves on the device (halves.py says what these are), in two launches.

``MeasureHalves`` gives every list a warp, which counts the keys of either half and those of both, and finds the key
before which whole tiles of the latter end. The host side adds the tiles up and makes room. ``WriteHalves`` gives every
list a CTA, each kind of its tiles several warps, and each of those a stretch of the keys: the bits of a kind are the
blocks' words put together, and where a tile goes is arithmetic on the numbers of tiles. Then all warps look up which
blocks keep the keys that now stand in the list.

Kinds of tiles: 0 of both halves, 1 of A alone, 2 of B alone.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from .compact_sm90 import WARP, WARPS_PER_CTA, WORD_BITS, inclusive_sum, own_row
from .list_words import bits_below, clear_ids, fill_up, last_of, position_of, rows_of, word_at, words_of, write_words
from .mask_spec import HALVES_COMMON, HALVES_CUT, HALVES_KEYS, HALVES_TILES
from .spec import HALVES, HALVES_TILE_WORDS, halves_start
from .spec import HALVES_TILE_N as TILE_N

KINDS = 1 + HALVES
STRETCHES = 4  # of the keys, each a warp's
WARPS = KINDS * STRETCHES
CTAS_PER_SM = 3  # of 56 registers a thread
TILE_WORDS = TILE_N // WORD_BITS


@cute.jit
def words_of_halves(mBits: cute.Tensor, rows, column: Int32) -> tuple:
    """Word ``column`` of the keys of A, and of B: those that some block of it keeps."""
    words = words_of(mBits, rows, column)
    size = len(words) // HALVES
    halves = []
    for half in cutlass.range_constexpr(HALVES):
        kept = words[half * size]
        for block in cutlass.range_constexpr(half * size + 1, (half + 1) * size):
            kept = kept | words[block]
        halves.append(kept)
    return tuple(halves)


class MeasureHalves:
    """How many keys and tiles lists have: mask_spec.HALVES_SUMS numbers of each."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32, a multiple of blocks_q rows
        mBlocks: cute.Tensor,  # (lists, union_blocks) int32, the query blocks of each list; blocks_q or more: none
        mSums: cute.Tensor,  # (lists, HALVES_SUMS) int32 out
        blocks_q: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(mBits, mBlocks, mSums, blocks_q).launch(
            grid=(cute.ceil_div(mBlocks.shape[0], WARPS_PER_CTA), 1, 1),
            block=[WARPS_PER_CTA * WARP, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mBits: cute.Tensor, mBlocks: cute.Tensor, mSums: cute.Tensor, blocks_q: Int32):
        number, lane = own_row(), cute.arch.lane_idx()
        if number < mBlocks.shape[0]:
            rows = rows_of(mBits, mBlocks, number, blocks_q)
            both, a, b = Int32(0), Int32(0), Int32(0)
            for base in cutlass.range(0, mBits.shape[1], WARP, unroll=2):
                one, other = words_of_halves(mBits, rows, base + lane)
                both += cute.arch.popc(one & other)
                a += cute.arch.popc(one)
                b += cute.arch.popc(other)
            for distance in cutlass.range_constexpr(5):
                both += cute.arch.shuffle_sync_bfly(both, 1 << distance)
                a += cute.arch.shuffle_sync_bfly(a, 1 << distance)
                b += cute.arch.shuffle_sync_bfly(b, 1 << distance)
            common = both // TILE_N
            mine = mSums[number, None]
            if lane == 0:
                mine[HALVES_KEYS], mine[HALVES_KEYS + 1], mine[HALVES_COMMON] = a, b, common
                mine[HALVES_TILES] = cute.ceil_div(a, TILE_N) + cute.ceil_div(b, TILE_N) - common
                mine[HALVES_CUT] = Int32(0)
            cute.arch.sync_warp()
            if common > 0:
                self.cut(mBits, rows, mine, common * TILE_N, lane)

    @cute.jit
    def cut(self, mBits: cute.Tensor, rows, mine: cute.Tensor, wanted: Int32, lane: Int32):
        """Finds the key before which there are ``wanted`` in common."""
        base = Int32(0)
        while wanted > 0:
            one, other = words_of_halves(mBits, rows, base + lane)
            both = one & other
            count = cute.arch.popc(both)
            sums = inclusive_sum(count, lane)
            here = wanted - (sums - count)
            if 0 < here and here <= count:
                mine[HALVES_CUT] = (base + lane) * WORD_BITS + position_of(both, here) + 1
            wanted -= cute.arch.shuffle_sync(sums, WARP - 1)
            base += WARP


class WriteHalves:
    """The lists themselves, and what the halves take of them. Every element of both outputs is written."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32, a multiple of blocks_q rows
        mBlocks: cute.Tensor,  # (lists, union_blocks) int32, the query blocks of each list; blocks_q or more: none
        mSums: cute.Tensor,  # (lists, HALVES_SUMS) int32, from MeasureHalves
        mOffset: cute.Tensor,  # (lists,) int64, start of each list
        mIds: cute.Tensor,  # (n,) int32 out; 0 past the last list
        mMembers: cute.Tensor,  # (words, union_blocks) int32 out
        blocks_q: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(mBits, mBlocks, mSums, mOffset, mIds, mMembers, blocks_q).launch(
            grid=(mBlocks.shape[0], 1, 1),
            block=[WARPS * WARP, 1, 1],
            stream=stream,
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=0,  # the mask rows are read again from L1
        )

    @cute.kernel
    def kernel(
        self,
        mBits: cute.Tensor,
        mBlocks: cute.Tensor,
        mSums: cute.Tensor,
        mOffset: cute.Tensor,
        mIds: cute.Tensor,
        mMembers: cute.Tensor,
        blocks_q: Int32,
    ):
        number, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        tiles = Tiles(mSums[number, None])
        mList = cute.make_tensor(mIds.iterator + mOffset[number], cute.make_layout(1 << 30))
        first = halves_start(Int64(number), mOffset[number])
        rows = rows_of(mBits, mBlocks, number, blocks_q)
        self.write_kind(mBits, mList, rows, tiles, warp % KINDS, warp // KINDS, lane)
        is_last = number == mBlocks.shape[0] - 1
        self.clear(mMembers, first, tiles, Int64(mMembers.shape[0]) if is_last else first + tiles.rows)
        if warp == 0 and is_last:
            clear_ids(mIds, mOffset[number] + Int64(tiles.all) * TILE_N, lane)
        cute.arch.sync_threads()  # the list stands
        for word in cutlass.range(warp, tiles.all * TILE_WORDS, WARPS, unroll=1):
            self.write_bits(mBits, mList, mMembers, rows, tiles, first, word, lane)

    @cute.jit
    def write_kind(self, mBits: cute.Tensor, mList: cute.Tensor, rows, tiles, kind: Int32, stretch: Int32, lane: Int32):
        """A stretch of the keys of a kind into its tiles; with the last stretch, a half's last tile is filled up."""
        batches = cute.ceil_div(mBits.shape[1], WARP)
        each = cute.ceil_div(batches, STRETCHES)
        begin = cutlass.min(stretch * each, batches) * WARP
        end = cutlass.min((stretch + 1) * each, batches) * WARP
        done, last = Int32(0), Int32(0)
        for base in cutlass.range(0, begin, WARP, unroll=2):
            word = word_of(mBits, rows, tiles, kind, base + lane)
            done += cute.arch.popc(word)
            last = last_of(word, base + lane, last)
        for distance in cutlass.range_constexpr(5):
            done += cute.arch.shuffle_sync_bfly(done, 1 << distance)
        for base in cutlass.range(begin, end, WARP, unroll=1):
            word = word_of(mBits, rows, tiles, kind, base + lane)
            count = cute.arch.popc(word)
            rank = inclusive_sum(count, lane)
            total = cute.arch.shuffle_sync(rank, WARP - 1)
            if total > 0:
                # The 32 words touch 9 tiles at most. Lane i knows how far the i-th moves what is counted from here.
                tile = done // TILE_N
                place, _, _ = place_of(tiles, kind, tile + lane)
                shift = (place - lane) * TILE_N
                write_words(mList, word, rank - count + done - tile * TILE_N, shift, base, lane, TILE_N)
                last = last_of(word, base + lane, last)
            done += total
        rest = done % TILE_N
        if stretch == STRETCHES - 1 and rest > 0:
            place, _, _ = place_of(tiles, kind, done // TILE_N)
            fill_up(mList, place * TILE_N, rest, last, lane, TILE_N)

    @cute.jit
    def clear(self, mMembers: cute.Tensor, first: Int64, tiles, end: Int64):
        """What is no tile's in the rows of a list up to ``end``; and the first, the keys of the halves."""
        thread, _, _ = cute.arch.thread_idx()
        blocks = mMembers.shape[1]
        for i in cutlass.range(thread, Int32(end - first) * blocks, WARPS * WARP, unroll=1):
            row, column = i // blocks, i % blocks
            tile, inside = (row - 1) // HALVES_TILE_WORDS, (row - 1) % HALVES_TILE_WORDS
            # The first row of a tile is the halves', the others are the blocks'.
            second = Int32(column >= blocks // HALVES) if inside > 0 else column
            taken = tiles.taken[1] if second == 1 else tiles.taken[0]
            value = Int32(0)
            if row == 0 and column < HALVES:
                value = tiles.keys[1] if column == 1 else tiles.keys[0]
            if row == 0 or second >= HALVES or tile >= taken:
                mMembers[first + row, column] = value

    @cute.jit
    def write_bits(
        self,
        mBits: cute.Tensor,
        mList: cute.Tensor,
        mMembers: cute.Tensor,
        rows,
        tiles,
        first: Int64,
        number: Int32,
        lane: Int32,
    ):
        """A word of every block that takes a tile, and once for the tile where it is. number: words of the list are
        counted kind after kind."""
        tile, word = number // TILE_WORDS, number % TILE_WORDS
        kind = Int32(0)
        if tile >= tiles.common:
            tile, kind = tile - tiles.common, Int32(1)
            if tile >= tiles.own[0]:
                tile, kind = tile - tiles.own[0], Int32(2)
        place, *ranks = place_of(tiles, kind, tile)
        position = word * WORD_BITS + lane
        id_ = mList[place * TILE_N + position]
        size = len(rows.starts) // HALVES
        for half in cutlass.range_constexpr(HALVES):
            if kind == 0 or kind == 1 + half:
                row = first + (1 + HALVES_TILE_WORDS * ranks[half])
                inside = position < tiles.keys[half] - ranks[half] * TILE_N
                mine = Int32(0)
                for i in cutlass.range_constexpr(size):
                    block = half * size + i
                    kept = word_at(mBits, rows.starts[block], id_ >> 5)
                    together = cute.arch.vote_ballot_sync(inside and (kept >> (id_ & 31)) & 1 != 0)
                    mine = Int32(together) if lane == i else mine
                if lane < size:
                    mMembers[row + 1 + word, half * size + lane] = mine
                if word == 0 and lane == 0:
                    mMembers[row, half] = 2 * place + Int32(kind != 0)


class Tiles:
    """How many tiles a list has, and where they go.

    Of a half's own tiles so many are spread over the list as the other half has tiles at hand: the common ones, or the
    own ones if these are more. The i-th of n common tiles stands at (i + 1/2) / n of the list, the j-th own one of m
    that are spread at (j + 1) / m, in the order common, A, B where they fall together. So no more than two tiles of the
    other half stand between two of a half's. The own tiles that are not spread come last. How many tiles of each kind
    precede another is therefore a division.
    """

    def __init__(self, sums):
        self.keys = [sums[HALVES_KEYS + half] for half in range(HALVES)]
        self.common, self.cut, self.all = sums[HALVES_COMMON], sums[HALVES_CUT], sums[HALVES_TILES]
        self.taken = [cute.ceil_div(keys, TILE_N) for keys in self.keys]
        self.own = [taken - self.common for taken in self.taken]
        self.spread = [
            cutlass.min(self.own[half], cutlass.max(self.common, self.own[1 - half])) for half in range(HALVES)
        ]
        self.rows = 2 + HALVES_TILE_WORDS * self.all  # of members


@cute.jit
def place_of(tiles, kind: Int32, tile: Int32) -> tuple:
    """(place in the list, rank among the tiles of A, of B) of the ``tile``-th tile of a kind; one rank is none."""
    common, (a, b) = tiles.common, tiles.spread
    before_common, before_a, before_b = tile, tile, tile
    if kind == 0:
        when, slots = 2 * tile + 1, 2 * cutlass.max(common, 1)
        before_a = (cutlass.max(when * a, 1) - 1) // slots
        before_b = (cutlass.max(when * b, 1) - 1) // slots
    elif kind == 1:
        slots = cutlass.max(a, 1)
        before_common = (2 * (tile + 1) * common + slots) // (2 * slots)
        before_b = (cutlass.max((tile + 1) * b, 1) - 1) // slots
        if tile >= a:
            before_common, before_b = common, b
    else:
        slots = cutlass.max(b, 1)
        before_common = (2 * (tile + 1) * common + slots) // (2 * slots)
        before_a = (tile + 1) * a // slots
        if tile >= b:
            before_common, before_a = common, a
    return before_common + before_a + before_b, before_common + before_a, before_common + before_b


@cute.jit
def word_of(mBits: cute.Tensor, rows, tiles, kind: Int32, column: Int32) -> Int32:
    """The kind's keys in word ``column``."""
    a, b = words_of_halves(mBits, rows, column)
    common = a & b & bits_below(tiles.cut - column * WORD_BITS)
    own = cutlass.select_(kind == 1, a, b) & ~common
    return Int32(cutlass.select_(kind == 0, common, own))
