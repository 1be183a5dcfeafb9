# SPDX-License-Identifier: Apache-2.0
"""Mask bits -> lists in parts on the device (parts.py says what these are), in two launches.

``MeasureParts`` gives every list a warp, which counts how many keys its blocks have in common and finds the keys before
which they are shared. The host side adds the tiles up and makes room. ``WriteParts`` gives every list a CTA and each of
its seven parts a warp: the bits of a part are the blocks' words and what was found, put together by a few operations,
and the place of a tile is arithmetic on the numbers of tiles. Nothing is shared between warps.

Parts: 0 of the blocks A, B and C, 1 to 3 of A and B, of A and C, of B and C, 4 to 6 of A, B or C alone.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from .compact_sm90 import WARP, WARPS_PER_CTA, WORD_BITS, inclusive_sum, own_row
from .list_words import bits_below, clear_ids, fill_up, last_of, position_of, rows_of, words_of, write_words
from .mask_spec import PARTS_COMMON, PARTS_CUTS, PARTS_DOUBLES, PARTS_MOST, PARTS_OWN, PARTS_TILES
from .spec import PARTS_BLOCKS, PARTS_KEYS, PARTS_PLACES, PARTS_ROUNDS
from .spec import PARTS_TILE_N as TILE_N

PARTS = 7
SHARED = 4  # parts of more than one block


@cute.jit
def common_words(a: Int32, b: Int32, c: Int32) -> tuple:
    """Keys of A, B and C; of A and B alone; of A and C alone; of B and C alone."""
    return a & b & c, a & b & ~c, a & c & ~b, b & c & ~a


class MeasureParts:
    """What lists have of each part: mask_spec.PARTS_SUMS numbers of each."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32, a multiple of blocks_q rows
        mBlocks: cute.Tensor,  # (lists, 3) int32, the query blocks of each list; blocks_q or more: none
        mSums: cute.Tensor,  # (lists, PARTS_SUMS) int32 out
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
            mine = mSums[number, None]
            count = self.count(mBits, rows, lane)
            common = count[0] // TILE_N
            doubles = cutlass.min(cutlass.min(count[1], count[2]), count[3]) // TILE_N
            if lane == 0:
                tiles, most = common + 3 * doubles, Int32(0)
                for i in cutlass.range_constexpr(PARTS_BLOCKS):
                    own = cute.ceil_div(count[SHARED + i], TILE_N) - common - 2 * doubles
                    mine[PARTS_KEYS + i], mine[PARTS_OWN + i] = count[SHARED + i], own
                    tiles, most = tiles + own, cutlass.max(most, own)
                mine[PARTS_COMMON], mine[PARTS_DOUBLES] = common, doubles
                mine[PARTS_TILES], mine[PARTS_MOST] = tiles, common + 2 * doubles + most
            self.cut(mBits, rows, mine, common * TILE_N, doubles * TILE_N, lane)

    @cute.jit
    def count(self, mBits: cute.Tensor, rows, lane: Int32) -> cute.Tensor:
        """Keys of the parts 0 to 3, were all shared, and of the blocks."""
        count = cute.make_rmem_tensor((PARTS,), Int32)
        count.fill(0)
        for base in cutlass.range(0, mBits.shape[1], WARP, unroll=2):
            a, b, c = words_of(mBits, rows, base + lane)
            for i, word in enumerate((*common_words(a, b, c), a, b, c)):
                count[i] += cute.arch.popc(word)
        for i in cutlass.range_constexpr(PARTS):
            for distance in cutlass.range_constexpr(5):
                count[i] += cute.arch.shuffle_sync_bfly(count[i], 1 << distance)
        return count

    @cute.jit
    def cut(self, mBits: cute.Tensor, rows, mine: cute.Tensor, common: Int32, doubles: Int32, lane: Int32):
        """Finds the key before which a part has its ``common`` or ``doubles`` keys; 0 where that is none."""
        seen = cute.make_rmem_tensor((SHARED,), Int32)
        seen.fill(0)
        if lane < SHARED:
            mine[PARTS_CUTS + lane] = Int32(0)
        cute.arch.sync_warp()
        for base in cutlass.range(0, mBits.shape[1], WARP, unroll=1):
            column = base + lane
            words = common_words(*words_of(mBits, rows, column))
            for half in cutlass.range_constexpr(0, SHARED, 2):  # two sums of at most 1024 in one number
                counts = cute.arch.popc(words[half]) + (cute.arch.popc(words[half + 1]) << 16)
                sums = inclusive_sum(counts, lane)
                total = cute.arch.shuffle_sync(sums, WARP - 1)
                before = sums - counts
                for i in cutlass.range_constexpr(2):
                    part, shift = half + i, 16 * i
                    wanted = (common if part == 0 else doubles) - seen[part] - ((before >> shift) & 0xFFFF)
                    if 0 < wanted and wanted <= cute.arch.popc(words[part]):
                        mine[PARTS_CUTS + part] = column * WORD_BITS + position_of(words[part], wanted) + 1
                    seen[part] += (total >> shift) & 0xFFFF


