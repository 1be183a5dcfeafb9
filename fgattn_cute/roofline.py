# SPDX-License-Identifier: Apache-2.0
"""Cost model of the forward kernel: what a launch does, what an SM needs for it, and how long that takes.

Three layers, each checked against something that is not this model:

* ``counts``: FLOPs, exponentials, bytes and instructions of a launch. Equal to the emulator's counters.
* ``tile_cycles``: cycles of each resource of an SM for one packed tile, from those counts, from the instructions of the
  compiled loops (``instructions``) and from the GPU's constants in ``configs/``.
* ``predict``: the tiles of a plan on a GPU. Resources overlap, but not perfectly: a tile takes the p-norm of their
  cycles. p, the cycles of an instruction and those of a list's ends are fitted on measurements (``perf/roofline.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import cache, cubin, presets
from .errors import CompileError
from .kernels import phases
from .kernels.spec import ELEMENT_BYTES, WARP_ROWS, WARP_THREADS, WARPGROUP_THREADS, WGMMA_ROWS, FwdSpec
from .plan import WORK_BYTES_PER_KEY, WORK_L2_BYTES

FIGURES = Path(__file__).parent / "configs" / "kernel_figures.json"
RESOURCES = ("tensor core", "exponential", "issue slots", "shared memory", "L2", "HBM")
PRODUCER_WARPS = 4
SUB_PARTITIONS = 4  # of an SM; each issues one warp instruction per clock and holds one warp of every warpgroup
WGMMA_K = 16
WORK_ITEM_BYTES = 16
EXACT_SIMULATION_ITEMS = 60_000


# ---- what a launch does --------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Counts:
    """The main launch of a kernel (without the redo pass), padding of the last tiles included.

    wgmma_flops, ex2: floating-point operations of the products; exponentials.
    cp_async_bytes, tma_load_bytes, tma_store_bytes: K and V, Q, O. Q and O move in boxes of 64 and 16 rows, which count
        in full where they cross the end of the tensor.
    global_load_bytes, global_store_bytes: work items and ids; LSE.
    wgmma_instructions: multiplications, commits and waits, summed over warps. cp_async_instructions: copies, commits
        and waits. mufu_instructions: exponentials, reciprocals and logarithms.
    """

    wgmma_flops: int
    ex2: int
    cp_async_bytes: int
    tma_load_bytes: int
    tma_store_bytes: int
    global_load_bytes: int
    global_store_bytes: int
    wgmma_instructions: int
    cp_async_instructions: int
    mufu_instructions: int


def counts(spec: FwdSpec, keys: Iterable[int], *, slice_m: int, seqlen_q: int) -> Counts:
    """What a launch does, from the spec and the lists alone.

    Args:
        spec: not a redo spec. kv_loads runs and octets count as the gather: which tiles come as boxes is in the ids.
            Not for lists in parts, of which lengths say too little.
        keys: length of every list in keys, (batch, heads, blocks_q) flattened: query blocks fastest.
        slice_m, seqlen_q: of the plan.
    """
    if spec.redo:
        raise ValueError("the redo pass does nothing that could be counted ahead: it depends on the values")
    blocks = -(-seqlen_q // slice_m)
    parts = -(-slice_m // spec.tile_m)
    threads = WARPGROUP_THREADS * spec.consumer_warpgroups
    warps = threads // WARP_THREADS
    row_bytes = spec.head_dim * ELEMENT_BYTES
    boxes = spec.kv_loads == "boxes"
    pieces = 2 * spec.rows_per_thread * spec.atoms_per_row  # 16-byte copies of a producer thread per tile
    exact_rescale = 2 if spec.softmax == "exact" else 0  # a thread has two rows

    lists = tiles = id_loads = rescales = copied = valid_rows = boxed_rows = ctas = 0
    for index, n in enumerate(keys):
        first = index % blocks * slice_m
        rows = min(slice_m, seqlen_q - first)
        valid_rows += rows
        boxed_rows += -(-rows // WARP_ROWS) * WARP_ROWS
        ctas += parts
        if n == 0:
            continue
        per_list = -(-n // spec.tile_n)
        lists += parts
        tiles += parts * per_list
        # Ids are read ahead: those of a second tile whether there is one or not, those of the last tile twice by boxes.
        id_loads += parts * (per_list + 1 if boxes else max(per_list, 2))
        rescales += parts * (per_list - 1) * exact_rescale
        copied += parts * n
    fence_instructions = 4 if spec.proxy_fence == "producer" else 0  # a commit and a wait for K and for V
    copies = 0 if boxes else tiles * PRODUCER_WARPS * (pieces + fence_instructions)
    boxed = 2 * row_bytes * spec.tile_n * tiles if boxes else 0  # a box brings its zeros too
    ids = 4 * (spec.boxes_per_tile * WARP_THREADS if boxes else _ids_per_thread(spec) * WARPGROUP_THREADS)
    final_rows = 2 * ctas + 2 * lists  # of a thread's two rows: a reciprocal always, a logarithm unless nothing is kept
    mufu = tiles * warps * spec.tile_n // 2 + warps * (rescales + final_rows)
    return Counts(
        wgmma_flops=4 * spec.tile_m * spec.tile_n * spec.head_dim * tiles,
        ex2=spec.tile_m * spec.tile_n * tiles + threads * rescales,
        cp_async_bytes=0 if boxes else 2 * row_bytes * copied,
        tma_load_bytes=spec.tile_m * row_bytes * lists + boxed,
        tma_store_bytes=boxed_rows * row_bytes,
        global_load_bytes=spec.num_threads * WORK_ITEM_BYTES * ctas + ids * id_loads,
        global_store_bytes=4 * valid_rows,
        wgmma_instructions=tiles * warps * (spec.head_dim // WGMMA_K + spec.tile_n // WGMMA_K + 4),
        cp_async_instructions=copies,
        mufu_instructions=mufu,
    )


def _ids_per_thread(spec: FwdSpec) -> int:
    """Ids that a producer thread reads per tile, as kernels/gather.py decides (which imports the DSL)."""
    rows, seg = spec.rows_per_thread, spec.slice_n
    return rows // seg if rows % seg == 0 else 1 if seg % rows == 0 else rows


# ---- instructions of the compiled loops ----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Instructions:
    """SASS instructions of a warp for one tile in the steady loop. source: "cubin", "committed" or "estimated"."""

    consumer: int
    producer: int
    source: str


def instructions(spec: FwdSpec, artifact: cache.Artifact | None = None) -> Instructions:
    """Of the compiled kernel where it is at hand, else the committed figures, else an estimate.

    Args:
        spec: the kernel.
        artifact: its files; by default what the disk cache holds. Nothing is compiled here.
    """
    figures = loop_figures(spec, artifact or cache.load(spec))
    return _total(figures, "cubin") if figures is not None else known_instructions(spec)


def known_instructions(spec: FwdSpec) -> Instructions:
    """The committed figures, else an estimate: the same on every machine, whatever its cache holds."""
    # The loops of fp16, of other segments, of runs and octets, and in zigzag differ from these by a few instructions.
    boxes = spec.kv_loads == "boxes"
    slice_n = next((n for n in (64, 8) if boxes and spec.slice_n % n == 0), 1)
    scheduler = "persistent" if spec.scheduler == "zigzag" else spec.scheduler
    for loads in ("boxes",) if boxes else ("gather", "runs"):
        alike = dataclasses.replace(spec, dtype="bf16", slice_n=slice_n, kv_loads=loads, scheduler=scheduler).name
        if alike in committed_figures():
            return _total(committed_figures()[alike]["loops"], "committed")
    return _estimated(spec)


def _total(figures: dict, source: str) -> Instructions:
    return Instructions(figures["consumer"]["total"], figures["producer"]["total"], source)


def loop_figures(spec: FwdSpec, artifact: cache.Artifact | None) -> dict | None:
    """{"consumer": {"total": n, "HGMMA": n, ...}, "producer": ...} of a compiled kernel, remembered beside it.

    None without the kernel, or where its figures are not known yet and nvdisasm is missing.
    """
    if artifact is None:
        return None
    if "loops" not in artifact.facts:
        try:
            loops = cubin.loops(cubin.from_object(artifact.object_file))
        except CompileError:
            return None
        found = {role: {"total": len(code), **cubin.histogram(code)} for role, code in loops.items()}
        cache.annotate(spec, loops=found)
        artifact.facts["loops"] = found
    return artifact.facts["loops"]


@functools.cache
def committed_figures() -> dict:
    """configs/kernel_figures.json: facts of the presets' kernels by name, as they were when it was last renewed."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def _estimated(spec: FwdSpec) -> Instructions:
    """A line through the presets' kernels: within 10 % of each of them (tests/cpu/test_roofline.py)."""
    products = spec.head_dim // WGMMA_K + spec.tile_n // WGMMA_K
    consumer = 1.75 * spec.tile_n + 4 * products + 35 + 20 * spec.ping_pong
    if spec.softmax == "exact":
        consumer += spec.tile_n / 2 + spec.head_dim / 2 + 30
    if spec.keep_bits:
        consumer += spec.tile_n / 2 + 15  # a select for every score and the mask word
    producer = 3 * spec.rows_per_thread * spec.atoms_per_row + 65
    if spec.kv_loads == "boxes":
        producer = 25 + 16 * 2 * spec.boxes_per_tile // spec.box_warps * spec.atoms_per_row // spec.box_atoms
    return Instructions(round(consumer), round(producer), "estimated")


