# SPDX-License-Identifier: Apache-2.0
"""What decides which mask kernel is compiled: ``CompactSpec`` for bits to lists, ``PartListSpec`` for bits to lists in
parts, ``HalfListSpec`` for bits to unions in halves, ``MemberSpec`` for the keep-bits of unions, ``MassSpec`` for
scores to bits.

Pure Python and free of cutlass, as spec.py.
"""

import dataclasses

from .spec import (
    DTYPES,
    ELEMENT_BYTES,
    HALVES,
    HEAD_DIMS,
    SMEM_LIMIT_BYTES,
    SMEM_PER_SM_BYTES,
    SMEM_RESERVED_PER_CTA_BYTES,
    WARPGROUP_THREADS,
    WGMMA_ROWS,
)

COMPACT_STEPS = ("count", "write")
SHARED_LIST_STEPS = ("measure", "write")
# What is measured of a list in parts, by column: keys of each block from spec.PARTS_KEYS on; tiles of all blocks, of
# each two, of each block's own, in all, and of the block that has most; the key before which each shared part ends.
PARTS_COMMON, PARTS_DOUBLES, PARTS_OWN, PARTS_TILES, PARTS_MOST, PARTS_CUTS, PARTS_SUMS = 3, 4, 5, 8, 9, 10, 14
# The same of a union in halves: keys of either; tiles of both, and in all; the key before which the former end.
HALVES_KEYS, HALVES_COMMON, HALVES_TILES, HALVES_CUT, HALVES_SUMS = 0, 2, 3, 4, 5
SHARED_MAX_COLUMNS = 1 << 22  # of a mask: products of two numbers of tiles stay below 2^31
OUTPUTS = ("bits", "histogram", "lse")
STATISTICS = ("mean", "max")
WORD_BITS = 32
SLAB_ROWS = 16  # query rows of one warp: slices are whole slabs
BINS = 256
ATOMS = (1, 2, 8, 16, 32, 64, 128)
MIN_SLOTS = 256
MAX_STAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactSpec:
    """One of the two launches that turn mask bits into id lists.

    step: "count" measures the lists, "write" fills them.
    """

    step: str

    @property
    def name(self) -> str:
        return f"compact_{self.step}"

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        return [] if self.step in COMPACT_STEPS else [f"step {self.step!r} is not one of {', '.join(COMPACT_STEPS)}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartListSpec:
    """One of the two launches that turn mask bits into lists in parts.

    step: "measure" counts what blocks have in common, "write" fills the lists.
    """

    step: str

    @property
    def name(self) -> str:
        return f"part_lists_{self.step}"

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        legal = SHARED_LIST_STEPS
        return [] if self.step in legal else [f"step {self.step!r} is not one of {', '.join(legal)}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfListSpec:
    """One of the two launches that turn mask bits into unions in halves.

    step: "measure" counts what the halves have in common, "write" fills the lists.
    union_blocks: query blocks of a union.
    """

    step: str
    union_blocks: int

    @property
    def name(self) -> str:
        return f"half_lists_{self.step}_u{self.union_blocks}"

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        legal, blocks = SHARED_LIST_STEPS, [HALVES * n for n in (1, 2, 4)]
        why = [] if self.step in legal else [f"step {self.step!r} is not one of {', '.join(legal)}"]
        if self.union_blocks not in blocks:
            why.append(f"union_blocks {self.union_blocks} is not one of {', '.join(map(str, blocks))}")
        return why


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """The launch that packs the keep-bits of a union's blocks by list position.

    union_blocks: query blocks of a union.
    """

    union_blocks: int

    @property
    def name(self) -> str:
        return f"members_u{self.union_blocks}"

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        return [] if 2 <= self.union_blocks <= 32 else [f"union_blocks {self.union_blocks} is not from 2 to 32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MassSpec:
    """One kernel that recomputes Q K^T and reduces it to what a mask is chosen by.

    head_dim, dtype: of q and k.
    output: "bits" compares every slice's score with a threshold, "histogram" counts scores by size, "lse" leaves the
        log-sum-exp of every query.
    statistic: score of a slice, "mean" probability mass over its queries or "max"imum probability.
    rows: slices of one query by one key (pooled attention): no reduction, scores are compared where they arise.
    tile_m: query rows of a CTA, 64 per consumer warpgroup.
    tile_n: keys of a tile.
    kv_stages: tiles in shared memory.
    atom: neighbouring keys that are added up in registers; divides slice_n, or the whole tile where it lies in one
        slice.
    slots: partial scores that each warp can keep in shared memory.
    ctas_per_sm: CTAs meant to be resident on one SM.
    """

    head_dim: int
    dtype: str = "bf16"
    output: str = "bits"
    statistic: str = "mean"
    rows: bool = False
    tile_m: int = 128
    tile_n: int = 128
    kv_stages: int = 2
    atom: int = 1
    slots: int = MIN_SLOTS
    ctas_per_sm: int = 1

    @property
    def consumer_warpgroups(self) -> int:
        return self.tile_m // WGMMA_ROWS

    @property
    def consumer_warps(self) -> int:
        return 4 * self.consumer_warpgroups

    @property
    def num_threads(self) -> int:
        """Threads of a CTA: the consumer warpgroups and one producer warp."""
        return WARPGROUP_THREADS * self.consumer_warpgroups + 32

    @property
    def num_barriers(self) -> int:
        """Full and empty, for Q and for each stage of K."""
        return 2 + 2 * self.kv_stages

    @property
    def softmax(self) -> str:
        """How log-sum-exp is taken: softmax.py's online form."""
        return "exact"

    @property
    def keeps_slots(self) -> bool:
        """Partial scores of slices go through shared memory."""
        return self.output != "lse" and not self.rows

    @property
    def slot_elements(self) -> int:
        return self.consumer_warps * self.slots if self.keeps_slots else 0

    @property
    def slices_per_cta(self) -> int:
        """Most slices whose rows fit a CTA."""
        return self.tile_m if self.rows else self.tile_m // SLAB_ROWS

    @property
    def histogram_elements(self) -> int:
        return self.slices_per_cta * BINS if self.output == "histogram" else 0

    def smem_bytes(self) -> int:
        """Shared memory of one CTA in bytes, as the kernel lays it out (operands aligned to 1024 bytes)."""
        rows = self.tile_m + self.kv_stages * self.tile_n
        used = 1024 + rows * self.head_dim * ELEMENT_BYTES + 4 * (self.slot_elements + self.histogram_elements)
        return -(-used // 1024) * 1024

    def reasons(self) -> list:
        """Why this spec cannot run: one sentence each, empty when it can."""
        why = [
            f"{name} {value!r} is not one of {', '.join(map(str, legal))}"
            for name, value, legal in (
                ("head_dim", self.head_dim, HEAD_DIMS),
                ("dtype", self.dtype, DTYPES),
                ("output", self.output, OUTPUTS),
                ("statistic", self.statistic, STATISTICS),
                ("tile_m", self.tile_m, (64, 128, 192)),
                ("tile_n", self.tile_n, (64, 128)),
                ("atom", self.atom, ATOMS),
                ("ctas_per_sm", self.ctas_per_sm, (1, 2)),
            )
            if value not in legal
        ]
        if self.kv_stages < 2:
            why.append(f"kv_stages {self.kv_stages} is less than 2: the next tile has no place to land")
        if self.atom > self.tile_n:
            why.append(f"atom {self.atom} is more than tile_n {self.tile_n}")
        if not why:
            smem, limit = self.smem_bytes(), SMEM_LIMIT_BYTES
            if self.ctas_per_sm > 1:
                limit = SMEM_PER_SM_BYTES // self.ctas_per_sm - SMEM_RESERVED_PER_CTA_BYTES
            if smem > limit:
                why.append(f"shared memory {smem} bytes exceeds the {limit} of {self.ctas_per_sm} CTAs per SM")
        return why

    @property
    def name(self) -> str:
        """Readable identifier, unique per spec."""
        parts = [f"mass_{self.output}_{self.dtype}_d{self.head_dim}_m{self.tile_m}n{self.tile_n}s{self.kv_stages}"]
        if self.output != "lse":
            parts += [self.statistic] + ["rows"] * self.rows
        if self.keeps_slots:
            parts += [f"a{self.atom}", f"k{self.slots}"]
        parts += [f"c{self.ctas_per_sm}"] * (self.ctas_per_sm > 1)
        return "_".join(parts)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a problem's rows and keys fall into CTAs, batches and tiles; the kernel's whole-number arguments, in order.

    Keys go in groups of whole slices, each of which starts a tile of its own: as many slices as fit one tile (a power
    of two, so that groups and 32-bit words nest), or one slice of several tiles. A CTA takes ``words`` words of bits at
    a time and keeps the partial scores of those until they are complete.

    slice_m, slice_n: of the mask.
    slices: slices side by side in a CTA's rows.
    parts: turns that a CTA needs for the rows of one slice; more than one only where slices is 1.
    group_slices, group_tiles: slices and tiles of a group.
    words: words of a batch.
    columns: slices along the keys.
    """

    slice_m: int
    slice_n: int
    slices: int
    parts: int
    group_slices: int
    group_tiles: int
    words: int
    columns: int

    @property
    def rows_per_cta(self) -> int:
        return self.slices * self.slice_m

    @property
    def num_words(self) -> int:
        return -(-self.columns // WORD_BITS)


def plan_mass(
    *, head_dim: int, dtype: str, output: str, statistic: str, slice_m: int, slice_n: int, seqlen_k: int
) -> tuple:
    """(MassSpec, Cut) for slices of ``slice_m``, a multiple of 16, by ``slice_n``; or of one query by one key."""
    rows = (slice_m, slice_n) == (1, 1)
    if rows or output == "lse":
        statistic = "mean"  # there is nothing to take a maximum of
    columns = -(-seqlen_k // slice_n)
    tile_n = 64 if head_dim == 256 else 128
    group = 1 << max(0, (tile_n // slice_n).bit_length() - 1)
    if rows or output == "lse":
        tile_m = 64 if output == "histogram" else 128
        slices, parts, atom, slots = tile_m, 1, 1, MIN_SLOTS
        words = tile_n // WORD_BITS
    else:
        tile_m = min((128, 192, 64), key=lambda m: _wasted_rows(slice_m, m))
        slices, parts = max(1, tile_m // slice_m), -(-slice_m // tile_m)
        atom = max(a for a in ATOMS if slice_n % a == 0 and a <= tile_n) if group > 1 else tile_n
        slots_per_group = tile_n // atom
        step = max(1, group // WORD_BITS)  # words that end with a group
        slots_per_step = slots_per_group * max(1, WORD_BITS // group)
        slots = max(MIN_SLOTS, slots_per_step)
        words = slots // slots_per_step * step
    fields = {
        "head_dim": head_dim,
        "dtype": dtype,
        "output": output,
        "statistic": statistic,
        "rows": rows and output != "lse",
        "tile_m": tile_m,
        "tile_n": tile_n,
        "atom": atom,
        "slots": slots,
    }
    tiles = -(-group * slice_n // tile_n)
    return _resident(fields), Cut(slice_m, slice_n, slices, parts, group, tiles, words, columns)


def _wasted_rows(slice_m: int, tile_m: int) -> float:
    """Share of a CTA's products that belong to no slice."""
    parts = -(-slice_m // tile_m)
    return 1 - max(1, tile_m // slice_m) * slice_m / (parts * tile_m)


def _resident(fields: dict) -> MassSpec:
    """Two CTAs per SM where they fit, so that the exponentials of one run under the products of the other; else as
    many stages as fit."""
    two = MassSpec(**fields, ctas_per_sm=2)
    if two.tile_m <= 128 and not two.reasons():
        return two
    for stages in range(MAX_STAGES, 2, -1):
        one = MassSpec(**fields, kv_stages=stages)
        if not one.reasons():
            return one
    return MassSpec(**fields)
