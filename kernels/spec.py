# SPDX-License-Identifier: Apache-2.0
"""FwdSpec: everything that decides which forward kernel is compiled.

Pure Python and free of cutlass, so presets can be validated and budgets computed anywhere. The kernel owns what it can
implement (``reasons()``); the host owns which spec to pick.
"""

import dataclasses
import math
from typing import Optional

DTYPES = ("bf16", "fp16")
HEAD_DIMS = (64, 96, 128, 256)
SOFTMAX_MODES = ("fixed_ref", "exact")
Q_SOURCES = ("smem", "registers")
SCHEDULERS = ("grid", "persistent", "zigzag")
REFERENCE_SCALINGS = ("once", "per_tile")
PROXY_FENCES = ("producer", "consumer")
KV_LOADS = ("gather", "boxes", "runs", "octets")
UNION_LISTS = ("bits", "halves", "parts")
# Lists in parts: blocks that share one, keys of a tile (the plan is laid out in tiles), and what a block's row of its
# members holds: keys of the block, tiles of the block that has most, and the places of the block's tiles.
PARTS_BLOCKS, PARTS_TILE_N, PARTS_STAGES = 3, 80, 4
PARTS_KEYS, PARTS_ROUNDS, PARTS_PLACES = 0, 1, 2
PARTS_AHEAD = 4  # tiles of which the lanes of a warp read the places together, from the next one on
# Unions in halves: warpgroups that share a list, their rows, keys of a tile (the plan is laid out in tiles), fewest
# stages, and words of members for each of a half's tiles: where it is in the list, and then its keep-bits.
HALVES, HALVES_ROWS, HALVES_TILE_N, HALVES_STAGES, HALVES_TILE_WORDS = 2, 128, 128, 3, 5

SMEM_LIMIT_BYTES = 232_448  # opt-in shared memory of one CTA on sm_90 (227 KiB)
SMEM_PER_SM_BYTES = 233_472  # 228 KiB, of which the driver reserves 1 KiB per resident CTA
SMEM_RESERVED_PER_CTA_BYTES = 1024
REGISTERS_PER_SM = 65_536
WARP_THREADS = 32
WARPGROUP_THREADS = 128
WGMMA_ROWS = 64  # rows of one warpgroup's WGMMA
WARP_ROWS = 16  # of which each warp owns a quarter
UNION_TILES_N = (128, 64)  # of a union: a thread's columns are a quarter of a tile, a keep-bit word or half of one
MAX_TILE_N = 256  # WGMMA's largest N
BOX_ROWS = 8  # rows of a swizzle atom: the smallest box that TMA can place in a tile
PRODUCER_WARPS = 4
MAX_REDO_ITEMS = 192  # work items that a CTA of the redo pass looks at: a flag each, in the slack behind the barriers
ELEMENT_BYTES = 2
# Live registers of a consumer thread besides S, P, O and Q: addresses, row state, loop counters. Chosen so that every
# configuration of shared-memory-resident WGMMA that ptxas compiled without a spill passes and every one that spilled
# fails (D = 64, 128, 256; tile_n 64 to 192; one to three consumer warpgroups; nvidia-cutlass-dsl 4.8.1).
CONSUMER_OVERHEAD_REGISTERS = 28

# setmaxnreg budgets (consumer, producer) by (consumer warpgroups, CTAs per SM). Every SM sub-partition holds one warp
# of each warpgroup, so warpgroups * consumer + producer must stay within 512 / CTAs per SM registers of a lane.
_DEFAULT_REGISTERS = {(1, 1): (240, 56), (2, 1): (224, 56), (3, 1): (160, 32), (1, 2): (200, 56)}


def halves_start(number, list_start):
    """Row of members in which those of a union in halves begin, with the keys of either half.

    Args:
        number: of the list, list_start: its first id. Numbers on the host or in a kernel, or tensors.
    """
    return list_start // HALVES_TILE_N * HALVES_TILE_WORDS + 2 * number