# ---- what an SM needs for it ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Machine:
    """Constants of a GPU, all from its file in configs/.

    clock_hz: sustained under attention kernels. gather_bytes: L2 to one SM per clock, by CTAs per SM (1, 2).
    """

    name: str
    sms: int
    l2_bytes: int
    clock_hz: float
    tensor_flop: float
    mufu: float
    smem_bytes: float
    gather_bytes: tuple[float, float]
    hbm_bytes: float
    cycles_per_instruction: float
    overlap: float
    list_cycles: float
    dense_tflops: float

    @classmethod
    def of(cls, facts: presets.GpuFacts) -> Machine:
        """From a preset file's gpu section; what it leaves out comes from the generic Hopper's."""
        c = {**presets.builtin(presets.GENERIC).gpu.constants, **facts.constants}
        clock = c["sustained_mhz"] * 1e6
        per_sm = 1 / (facts.sms * clock)
        return cls(
            name=facts.names[0],
            sms=facts.sms,
            l2_bytes=facts.l2_bytes,
            clock_hz=clock,
            tensor_flop=c["tensor_flop_per_clk"],
            mufu=c["mufu_per_clk"],
            smem_bytes=c["smem_bytes_per_clk"],
            gather_bytes=tuple(c[f"l2_gather{two}_tb_per_s"] * 1e12 * per_sm for two in ("", "_two_ctas")),
            hbm_bytes=c["memory_gb_per_s"] * 1e9 * per_sm,
            cycles_per_instruction=c["cycles_per_instruction"],
            overlap=c["overlap_exponent"],
            list_cycles=c["list_cycles"],
            dense_tflops=c["dense_attention_tflops"],
        )


