# SPDX-License-Identifier: Apache-2.0
"""Keep-bits of a union's blocks by list position: what masking.KeepBits reads.

A CTA per union; a warp makes one word of every block at a time, a lane per list position: the key's id, its bit in each
block's mask row, and a ballot.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32

WARP = 32
WARPS_PER_CTA = 4


class PackMembers:
    def __init__(self, spec):
        self.union_blocks = spec.union_blocks

    @cute.jit
    def __call__(
        self,
        mRows: cute.Tensor,  # (unions, union_blocks, words) int32, mask rows of each union's blocks
        mIds: cute.Tensor,  # (n,) int32, lists of the unions
        mOffset: cute.Tensor,  # (unions,) int64, start of each list
        mKeys: cute.Tensor,  # (unions,) int32, keys of each list
        mStarts: cute.Tensor,  # (unions,) int64, first output word of each union
        mMembers: cute.Tensor,  # (words, union_blocks) int32 out
        slice_n: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(mRows, mIds, mOffset, mKeys, mStarts, mMembers, slice_n).launch(
            grid=(mRows.shape[0], 1, 1), block=[WARPS_PER_CTA * WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mRows: cute.Tensor,
        mIds: cute.Tensor,
        mOffset: cute.Tensor,
        mKeys: cute.Tensor,
        mStarts: cute.Tensor,
        mMembers: cute.Tensor,
        slice_n: Int32,
    ):
        union, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        keys = mKeys[union]
        for word in cutlass.range(warp, cute.ceil_div(keys, WARP), WARPS_PER_CTA, unroll=1):
            position = word * WARP + lane
            inside = position < keys
            # A lane past the end reads the list's last id and drops its bit.
            id_ = mIds[mOffset[union] + cutlass.min(position, keys - 1) // slice_n]
            mine = Int32(0)
            for block in cutlass.range_constexpr(self.union_blocks):
                bit = (mRows[union, block, id_ >> 5] >> (id_ & 31)) & 1
                together = cute.arch.vote_ballot_sync(inside and bit != 0)
                mine = Int32(together) if lane == block else mine
            if lane < self.union_blocks:
                mMembers[mStarts[union] + word, lane] = mine