class WriteParts:
    """The lists themselves, and which tiles each block takes. Every element of both outputs is written."""

    @cute.jit
    def __call__(
        self,
        mBits: cute.Tensor,  # (rows, words) int32, a multiple of blocks_q rows
        mBlocks: cute.Tensor,  # (lists, 3) int32, the query blocks of each list; blocks_q or more: none
        mSums: cute.Tensor,  # (lists, PARTS_SUMS) int32, from MeasureParts
        mOffset: cute.Tensor,  # (lists,) int64, start of each list
        mIds: cute.Tensor,  # (n,) int32 out; 0 past the last list
        mMembers: cute.Tensor,  # (lists, 3, PARTS_PLACES + steps) int32 out
        blocks_q: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(mBits, mBlocks, mSums, mOffset, mIds, mMembers, blocks_q).launch(
            grid=(mBlocks.shape[0], 1, 1), block=[PARTS * WARP, 1, 1], stream=stream
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
        index, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        part = Part(index, mSums[number, None])
        mList = cute.make_tensor(mIds.iterator + mOffset[number], cute.make_layout(1 << 30))
        self.list_places(part, mSums[number, None], mMembers, number, lane)
        if part.tiles > 0:
            rows = rows_of(mBits, mBlocks, number, blocks_q)
            self.write_part(mBits, mList, rows, part, mSums[number, None], lane)
        if index == 0 and number == mBlocks.shape[0] - 1:
            clear_ids(mIds, mOffset[number] + Int64(mSums[number, PARTS_TILES]) * TILE_N, lane)

    @cute.jit
    def list_places(self, part, sums: cute.Tensor, mMembers: cute.Tensor, number: Int32, lane: Int32):
        """Tells the blocks of the part where its tiles are, and those of a block alone what else it must know."""
        index = part.index
        for tile in cutlass.range(lane, part.tiles, WARP, unroll=1):
            place, step = place_of(part, tile)
            if index == 0:
                for block in cutlass.range_constexpr(PARTS_BLOCKS):
                    mMembers[number, block, PARTS_PLACES + step] = place
            elif index < SHARED:
                # A block takes both its pairs in one slot, that with the earlier block first.
                one, other = index // (SHARED - 1), cutlass.min(index, PARTS_BLOCKS - 1)
                mMembers[number, one, PARTS_PLACES + step + Int32(index >= 2)] = place
                mMembers[number, other, PARTS_PLACES + step + Int32(index >= 3)] = place
            else:
                mMembers[number, index - SHARED, PARTS_PLACES + step] = place
        if index >= SHARED:
            block = index - SHARED
            if lane == 0:
                mMembers[number, block, PARTS_KEYS] = sums[PARTS_KEYS + block]
                mMembers[number, block, PARTS_ROUNDS] = sums[PARTS_MOST]
            # Where it has no tile left it waits for the others: as far as they are by then.
            shared = part.common + 2 * part.doubles
            steps = mMembers.shape[2] - PARTS_PLACES
            for step in cutlass.range(shared + part.tiles + lane, steps, WARP, unroll=1):
                furthest = part.common + 3 * part.doubles + own_before(part, step - shared) - 1
                mMembers[number, block, PARTS_PLACES + step] = cutlass.max(furthest, 0)

    @cute.jit
    def write_part(self, mBits: cute.Tensor, mList: cute.Tensor, rows, part, sums: cute.Tensor, lane: Int32):
        """The keys of a part into its tiles, 32 words at a time, a lane per bit as ``compact_sm90.WriteIds`` does."""
        done, last = Int32(0), Int32(0)
        for base in cutlass.range(0, mBits.shape[1], WARP, unroll=1):
            word = word_of(part, words_of(mBits, rows, base + lane), sums, base + lane)
            count = cute.arch.popc(word)
            rank = inclusive_sum(count, lane)
            total = cute.arch.shuffle_sync(rank, WARP - 1)
            if total > 0:
                # The 32 words touch 14 tiles at most. Lane i knows how far the i-th moves what is counted from here.
                tile = done // TILE_N
                rank += done - tile * TILE_N - count
                place, _ = place_of(part, tile + lane)
                shift = (place - lane) * TILE_N
                write_words(mList, word, rank, shift, base, lane, TILE_N)
                last = last_of(word, base + lane, last)
            done += total
        rest = done % TILE_N
        if rest > 0:  # of a block's last tile, which is filled up with the last key in it
            place, _ = place_of(part, done // TILE_N)
            fill_up(mList, place * TILE_N, rest, last, lane, TILE_N)


class Part:
    """A part of a list: its number of tiles, and where they go.

    A list is a row of slots: a tile of A, B and C; the tiles of AB, AC, BC; or a tile of each block's own. Slots of one
    kind are spread evenly: the i-th of n tiles of all, and of n of each two, stands at (i + 1/2) / n of the list, the
    i-th slot of own tiles at (i + 1) / n, in that order where they fall together. Own tiles that not all blocks have
    come last. How many slots of each kind precede another is therefore a division.
    """

    def __init__(self, index, sums):
        self.index = index
        self.common, self.doubles = sums[PARTS_COMMON], sums[PARTS_DOUBLES]
        self.own = [sums[PARTS_OWN + i] for i in range(PARTS_BLOCKS)]
        self.mixed = cutlass.min(cutlass.min(self.own[0], self.own[1]), self.own[2])
        self.tiles = self.of_kind(self.common, self.doubles, self.of_block(*self.own))

    def of_kind(self, common, doubles, own):
        """The one that belongs to this part's kind."""
        return Int32(cutlass.select_(self.index == 0, common, cutlass.select_(self.index < SHARED, doubles, own)))

    def of_block(self, a, b, c):
        """The one that belongs to this part's block."""
        return Int32(cutlass.select_(self.index == SHARED, a, cutlass.select_(self.index == SHARED + 1, b, c)))


@cute.jit
def place_of(part, tile: Int32) -> tuple:
    """(place in the list, step of the block or of the first of its pairs) of the part's ``tile``-th tile."""
    alone = part.index >= SHARED
    slots = cutlass.max(part.of_kind(part.common, part.doubles, part.mixed), 1)
    when = 2 * tile + (2 if alone else 1)  # in halves of a slot's share
    # Of kinds that go first where slots fall together those at the same point precede, of the others not.
    common = (when * part.common + slots - Int32(part.index == 0)) // (2 * slots)
    doubles = (when * part.doubles + slots - Int32(part.index < SHARED)) // (2 * slots)
    mixed = (cutlass.max(when * part.mixed, 1) - 1) // (2 * slots)
    if alone and tile >= part.mixed:
        common, doubles, mixed = part.common, part.doubles, tile
    first, second = Int32(part.own[0] > tile), Int32(part.own[1] > tile)
    inside = part.of_kind(Int32(0), part.index - 1, part.of_block(Int32(0), first, first + second))  # of its slot
    return common + 3 * doubles + own_before(part, mixed) + inside, common + 2 * doubles + mixed


@cute.jit
def own_before(part, slots: Int32) -> Int32:
    """Tiles in so many slots of own tiles."""
    a, b, c = part.own
    return cutlass.min(a, slots) + cutlass.min(b, slots) + cutlass.min(c, slots)


@cute.jit
def word_of(part, words, sums: cute.Tensor, column: Int32) -> Int32:
    """The part's keys in word ``column``. words: that word of each block."""
    shared = cute.make_rmem_tensor((SHARED,), Int32)
    for i, common in enumerate(common_words(*words)):
        shared[i] = common & bits_below(sums[PARTS_CUTS + i] - column * WORD_BITS)
    own = part.of_block(*words) & ~(shared[0] | shared[1] | shared[2] | shared[3])
    pair = cutlass.select_(part.index == 1, shared[1], cutlass.select_(part.index == 2, shared[2], shared[3]))
    return part.of_kind(shared[0], pair, own)