def tile_cycles(
    spec: FwdSpec, machine: Machine, found: Instructions, hbm_bytes: float = 0.0, loads: float = 1.0
) -> dict[str, float]:
    """Cycles of an SM for one packed tile of one CTA, by resource.

    Args:
        hbm_bytes: bytes from or to device memory for each tile.
        loads: tiles loaded for each, more than one for lists in parts.
    """
    tile_bytes = 2 * spec.tile_n * spec.head_dim * ELEMENT_BYTES  # K and V
    loaded = loads * tile_bytes
    query_bytes = 0 if spec.q_source == "registers" else WGMMA_ROWS * spec.head_dim * ELEMENT_BYTES
    flops = 4 * spec.tile_m * spec.tile_n * spec.head_dim
    slots = spec.consumer_warpgroups * found.consumer + loads * found.producer
    return {
        "tensor core": flops / machine.tensor_flop,
        "exponential": spec.tile_m * spec.tile_n / machine.mufu,
        "issue slots": slots * machine.cycles_per_instruction,
        # Every warpgroup reads all of K and V, and its own Q; the gather writes K and V once.
        "shared memory": (spec.consumer_warpgroups * (tile_bytes + query_bytes) + loaded) / machine.smem_bytes,
        "L2": loaded / machine.gather_bytes[spec.ctas_per_sm - 1],
        "HBM": hbm_bytes / machine.hbm_bytes,
    }


