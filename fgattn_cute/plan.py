# SPDX-License-Identifier: Apache-2.0
"""Plan: the device-side lists that the kernel reads, made from a mask or given as lists.

A plan knows slices, not tiles: it is never padded to a tile width, so any preset runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import torch

from fgattn_cute import storage
from fgattn_cute.compaction import LIST_ALIGN, PLAN_SLACK, align_up, compact, fit, is_even, layout
from fgattn_cute.errors import PlanError
from fgattn_cute.mask import SliceMask, block_rows, blocks_of, check_geometry

WORK_L2_BYTES = 40 * 2**20  # L2 that the K and V of the heads in flight may fill
WORK_BYTES_PER_KEY = 512  # K and V row of one head at D = 128 in 16 bits
MAX_WORK_HEADS = 1 << 16  # a work descriptor packs head | batch << 16
MAX_WORK_BATCH = 1 << 15
_signature_numbers = itertools.count()
_CHUNK_CELLS = 1 << 24  # list cells expanded at a time when lists are read as a matrix


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Key lists of each query block.

    ids: int32 (n,), segment ids (units of slice_n), ascending unless ``grouped``. Each list starts at a multiple of 8
        ids (32 bytes) and the buffer ends with at least PLAN_SLACK ids that belong to no list.
    offset: int64 (batch, heads, blocks_q), start of each list in ids. Batch or heads of 1 is shared.
    keys: int32 (batch, heads, blocks_q), keys of each list after clipping at seqlen_k; a segment that crosses seqlen_k
        is the last of its list.
    slice_m, slice_n: queries of a block and keys of a segment.
    seqlen_q, seqlen_k: lengths in tokens.
    overflow: bool (), on the device: lists were cut because a capacity was too small. None when that cannot be.
    grouped: each list has the keys of its aligned runs first (keys 8 g to 8 g + 7, all kept), ascending, and then the
        others, ascending. Only for slice_n 1. Kernels with kv_loads octets bring the runs by TMA.
    even: the longest list is at most a tenth longer than the mean one, lists of no keys included. A matter of speed:
        which way of sharing the work out pays. False where it is not known, as with a capacity.

    Plans compare and hash by identity.
    """

    ids: torch.Tensor
    offset: torch.Tensor
    keys: torch.Tensor
    slice_m: int
    slice_n: int
    seqlen_q: int
    seqlen_k: int
    overflow: torch.Tensor | None = None
    grouped: bool = False
    even: bool = False
    _work: dict = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self):
        check_geometry(PlanError, self.slice_m, self.slice_n, self.seqlen_q, self.seqlen_k)
        why = []
        for name, dtype, ndim in (("ids", torch.int32, 1), ("offset", torch.int64, 3), ("keys", torch.int32, 3)):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.ndim != ndim or not tensor.is_contiguous():
                why.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} is not a contiguous {dtype} of rank {ndim}")
            elif tensor.device != self.ids.device:
                why.append(f"{name} is on {tensor.device}, ids on {self.ids.device}")
        if not why and (self.offset.shape != self.keys.shape or self.keys.shape[-1] != self.blocks_q):
            why.append(
                f"offset {tuple(self.offset.shape)} and keys {tuple(self.keys.shape)} must both be "
                f"(batch, heads, {self.blocks_q})"
            )
        if not why and self.ids.numel() < PLAN_SLACK:
            why.append(f"ids holds {self.ids.numel()} elements, fewer than the slack of {PLAN_SLACK}")
        if not why and self.ids.data_ptr() % 32:
            why.append("ids does not start on 32 bytes")
        if self.grouped and self.slice_n != 1:
            why.append(f"lists of segments of {self.slice_n} keys are not grouped, only those of single keys")
        if why:
            raise PlanError("not a plan: " + "; ".join(why))

    # ---- construction ---------------------------------------------------------------------------------------------
    @classmethod
    def from_mask(
        cls, mask: SliceMask, capacity: int | None = None, grouped: bool | None = None, *, even: bool | None = None
    ) -> Plan:
        """Builds the lists of a mask on the mask's device.

        Args:
            mask: the kept slices.
            capacity: room in ids, each list rounded up to a multiple of 8. None allocates exactly what is needed and
                reads the totals back for it, the only synchronisation. With a capacity nothing is read back; lists
                that do not fit are cut, ``overflow`` becomes True and ``describe`` and ``validate`` say so.
            grouped: whether lists have their aligned runs of 8 keys first, which needs slice_n 1. None groups them if
                half of all keys or more stand in such runs; not with a capacity, because it takes a read-back to know.
            even: what is known of it beforehand, for a mask whose lists have been made before; None finds out, and
                takes False with a capacity.
        """
        if not isinstance(mask, SliceMask):
            raise PlanError(f"a plan is made from a SliceMask, not from {type(mask).__name__}: SliceMask.from_dense")
        capacity = _checked_capacity(capacity)
        if grouped and mask.slice_n != 1:
            raise PlanError(f"lists of segments of {mask.slice_n} keys are not grouped, only those of single keys")
        lists = compact(mask, capacity, grouped=grouped)
        overflow = lists.overflow if capacity is not None else None
        facts = {"grouped": lists.grouped, "even": lists.even if even is None else even}
        return cls(lists.ids, lists.offset, lists.keys, **mask.geometry, overflow=overflow, **facts)

    @classmethod
    def from_lists(
        cls,
        ids: torch.Tensor,
        counts: torch.Tensor,
        *,
        slice_m: int,
        slice_n: int,
        seqlen_q: int,
        seqlen_k: int,
        capacity: int | None = None,
    ) -> Plan:
        """Takes lists as other libraries hold them: one padded row of segment ids per query block.

        Args:
            ids: int32 (batch, heads, ceil(seqlen_q / slice_m), L), ascending and unique in the first ``counts``
                entries of each row; the rest is ignored. Batch or heads of 1 is shared.
            counts: int32 (batch, heads, ceil(seqlen_q / slice_m)), segments in each row, 0 to L.
            slice_m, slice_n, seqlen_q, seqlen_k: the geometry.
            capacity: as in ``from_mask``.

        The ids are not read on the host here (``validate`` and ``checks="full"`` do). Counts outside 0..L are an error
        where the total is read back anyway, and clamped where a capacity is given.

        Raises:
            PlanError: wrong type, shape or device, or counts outside 0..L.
        """
        check_geometry(PlanError, slice_m, slice_n, seqlen_q, seqlen_k)
        blocks = blocks_of(seqlen_q, slice_m)
        why = []
        for name, tensor, ndim in (("ids", ids, 4), ("counts", counts, 3)):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
                given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                why.append(f"{name} is {given}, not an int32 tensor")
            elif tensor.ndim != ndim or tensor.shape[2] != blocks or 0 in tensor.shape[:3]:
                tail = ", L" if ndim == 4 else ""
                why.append(f"{name} {tuple(tensor.shape)} is not (batch, heads, {blocks}{tail})")
        if not why and ids.shape[:3] != counts.shape:
            why.append(f"ids {tuple(ids.shape)} and counts {tuple(counts.shape)} differ in batch or heads")
        if not why and ids.device != counts.device:
            why.append(f"ids is on {ids.device}, counts on {counts.device}")
        if why:
            raise PlanError("lists do not describe a plan: " + "; ".join(why))
        capacity = _checked_capacity(capacity)
        rows, width = counts.numel(), ids.shape[3]
        length = counts.long().clamp(0, width)
        offset, needed = layout(length)
        exact, even = capacity, False
        if exact is None:
            numbers = torch.stack([needed, (length != counts).sum(), length.sum(), length.max()])
            exact, illegal, total, longest = numbers.tolist()
            even = is_even(longest, total, rows)
            if illegal:
                raise PlanError(
                    f"lists do not describe a plan: {illegal} counts lie outside 0..{width}, the width of ids"
                )
        offset, length, overflow = fit(offset, length, needed, exact)
        # The last element of the slack takes every write that belongs to no list, so that no count is read back.
        buffer = torch.zeros(exact + PLAN_SLACK, dtype=torch.int32, device=ids.device)
        spare = buffer.numel() - 1
        flat, starts, lengths = ids.reshape(rows, width), offset.reshape(rows, 1), length.reshape(rows, 1)
        cells = torch.arange(width, device=ids.device)
        step = max(1, _CHUNK_CELLS // max(1, width))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            place = torch.where(cells < lengths[part], starts[part] + cells, spare)
            buffer.scatter_(0, place.reshape(-1), flat[part].to(torch.int32).reshape(-1))
        buffer[spare:].zero_()
        last = buffer[(offset + length - 1).clamp(min=0)]
        columns = blocks_of(seqlen_k, slice_n)
        short = columns * slice_n - seqlen_k
        keys = length * slice_n - ((length > 0) & (last == columns - 1)) * short
        geometry = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        overflow = overflow if capacity is not None else None
        return cls(buffer, offset, keys.to(torch.int32), **geometry, overflow=overflow, even=even)

    # ---- facts ----------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Batch entries stored; 1 means shared."""
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """Heads stored; 1 means shared."""
        return self.keys.shape[1]

    @property
    def blocks_q(self) -> int:
        """Query blocks, ceil(seqlen_q / slice_m)."""
        return blocks_of(self.seqlen_q, self.slice_m)

    @property
    def blocks_k(self) -> int:
        """Segments of the key sequence, ceil(seqlen_k / slice_n)."""
        return blocks_of(self.seqlen_k, self.slice_n)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def geometry(self) -> dict:
        """slice_m, slice_n, seqlen_q and seqlen_k as keyword arguments."""
        names = ("slice_m", "slice_n", "seqlen_q", "seqlen_k")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes of ids, offset and keys (work descriptors not counted)."""
        return sum(t.numel() * t.element_size() for t in (self.ids, self.offset, self.keys))

    @property
    def capacity(self) -> int:
        """Ids that lists can use: the buffer without its slack."""
        return self.ids.numel() - PLAN_SLACK

    @functools.cached_property
    def signature(self) -> tuple:
        """Everything about the plan that the soundness of a call depends on, besides the stored values."""
        return (
            type(self),
            *self.geometry.values(),
            self.batch,
            self.heads,
            self.device,
            self.density_bucket,
            self.nearly_full,
            self.grouped,
            self.even,
        )

    @functools.cached_property
    def signature_number(self) -> int:
        """Stands for the signature where it is looked up often: equal for plans of equal signature."""
        return number_of(self.signature)

    @functools.cached_property
    def density_bucket(self) -> int:
        """Minus log2 of the kept fraction, rounded down: 0 above 50 %, 1 above 25 %, ... Told by the allocation, so it
        asks nothing of the device; a capacity counts in full."""
        cells = self.keys.numel() * blocks_of(self.seqlen_k, self.slice_n)
        return max(cells // max(self.capacity, 1), 1).bit_length() - 1

    @functools.cached_property
    def nearly_full(self) -> bool:
        """Whether eight ninths of all segments or more are kept, as the allocation tells it."""
        return 9 * self.capacity >= 8 * self.keys.numel() * blocks_of(self.seqlen_k, self.slice_n)

    def counts(self) -> torch.Tensor:
        """Segments in each list: int64 (batch, heads, blocks_q), on the plan's device."""
        return (self.keys.long() + self.slice_n - 1) // self.slice_n

    @property
    def density(self) -> float:
        """Exact fraction of (query, key) pairs that are kept. Reads one number back from the device."""
        pairs = (self.keys.long() * block_rows(self.seqlen_q, self.slice_m, self.device)).sum()
        return int(pairs) / (self.batch * self.heads * self.seqlen_q * self.seqlen_k)

    # ---- use ------------------------------------------------------------------------------------------------------
    def work(self, batch: int, heads: int) -> torch.Tensor:
        """Work descriptors in the order in which the kernel takes them, made once per (batch, heads) and kept.

        int32 (batch * heads * blocks_q, 4): [query block, head | batch << 16, keys, offset // 8]. Heads go in groups
        whose K and V fill the L2 cache and no more; inside a group the longest list goes first, ties in the order of
        heads and blocks. Nothing is read back.
        """
        cached = self._work.get((batch, heads))
        if cached is None:
            cached = self._work[(batch, heads)] = self._make_work(batch, heads)
        return cached

    def _make_work(self, batch: int, heads: int) -> torch.Tensor:
        for name, asked, own in (("batch", batch, self.batch), ("heads", heads, self.heads)):
            if own not in (1, asked):
                raise PlanError(f"the plan holds {own} {name}, the call has {asked}: 1 (shared) or {asked} works")
        if not (1 <= batch <= MAX_WORK_BATCH and 1 <= heads <= MAX_WORK_HEADS):
            raise PlanError(f"batch {batch} or heads {heads} exceeds {MAX_WORK_BATCH} x {MAX_WORK_HEADS}")
        group = max(1, WORK_L2_BYTES // (self.seqlen_k * WORK_BYTES_PER_KEY))
        shape = (batch, heads, self.blocks_q)
        keys, offset = self.keys.expand(shape).reshape(-1), self.offset.expand(shape).reshape(-1)
        index = torch.arange(keys.numel(), device=self.device)
        block, head_of = index % self.blocks_q, index // self.blocks_q
        head, entry = head_of % heads, head_of // heads
        turn = entry * blocks_of(heads, group) + head // group
        # One int64 key: the group in the high part, then the longest list first. Lists never exceed 2^31 keys.
        order = torch.sort((turn << 32) - keys.long(), stable=True).indices
        packed = torch.stack([block, head | (entry << 16), keys.long(), offset // LIST_ALIGN], dim=-1)
        return packed[order].to(torch.int32)

    def to(self, device) -> Plan:
        """The same plan on another device; itself if it is there already."""
        if self.ids.device == torch.empty(0, device=device).device:
            return self
        names = ("ids", "offset", "keys", "overflow")
        moved = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return dataclasses.replace(self, **moved)

    def to_mask(self) -> SliceMask:
        """The mask that these lists keep. Reads the longest list's length back; ids out of range are left out."""
        from fgattn_cute import bits

        counts, offset = self.counts().reshape(-1, 1), self.offset.reshape(-1, 1)
        cells = torch.arange(max(1, int(counts.max())), device=self.device)
        columns = self.blocks_k
        step = max(1, _CHUNK_CELLS // max(columns, cells.numel()))
        words = []
        for first in range(0, counts.shape[0], step):
            part = slice(first, first + step)
            listed = self.ids[(offset[part] + cells).clamp(max=self.ids.numel() - 1)].long()
            legal = (cells < counts[part]) & (listed >= 0) & (listed < columns)
            keep = torch.zeros(listed.shape[0], columns + 1, dtype=torch.bool, device=self.device)
            keep.scatter_(1, torch.where(legal, listed, columns), True)
            words.append(bits.pack(keep[:, :columns]))
        packed = torch.cat(words).reshape(*self.keys.shape, -1)
        return SliceMask(packed, **self.geometry)

    def validate(self) -> list[str]:
        """Every way in which the stored values break the plan's rules, as sentences; empty when sound.

        Reads results back from the device (a synchronisation): meant for ``checks="full"`` and for tests.
        """
        counts, offset = self.counts(), self.offset
        inside = (offset >= 0) & (offset + counts <= self.ids.numel())
        why = []

        def need(ok: torch.Tensor, sentence: str) -> None:
            bad = int((~ok).sum())
            if bad:
                b, h, m = (~ok).nonzero()[0].tolist()
                why.append(f"{sentence}: {bad} lists, the first is batch {b}, head {h}, query block {m}")

        need((self.keys >= 0) & (self.keys <= self.seqlen_k), f"key count outside 0..{self.seqlen_k}")
        need(offset % LIST_ALIGN == 0, f"list does not start at a multiple of {LIST_ALIGN} ids")
        need(inside, "list outside the id buffer")
        if self.overflow is not None and bool(self.overflow):
            why.append(f"capacity {self.capacity} ids was too small: lists are cut")
        if why:
            return why
        faults = _list_faults(self, counts)
        need(~faults["range"], f"id outside 0..{self.blocks_k - 1}")
        order = "aligned runs first, then the rest, each ascending" if self.grouped else "ascending"
        need(~faults["order"], f"ids not {order}")
        need(~faults["duplicate"], "duplicate ids")
        short = self.blocks_k * self.slice_n - self.seqlen_k
        expected = counts * self.slice_n - faults["lists_last"] * short
        if not why:
            need(self.keys == expected, "key count does not match the list (whole segments, the last clipped)")
        return why

    # ---- storage --------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Writes the plan as a safetensors file with its geometry as metadata (needs the package safetensors)."""
        tensors = {name: getattr(self, name) for name in ("ids", "offset", "keys")}
        storage.save(path, "plan", tensors, self.geometry | {"grouped": int(self.grouped), "even": int(self.even)})

    @classmethod
    def load(cls, path: str | Path, device="cpu") -> Plan:
        """Reads a file written by ``save`` and validates it.

        Raises:
            PlanError: another kind of file, or lists that break the plan's rules.
        """
        tensors, geometry = storage.load(path, "plan", ("ids", "offset", "keys"), PlanError)
        plan = cls(**tensors, **geometry | {name: bool(geometry.get(name)) for name in ("grouped", "even")})
        why = plan.validate()
        if why:
            raise PlanError(f"{path}: " + "; ".join(why))
        return plan.to(device)

    def describe(self):
        """What the plan keeps and costs, as a printable mapping; see ``fgattn_cute.describe``."""
        from fgattn_cute.describe import describe_plan

        return describe_plan(self)

    def __repr__(self) -> str:
        facts = f"{', grouped' * self.grouped}{', even' * self.even}"
        return (
            f"Plan({self.blocks_q} query blocks of {self.slice_m}, segments of {self.slice_n}, "
            f"seqlen {self.seqlen_q} x {self.seqlen_k}, batch {self.batch}, heads {self.heads}, "
            f"capacity {self.capacity} ids{facts}, {self.nbytes} bytes, {self.device})"
        )


@functools.lru_cache(maxsize=4096)
def number_of(signature: tuple) -> int:
    """A number of its own for each signature, never given to another one."""
    return next(_signature_numbers)


def _checked_capacity(capacity: int | None) -> int | None:
    if capacity is None:
        return None
    if not isinstance(capacity, int) or capacity < 0:
        raise PlanError(f"capacity {capacity!r} is not a whole number of ids (or None for the exact number)")
    return align_up(capacity, LIST_ALIGN)


def _list_faults(plan: Plan, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per list: an id out of range, ids not ascending, ids repeated, and whether the last segment is listed."""
    counts, offset = counts.reshape(-1, 1), plan.offset.reshape(-1, 1)
    cells = torch.arange(max(2, int(counts.max())), device=plan.device)
    names = ("range", "order", "duplicate", "lists_last")
    found = {name: torch.zeros(plan.keys.numel(), dtype=torch.bool, device=plan.device) for name in names}
    step = max(1, _CHUNK_CELLS // max(cells.numel(), plan.blocks_k))
    for first in range(0, counts.shape[0], step):
        part = slice(first, first + step)
        listed = plan.ids[(offset[part] + cells).clamp(max=plan.ids.numel() - 1)]
        valid = cells < counts[part]
        found["range"][part] = (valid & ((listed < 0) | (listed >= plan.blocks_k))).any(-1)
        rank = _group_rank(listed, valid, plan.blocks_k) if plan.grouped else listed
        found["order"][part] = (valid[:, 1:] & (rank[:, 1:] < rank[:, :-1])).any(-1)
        ordered = torch.where(valid, listed, torch.iinfo(torch.int32).max).sort(-1).values
        found["duplicate"][part] = (valid[:, 1:] & (ordered[:, 1:] == ordered[:, :-1])).any(-1)
        found["lists_last"][part] = (valid & (listed == plan.blocks_k - 1)).any(-1)
    return {name: flags.view(plan.keys.shape) for name, flags in found.items()}


def _group_rank(listed: torch.Tensor, valid: torch.Tensor, columns: int) -> torch.Tensor:
    """Numbers that ascend along a grouped list: ids in aligned runs as they are, the others behind all of them.

    Args:
        listed: int32 (lists, n), ids; valid: bool (lists, n), which count.
    """
    octets = blocks_of(columns, LIST_ALIGN)
    octet = torch.where(valid & (listed >= 0) & (listed < columns), listed.long() // LIST_ALIGN, octets)
    size = torch.zeros(listed.shape[0], octets + 1, dtype=torch.int32, device=listed.device)
    size.scatter_add_(1, octet, torch.ones_like(octet, dtype=torch.int32))
    return listed.long() + columns * (size.gather(1, octet) != LIST_ALIGN)