@dataclasses.dataclass(frozen=True, kw_only=True)
class FwdSpec:
    """One forward kernel: what it multiplies, who does it and with which resources.

    head_dim: D, one of 64, 96, 128, 256.
    dtype: element type of q, k, v and out, "bf16" or "fp16"; accumulation is fp32.
    slice_n: keys per listed segment (N of the mask), >= 1.
    tile_m: query rows of one CTA: 64 per consumer warpgroup.
    tile_n: keys of one packed tile; plans do not depend on it.
    kv_stages: packed K tiles (and V tiles) in shared memory.
    softmax: "fixed_ref" keeps the first tile's row maximum as reference (bf16 only, followed by the redo launch),
        "exact" is the online softmax.
    q_source: operand A of QK^T from shared memory or from registers.
    scheduler: "grid" launches one CTA per work item. "persistent" launches several waves of CTAs, each of which takes
        half of what is left, an equal share to a CTA (phases.py). "zigzag" launches one CTA per SM slot, which strides
        over all items, every other time from the far end: for lists of nearly the same length.
    ctas_per_sm: CTAs meant to be resident on one SM (1 or 2).
    ping_pong: consumer warpgroups hand the tensor cores over through named barriers.
    scale_reference: whether fixed_ref multiplies the reference by the softmax scale once or in every tile. The
        result is the same; the code that ptxas makes of it is not (see softmax.py).
    proxy_fence: which role orders the generic-proxy writes of cp.async before the async-proxy reads of WGMMA.
    kv_loads: how K and V rows come in. "gather" copies every row by cp.async; "boxes" fetches segments by TMA, for
        slice_n that are multiples of 8; "runs" gathers, but takes a tile of consecutive keys as one TMA box; "octets"
        is for slice_n 1 and grouped plans: tiles of aligned runs of 8 keys come as boxes, the rest is gathered.
    consumer_registers, producer_registers: setmaxnreg targets; None takes the measured default of the warp layout.
    union_blocks: query blocks of the mask that share a CTA and one list, the union of theirs; 1 where a CTA serves one
        block. A block has tile_m / union_blocks rows, and a key counts only for the blocks that keep it.
    union_lists: how a shared list tells whose a key is. "bits": a bit per block and key, and every block computes every
        key. "parts": tiles of keys that three blocks keep, that two of them keep, and of each block's own; a block is a
        warpgroup's 64 rows, which passes over the tiles of others (parts.py).
    redo: second pass after a fixed_ref launch: recomputes only blocks whose LSE is +inf or NaN, with exact softmax.
    """

    head_dim: int
    dtype: str = "bf16"
    slice_n: int = 1
    tile_m: int = 128
    tile_n: int = 128
    kv_stages: int = 2
    softmax: str = "fixed_ref"
    q_source: str = "smem"
    scheduler: str = "grid"
    ctas_per_sm: int = 1
    ping_pong: bool = False
    scale_reference: str = "once"
    proxy_fence: str = "producer"
    kv_loads: str = "gather"
    consumer_registers: Optional[int] = None
    producer_registers: Optional[int] = None
    union_blocks: int = 1
    union_lists: str = "bits"
    redo: bool = False

    def __post_init__(self):
        consumer, producer = _DEFAULT_REGISTERS.get((self.consumer_warpgroups, self.ctas_per_sm), (None, None))
        if self.consumer_registers is None:
            object.__setattr__(self, "consumer_registers", consumer)
        if self.producer_registers is None:
            object.__setattr__(self, "producer_registers", producer)

    # ---- warps and threads ----------------------------------------------------------------------------------------
    @property
    def consumer_warpgroups(self) -> int:
        return self.tile_m // WGMMA_ROWS

    @property
    def num_threads(self) -> int:
        """Threads of a CTA: the consumer warpgroups and one producer warpgroup."""
        return WARPGROUP_THREADS * (self.consumer_warpgroups + 1)

    @property
    def takes_several(self) -> bool:
        """Whether a CTA takes several work items, one after the other."""
        return self.scheduler != "grid"

    # ---- the gather's geometry ------------------------------------------------------------------------------------
    @property
    def swizzle_bytes(self) -> int:
        """Bytes of a row inside one swizzle atom: 128, or 64 where D is not a multiple of 64 (D = 96)."""
        return 128 if self.head_dim % 64 == 0 else 64

    @property
    def atoms_per_row(self) -> int:
        return self.head_dim * ELEMENT_BYTES // self.swizzle_bytes

    @property
    def lanes_per_row(self) -> int:
        """Producer threads that copy one row: each moves one 16-byte chunk of every atom of it."""
        return self.swizzle_bytes // 16

    @property
    def row_groups(self) -> int:
        """Rows that the producer warpgroup copies side by side."""
        return WARPGROUP_THREADS // self.lanes_per_row

    @property
    def rows_per_thread(self) -> int:
        return self.tile_n // self.row_groups

    @property
    def tight_producer(self) -> bool:
        """Whether the producer's registers just hold the rows and ids of a thread, so that the code must spare others.

        It does so in the gather's ids, in the run of a list and in a list's first tile; elsewhere that buys nothing.
        """
        return self.producer_registers <= 32 and self.rows_per_thread > 6

    # ---- TMA boxes of K and V ---------------------------------------------------------------------------------------
    @property
    def box_rows(self) -> int:
        """Keys of one TMA box: a tile of a run, an aligned run of 8, or what divides both a segment and a tile."""
        if self.kv_loads == "octets":
            return BOX_ROWS
        return self.tile_n if self.kv_loads == "runs" else math.gcd(self.slice_n, self.tile_n)

    @property
    def box_atoms(self) -> int:
        """Swizzle atoms of a row that one box spans.

        All of them where a tile's layout lets the box be contiguous: a whole tile, or 8 rows, for which the atoms of a
        row lie side by side. One otherwise, because WGMMA wants the 8-row groups at one stride.
        """
        return self.atoms_per_row if self.box_rows in (BOX_ROWS, self.tile_n) else 1

    @property
    def atoms_first(self) -> bool:
        """Whether the atoms of a row lie side by side in K and V tiles, as boxes of 8 rows want it."""
        return self.kv_loads in ("boxes", "octets") and self.box_rows == BOX_ROWS

    @property
    def boxes_per_tile(self) -> int:
        return self.tile_n // self.box_rows

    @property
    def box_warps(self) -> int:
        """Producer warps that issue boxes, the same number each."""
        return next(warps for warps in range(PRODUCER_WARPS, 0, -1) if self.boxes_per_tile % warps == 0)

    @property
    def q_box_rows(self) -> int:
        """Rows of Q that one TMA box brings: blocks of a union need not be neighbours."""
        return WARP_ROWS if self.keep_bits else WGMMA_ROWS

    @property
    def parts(self) -> bool:
        """Whether each warpgroup has tiles of its own in the list."""
        return self.union_lists == "parts"

    @property
    def halves(self) -> bool:
        """Whether either of two warpgroups has tiles of its own in a union's list."""
        return self.union_lists == "halves"

    @property
    def keep_bits(self) -> bool:
        """Whether a bit of every key in the list tells which of the blocks keep it."""
        return self.union_blocks > 1 and not self.parts

    # ---- budgets --------------------------------------------------------------------------------------------------
    @property
    def num_barriers(self) -> int:
        """Q full and empty, and K and V full and empty for each stage."""
        return 2 + 4 * self.kv_stages

    @property
    def num_flags(self) -> int:
        """Work items of a CTA that the redo pass has a flag for."""
        return MAX_REDO_ITEMS if self.redo else 0

    def smem_bytes(self) -> int:
        """Shared memory of one CTA in bytes, as the kernel lays it out (operands aligned to 1024 bytes)."""
        align = 1024
        header = -(-(8 * self.num_barriers + 4 * self.num_flags) // align) * align
        q = self.tile_m * self.head_dim * ELEMENT_BYTES
        kv_stage = -(-self.tile_n * self.head_dim * ELEMENT_BYTES // align) * align
        out = q if self.stages_output else 0
        return header + out + q + 2 * self.kv_stages * kv_stage

    @property
    def stages_output(self) -> bool:
        """A persistent CTA loads the next Q while it stores O, so O needs slabs of its own; not in the redo pass, whose
        items are rare."""
        return self.takes_several and not self.redo

    def register_estimate(self) -> int:
        """Estimated registers of a consumer thread: S fp32, P 16-bit, O fp32, Q if it is held, and the rest."""
        scores = self.tile_n // 2
        query = self.head_dim // 4 if self.q_source == "registers" else 0
        members = 4 if self.union_blocks > 1 else 0
        return scores + scores // 2 + self.head_dim // 2 + query + members + CONSUMER_OVERHEAD_REGISTERS

    @property
    def launch_registers(self) -> int:
        """Registers per thread that ptxas may give the kernel at launch for this block size and CTAs per SM."""
        per_thread = REGISTERS_PER_SM // (self.ctas_per_sm * self.num_threads)
        return min(per_thread // 8 * 8, 255)

    def reasons(self) -> list:
        """Why this spec cannot run: one sentence each, empty when it can."""
        why = []

        def need(ok, sentence):
            if not ok:
                why.append(sentence)

        for name, value, legal in (
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("dtype", self.dtype, DTYPES),
            ("softmax", self.softmax, SOFTMAX_MODES),
            ("q_source", self.q_source, Q_SOURCES),
            ("scheduler", self.scheduler, SCHEDULERS),
            ("scale_reference", self.scale_reference, REFERENCE_SCALINGS),
            ("proxy_fence", self.proxy_fence, PROXY_FENCES),
            ("kv_loads", self.kv_loads, KV_LOADS),
            ("union_lists", self.union_lists, UNION_LISTS),
            ("tile_m", self.tile_m, (64, 128, 192)),
            ("ctas_per_sm", self.ctas_per_sm, (1, 2)),
        ):
            need(value in legal, f"{name} {value!r} is not one of {', '.join(map(str, legal))}")
        need(self.slice_n >= 1, f"slice_n {self.slice_n} is less than 1")
        need(self.kv_stages >= 2, f"kv_stages {self.kv_stages} is less than 2: K of the next tile has no place to land")
        if why:
            return why
        step = max(16, self.row_groups)
        need(
            0 < self.tile_n <= MAX_TILE_N and self.tile_n % step == 0,
            f"tile_n {self.tile_n} is not a multiple of {step} up to {MAX_TILE_N} (head_dim {self.head_dim} copies "
            f"{self.row_groups} rows at a time)",
        )
        self._judge_sharing(need)
        if self.kv_loads != "gather":
            need(
                self.kv_loads != "octets" or self.slice_n == 1,
                f"kv_loads octets is for lists of single keys, not for a slice_n of {self.slice_n}",
            )
            need(
                self.kv_loads != "boxes" or self.box_rows % BOX_ROWS == 0,
                f"kv_loads boxes needs a slice_n and a tile_n that share a factor of {BOX_ROWS}, "
                f"not {self.slice_n} and {self.tile_n}",
            )
            need(self.union_blocks == 1, f"kv_loads {self.kv_loads} has no order of keys that a union's keep-bits fit")
            need(self.proxy_fence == "producer", f"kv_loads {self.kv_loads} has no fence on the consumer's side")
        need(
            not (self.softmax == "fixed_ref" and self.dtype == "fp16"),
            "softmax fixed_ref needs the exponent range of bf16; fp16 takes softmax exact",
        )
        need(not (self.redo and self.softmax != "exact"), "the redo pass takes softmax exact")
        need(not (self.redo and self.scheduler != "persistent"), "the redo pass takes scheduler persistent")
        need(not (self.ping_pong and self.consumer_warpgroups == 1), "ping_pong needs two consumer warpgroups or more")
        if self.consumer_registers is None or self.producer_registers is None:
            why.append(
                f"no register budget is known for tile_m {self.tile_m} with {self.ctas_per_sm} CTAs per SM: "
                "name consumer_registers and producer_registers"
            )
            return why
        for name in ("consumer_registers", "producer_registers"):
            value = getattr(self, name)
            need(24 <= value <= 256 and value % 8 == 0, f"{name} {value} is not a multiple of 8 from 24 to 256")
        pool = self.launch_registers * self.num_threads
        wanted = WARPGROUP_THREADS * (self.consumer_warpgroups * self.consumer_registers + self.producer_registers)
        need(
            wanted <= pool,
            f"setmaxnreg asks for {wanted} registers ({self.consumer_warpgroups} x {self.consumer_registers} + "
            f"{self.producer_registers} a lane) but a CTA launched with {self.launch_registers} a thread owns {pool}: "
            "the kernel would wait for ever",
        )
        need(
            self.register_estimate() <= self.consumer_registers,
            f"a consumer thread needs about {self.register_estimate()} registers and gets {self.consumer_registers}: "
            "a spill serialises every WGMMA",
        )
        smem = self.smem_bytes()
        need(smem <= SMEM_LIMIT_BYTES, f"shared memory {smem} bytes exceeds the {SMEM_LIMIT_BYTES} of a CTA")
        per_sm = self.ctas_per_sm * (smem + SMEM_RESERVED_PER_CTA_BYTES)
        need(
            per_sm <= SMEM_PER_SM_BYTES,
            f"{self.ctas_per_sm} CTAs per SM need {per_sm} bytes of shared memory, an SM has {SMEM_PER_SM_BYTES}",
        )
        return why

    def _judge_sharing(self, need):
        """``need(ok, sentence)`` for what blocks that share a list ask of the rest."""
        if self.parts:
            blocks, groups = self.union_blocks, self.consumer_warpgroups
            need(
                blocks == groups == PARTS_BLOCKS,
                f"lists in parts are of {PARTS_BLOCKS} blocks, one to a warpgroup, not {blocks} to {groups}",
            )
            need(self.tile_n == PARTS_TILE_N, f"lists in parts have tiles of {PARTS_TILE_N} keys, not {self.tile_n}")
            # A warpgroup holds V of its last tile until K of its next one lands, with a tile of every other in between.
            need(
                self.kv_stages >= PARTS_BLOCKS,
                f"lists in parts of {PARTS_BLOCKS} blocks need as many kv_stages, not {self.kv_stages}",
            )
            need(self.slice_n == 1, f"lists in parts hold keys, not segments of {self.slice_n}")
        elif self.union_blocks > 1:
            rows, rest = divmod(self.tile_m, self.union_blocks)
            need(
                rest == 0 and rows % WARP_ROWS == 0,
                f"union_blocks {self.union_blocks} does not split tile_m {self.tile_m} into blocks of a multiple of 16",
            )
            need(
                self.tile_n in UNION_TILES_N,
                f"a union needs tile_n {UNION_TILES_N[1]} or {UNION_TILES_N[0]}, not {self.tile_n}: "
                "a thread's keep-bits are a word of the plan's or half of one",
            )
        if self.halves:
            need(
                self.consumer_warpgroups == HALVES and self.union_blocks % HALVES == 0,
                f"unions in halves are of {HALVES} warpgroups and as many blocks to each, not of "
                f"{self.consumer_warpgroups} and {self.union_blocks} blocks",
            )
            need(self.slice_n == 1, f"unions in halves hold keys, not segments of {self.slice_n}")
            need(
                self.tile_n == HALVES_TILE_N, f"unions in halves have tiles of {HALVES_TILE_N} keys, not {self.tile_n}"
            )
            need(
                self.kv_stages >= HALVES_STAGES,
                f"unions in halves need {HALVES_STAGES} kv_stages for the tiles that a half passes over, "
                f"not {self.kv_stages}",
            )
            need(not self.ping_pong, "ping_pong: the warpgroups of a union in halves have no turns")

    # ---- derived specs --------------------------------------------------------------------------------------------
    def redo_spec(self) -> "FwdSpec":
        """The kernel that recomputes the rows a fixed_ref launch has poisoned.

        Its producer walks from item to item, for which 32 registers are too few: with one consumer warpgroup it has the
        default ones; with three and seven rows a thread or more (D = 64), 56 and at most seven rows. The gather reads
        grouped lists as well as any.
        """
        registers = {}
        if self.consumer_warpgroups == 1:
            registers = {"consumer_registers": None, "producer_registers": None}
        elif self.consumer_warpgroups == 3 and self.rows_per_thread >= 7:
            tile_n = 7 * self.row_groups
            registers = {"consumer_registers": 152, "producer_registers": 56, "tile_n": tile_n}
        return dataclasses.replace(
            self,
            **registers,
            softmax="exact",
            scheduler="persistent",
            q_source="smem",
            ping_pong=False,
            scale_reference="once",
            kv_loads="gather" if self.kv_loads == "octets" else self.kv_loads,
            redo=True,
        )

    @property
    def name(self) -> str:
        """Readable identifier, unique per spec: file name of the cached object and prefix of the kernel's symbol."""
        parts = [
            f"fwd_{self.dtype}_d{self.head_dim}_m{self.tile_m}n{self.tile_n}s{self.kv_stages}",
            f"seg{self.slice_n}",
            {"fixed_ref": "ref", "exact": "exact"}[self.softmax],
            f"r{self.consumer_registers}p{self.producer_registers}",
        ]
        parts += ["qreg"] * (self.q_source == "registers")
        parts += ["pers"] * (self.scheduler == "persistent") + ["zigzag"] * (self.scheduler == "zigzag")
        parts += [f"c{self.ctas_per_sm}"] * (self.ctas_per_sm > 1) + ["pp"] * self.ping_pong
        parts += ["tscale"] * (self.scale_reference == "per_tile")
        parts += [f"u{self.union_blocks}"] * (self.union_blocks > 1) + [self.union_lists] * (self.union_lists != "bits")
        parts += [self.kv_loads] * (self.kv_loads != "gather")
        parts += ["cfence"] * (self.proxy_fence == "consumer") + ["redo"] * self.redo
        return "_".join(parts)