def joined(cycles: dict[str, float], overlap: float) -> float:
    """Cycles that a tile takes when its resources overlap as well as measured kernels' do."""
    return sum(value**overlap for value in cycles.values()) ** (1 / overlap)


# ---- how long a plan takes -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Workload:
    """What the model needs to know of a problem and its plan.

    keys: length of every list in keys, (batch, heads, blocks) flattened: query blocks fastest.
    heads, batch: of q. kv_heads: of k and v. slice_m: rows that share a list, of all blocks of a union.
    kept_share: kept pairs over those in the lists, less than 1 for unions.
    loads: tiles loaded per tile computed. Of lists in parts and unions in halves ``keys`` is what a CTA computes, and
        it loads more.
    """

    keys: tuple[int, ...]
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    slice_m: int
    kept_share: float = 1.0
    loads: float = 1.0

    @classmethod
    def of(cls, problem, plan) -> Workload:
        """Of a problem and its plan; reads the lists' lengths back from the device."""
        repeat = (problem.batch // plan.batch) * (problem.heads // plan.heads)
        passing = problem.union_lists != "bits"  # warpgroups pass over tiles of others
        lists = plan.computed if passing else plan.lists if problem.union_blocks > 1 else plan
        work = cls.uniform(problem, 0.0, keys=tuple(lists.keys.flatten().tolist()) * repeat)
        share = plan.density / lists.density if problem.union_blocks > 1 and lists.density else 1.0
        loads = sum(plan.lists.keys.flatten().tolist()) * repeat / max(1, sum(work.keys)) if passing else 1.0
        return dataclasses.replace(work, kept_share=share, loads=loads)

    @classmethod
    def uniform(
        cls, problem, density: float, keys: tuple[int, ...] | None = None, union_factor: float = 1.0
    ) -> Workload:
        """Of a problem whose blocks all keep ``density`` of the keys.

        Args:
            keys: the lists' lengths, where they are known.
            union_factor: pairs in the lists over pairs kept. A list never holds more than all keys.
        """
        lists = problem.batch * problem.heads * -(-problem.blocks_q // problem.union_blocks)
        listed = min(1.0, density * union_factor)
        return cls(
            keys=(round(listed * problem.seqlen_k),) * lists if keys is None else keys,
            batch=problem.batch,
            heads=problem.heads,
            kv_heads=problem.kv_heads,
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            slice_m=problem.rows,
            kept_share=density / listed if listed else 1.0,
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says about one kernel, plan and GPU.

    cycles: of one tile by resource. tile: cycles of one tile after overlap. binding: the resource that needs most.
    seconds: of the launch. packed_tflops: FLOPs of the kept pairs over that time.
    break_even_density: kept fraction at which dense attention would be as fast; above 1 it never is.
    """

    spec: FwdSpec
    machine: str
    instructions: Instructions
    cycles: dict[str, float]
    tile: float
    binding: str
    seconds: float
    packed_tflops: float
    break_even_density: float

    def as_dict(self) -> dict:
        """Plain JSON values."""
        found = dataclasses.asdict(self)
        return {**found, "spec": self.spec.name, "cycles": {k: round(v, 1) for k, v in self.cycles.items()}}


def predict(spec: FwdSpec, facts: presets.GpuFacts, work: Workload, found: Instructions | None = None) -> Prediction:
    """How long a kernel takes for the lists of a workload.

    Args:
        spec: able to run.
        facts: the GPU's, ``select.facts_for(gpu)``.
        found: the kernel's instructions, by default ``instructions(spec)``.
    """
    machine = Machine.of(facts)
    found = found or instructions(spec)
    parts = -(-work.slice_m // spec.tile_m)
    tiles = _each(lambda n: -(-n // spec.tile_n), work.keys)
    total_tiles = max(1, parts * sum(tiles))
    memory = hbm_bytes(spec, machine, work, total_tiles) / total_tiles
    cycles = tile_cycles(spec, machine, found, memory, work.loads)
    tile = joined(cycles, machine.overlap)
    # The CTAs of an SM share it: each takes the tile's cycles once for every CTA that is resident.
    items = _each(lambda n: n * tile * spec.ctas_per_sm + machine.list_cycles, launch_order(work, tiles))
    if parts > 1:
        items = [item for item in items for _ in range(parts)]
    slots = machine.sms * spec.ctas_per_sm
    seconds = makespan(cta_cycles(spec, items, slots), slots) / machine.clock_hz
    rows = _rows_of_blocks(work)
    flops = 4 * spec.head_dim * sum(map(operator.mul, work.keys, rows)) * work.kept_share
    dense = 4 * spec.head_dim * work.batch * work.heads * work.seqlen_q * work.seqlen_k / (machine.dense_tflops * 1e12)
    ends = len(items) * machine.list_cycles / spec.ctas_per_sm / machine.sms / machine.clock_hz
    full = len(items) * work.seqlen_k / spec.tile_n * tile / machine.sms / machine.clock_hz
    return Prediction(
        spec=spec,
        machine=machine.name,
        instructions=found,
        cycles=cycles,
        tile=tile,
        binding=max(cycles, key=cycles.get),
        seconds=seconds,
        packed_tflops=flops / seconds / 1e12 if seconds else 0.0,
        break_even_density=max(0.0, (dense - ends) / full) * work.kept_share,
    )


def _each(function: Callable, values: Sequence) -> list:
    """``function`` of every value, worked out once where all are equal: a choice prices tens of thousands of lists of
    mean length."""
    if values and min(values) == max(values):
        return [function(values[0])] * len(values)
    return [function(value) for value in values]


def hbm_bytes(spec: FwdSpec, machine: Machine, work: Workload, tiles: int) -> float:
    """Device-memory traffic of a launch: Q, O, K and V once, and the gathers that the L2 cannot keep.

    A head at a time is in flight. What of its K and V exceeds the L2 is fetched anew for every query block.
    """
    row = spec.head_dim * ELEMENT_BYTES
    once = 2 * row * (work.batch * work.heads * work.seqlen_q + work.batch * work.kv_heads * work.seqlen_k)
    footprint = 2 * row * work.seqlen_k
    missing = max(0.0, 1 - machine.l2_bytes / footprint)
    return once + missing * tiles * work.loads * 2 * row * spec.tile_n


def launch_order(work: Workload, tiles: list[int]) -> list[int]:
    """Tiles of the lists in the order in which ``Plan.work`` has them: heaviest first inside a group of heads."""
    if tiles and min(tiles) == max(tiles):
        return tiles
    lists = len(tiles) // (work.batch * work.heads)
    group = max(1, WORK_L2_BYTES // (work.seqlen_k * WORK_BYTES_PER_KEY))
    found = []
    for entry in range(work.batch):
        for head in range(0, work.heads, group):
            first, end = (entry * work.heads + h for h in (head, min(head + group, work.heads)))
            found += sorted(tiles[first * lists : end * lists], reverse=True)
    return found


def cta_cycles(spec: FwdSpec, items: list[float], slots: int) -> list[float]:
    """Cycles of every CTA of a launch, in order: of its item, or of its share of them.

    An item has the same ends in both. A persistent CTA starts once for all of its items, but what that saves is too
    little to be seen in the measurements that the cycles of a list's ends are fitted to.

    Args:
        items: cycles of the work items.
        slots: CTAs that fit the GPU at once.
    """
    if spec.scheduler == "grid":
        return items
    shares = phases.zigzag if spec.scheduler == "zigzag" else phases.shares
    return [sum(items[index] for index in share) for share in shares(len(items), slots)]


def makespan(costs: list[float], slots: int) -> float:
    """When the last CTA ends, with each slot taking the next as it becomes free."""
    if not costs:
        return 0.0
    if min(costs) == max(costs):
        return -(-len(costs) // slots) * costs[0]
    if len(costs) > EXACT_SIMULATION_ITEMS:  # many small steps: the unevenness at the end is half of one
        return max(sum(costs) / slots + max(costs) / 2, max(costs))
    ends = [0.0] * min(slots, len(costs))
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def _rows_of_blocks(work: Workload) -> list[int]:
    blocks = -(-work.seqlen_q // work.slice_m)
    one = [min(work.slice_m, work.seqlen_q - b * work.slice_m) for b in range(blocks)]
    return one * (len(work.keys) // blocks)
