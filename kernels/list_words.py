# SPDX-License-Identifier: Apache-2.0
"""What the kernels share that make lists of several query blocks: their mask rows word by word, and ids into tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from .compact_sm90 import WARP, WORD_BITS

OF_TILE_BITS = 22


class Rows:
    """The mask rows of a list's blocks: where they start, negative for a block that is none."""

    def __init__(self, starts):
        self.starts = starts


@cute.jit
def rows_of(mBits: cute.Tensor, mBlocks: cute.Tensor, number: Int32, blocks_q: Int32) -> Rows:
    """Rows of list ``number``. Lists are counted through batch and heads, as many to each as hold its blocks_q."""
    above = number // cute.ceil_div(blocks_q, mBlocks.shape[1]) * blocks_q
    starts = []
    for i in cutlass.range_constexpr(mBlocks.shape[1]):
        block = mBlocks[number, i]
        # A mask may hold more than 2^31 words, so the address is 64-bit.
        start = Int64(above + block) * mBits.shape[1]
        starts.append(start if block >= 0 and block < blocks_q else Int64(-1))
    return Rows(starts)


@cute.jit
def word_at(mBits: cute.Tensor, start: Int64, column: Int32) -> Int32:
    """Word ``column`` of the row at ``start``; zero for none."""
    word = Int32(0)
    if start >= 0:
        word = (mBits.iterator + start + column).load()
    return word


@cute.jit
def words_of(mBits: cute.Tensor, rows, column: Int32) -> tuple:
    """Word ``column`` of each row; zero past its end."""
    words = cute.make_rmem_tensor((len(rows.starts),), Int32)
    words.fill(0)
    if column < mBits.shape[1]:
        for i in cutlass.range_constexpr(len(rows.starts)):
            words[i] = word_at(mBits, rows.starts[i], column)
    return tuple(words[i] for i in range(len(rows.starts)))


@cute.jit
def position_of(word: Int32, rank: Int32) -> Int32:
    """Position of a word's ``rank``-th set bit, counted from 1."""
    position, left = Int32(0), rank
    for step in (16, 8, 4, 2, 1):
        low = cute.arch.popc((word >> position) & ((1 << step) - 1))
        if low < left:
            position += step
            left -= low
    return position


@cute.jit
def bits_below(bit: Int32) -> Int32:
    """The bits of a word below ``bit``, none for a negative one and all from 32 on."""
    mask = (Int32(1) << cutlass.min(cutlass.max(bit, 0), WORD_BITS - 1)) - 1
    return Int32(-1) if bit >= WORD_BITS else mask


@cute.jit
def write_words(
    mList: cute.Tensor,
    word: Int32,
    rank: Int32,
    shift: Int32,
    base: Int32,
    lane: Int32,
    tile_n: cutlass.Constexpr[int],
):
    """The ids of 32 words, a lane per bit as ``compact_sm90.WriteIds`` does.

    word: of this lane, column ``base + lane``. rank: ids before it, counted from a tile's start. shift: how far the
    lane's tile, counted from that, moves an id.
    """
    of_tile = -(-(1 << OF_TILE_BITS) // tile_n)  # n // tile_n == n * of_tile >> 22 for n < 2^15: tiles of 80 and of 128
    below = Int32(cute.arch.lanemask_lt())
    for j in cutlass.range_constexpr(WARP):
        together = cute.arch.shuffle_sync(word, j)
        before = cute.arch.shuffle_sync(rank, j) + cute.arch.popc(together & below)
        target = before + cute.arch.shuffle_sync(shift, (before * of_tile) >> OF_TILE_BITS)
        if (together >> lane) & 1 != 0:
            mList[target] = (base + j) * WORD_BITS + lane


@cute.jit
def last_of(word: Int32, column: Int32, last: Int32) -> Int32:
    """The last column of a word of bits; ``last`` where it has none."""
    if word != 0:
        last = column * WORD_BITS + (WORD_BITS - 1) - Int32(cute.arch.clz(word))
    return last


@cute.jit
def fill_up(mList: cute.Tensor, start: Int32, rest: Int32, last: Int32, lane: Int32, tile_n: cutlass.Constexpr[int]):
    """The tile at ``start``, of which ``rest`` ids are written, with the last of all lanes' ``last``."""
    for distance in cutlass.range_constexpr(5):
        last = cutlass.max(last, cute.arch.shuffle_sync_bfly(last, 1 << distance))
    for cell in cutlass.range(rest + lane, tile_n, WARP, unroll=1):
        mList[start + cell] = last


@cute.jit
def clear_ids(mIds: cute.Tensor, end: Int64, lane: Int32):
    """Zero the ids from ``end`` on."""
    for i in cutlass.range(lane, Int32(mIds.shape[0] - end), WARP, unroll=1):
        (mIds.iterator + (end + i)).store(Int32(0))
