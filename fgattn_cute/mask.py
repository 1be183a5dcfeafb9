# SPDX-License-Identifier: Apache-2.0
"""SliceMask: which slices of the attention map are kept, as packed bits.

A slice is ``slice_m`` queries by ``slice_n`` keys. The last slice of a row or column may be cut by the sequence length;
density and every conversion count it with its true size. One bit per slice is about a tenth of the memory of int32
lists at 30 % density, so this is the form in which masks are kept, combined and exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from fgattn_cute import bits as _bits
from fgattn_cute import storage
from fgattn_cute.errors import MaskError

_CHUNK_CELLS = 1 << 26  # slices held as bool at a time while masks are reshaped


def blocks_of(seqlen: int, block: int) -> int:
    """Blocks that cover ``seqlen`` positions."""
    return -(-seqlen // block)


def check_geometry(error: type, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int) -> None:
    """Raises ``error`` unless all four are ints of at least 1."""
    names = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    wrong = [f"{name}={value!r}" for name, value in names.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise error(f"{', '.join(wrong)}: slice sizes and lengths are whole numbers of at least 1")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SliceMask:
    """Kept slices of an attention map.

    bits: int32 (batch, heads, ceil(seqlen_q / slice_m), words); bit ``j`` of word ``w`` is slice column ``32 * w + j``
        and bits past the last column are zero. A batch or heads of 1 is shared by all batch entries or heads.
    slice_m, slice_n: queries and keys of a slice.
    seqlen_q, seqlen_k: lengths in tokens.
    """

    bits: torch.Tensor
    slice_m: int
    slice_n: int
    seqlen_q: int
    seqlen_k: int

    def __post_init__(self):
        check_geometry(MaskError, self.slice_m, self.slice_n, self.seqlen_q, self.seqlen_k)
        if not isinstance(self.bits, torch.Tensor) or self.bits.dtype != torch.int32 or self.bits.ndim != 4:
            raise MaskError("bits is an int32 tensor (batch, heads, query blocks, words); from_dense packs a bool one")
        expected = (self.blocks_q, _bits.num_words(self.blocks_k))
        if tuple(self.bits.shape[2:]) != expected or 0 in self.bits.shape:
            raise MaskError(
                f"bits {tuple(self.bits.shape)} does not hold {self.blocks_q} x {self.blocks_k} slices: "
                f"(batch, heads, {expected[0]}, {expected[1]}) does"
            )

    # ---- construction ---------------------------------------------------------------------------------------------
    @classmethod
    def from_dense(cls, keep: torch.Tensor, *, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int) -> SliceMask:
        """Packs a bool map of slices.

        Args:
            keep: bool (batch, heads, ceil(seqlen_q / slice_m), ceil(seqlen_k / slice_n)), any device. Batch or heads
                may be 1, which means shared. A dimension expanded with stride 0 is recognised and stored once.
            slice_m, slice_n, seqlen_q, seqlen_k: the geometry of the map.

        Raises:
            MaskError: not a bool tensor, or a shape that does not match the geometry.
        """
        check_geometry(MaskError, slice_m, slice_n, seqlen_q, seqlen_k)
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
            given = keep.dtype if isinstance(keep, torch.Tensor) else type(keep).__name__
            raise MaskError(f"keep is {given}, not a bool tensor: compare it first, for example keep > 0")
        expected = (blocks_of(seqlen_q, slice_m), blocks_of(seqlen_k, slice_n))
        if keep.ndim != 4 or tuple(keep.shape[2:]) != expected or 0 in keep.shape:
            hint = " (add leading dimensions with keep[None, None])" if keep.ndim == 2 else ""
            raise MaskError(
                f"keep {tuple(keep.shape)} does not match seqlen_q={seqlen_q}, seqlen_k={seqlen_k} in slices of "
                f"{slice_m} x {slice_n}: it must be (batch, heads, {expected[0]}, {expected[1]}){hint}"
            )
        for dim in (0, 1):
            if keep.shape[dim] > 1 and keep.stride(dim) == 0:
                keep = keep.narrow(dim, 0, 1)
        return cls(_bits.pack(keep), slice_m, slice_n, seqlen_q, seqlen_k)

    @classmethod
    def full(
        cls, *, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int, batch: int = 1, heads: int = 1, device="cpu"
    ) -> SliceMask:
        """The mask that keeps everything."""
        check_geometry(MaskError, slice_m, slice_n, seqlen_q, seqlen_k)
        row = _bits.tail_mask(blocks_of(seqlen_k, slice_n), torch.device(device))
        words = row.expand(batch, heads, blocks_of(seqlen_q, slice_m), -1).contiguous()
        return cls(words, slice_m, slice_n, seqlen_q, seqlen_k)

    @classmethod
    def empty(
        cls, *, slice_m: int, slice_n: int, seqlen_q: int, seqlen_k: int, batch: int = 1, heads: int = 1, device="cpu"
    ) -> SliceMask:
        """The mask that keeps nothing."""
        check_geometry(MaskError, slice_m, slice_n, seqlen_q, seqlen_k)
        shape = (batch, heads, blocks_of(seqlen_q, slice_m), _bits.num_words(blocks_of(seqlen_k, slice_n)))
        words = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(words, slice_m, slice_n, seqlen_q, seqlen_k)

    # ---- facts ----------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Batch entries stored; 1 means shared."""
        return self.bits.shape[0]

    @property
    def heads(self) -> int:
        """Heads stored; 1 means shared."""
        return self.bits.shape[1]

    @property
    def blocks_q(self) -> int:
        """Query blocks, ceil(seqlen_q / slice_m)."""
        return blocks_of(self.seqlen_q, self.slice_m)

    @property
    def blocks_k(self) -> int:
        """Slice columns, ceil(seqlen_k / slice_n)."""
        return blocks_of(self.seqlen_k, self.slice_n)

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits."""
        return self.bits.numel() * self.bits.element_size()

    @property
    def geometry(self) -> dict:
        """slice_m, slice_n, seqlen_q and seqlen_k as keyword arguments."""
        names = ("slice_m", "slice_n", "seqlen_q", "seqlen_k")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def signature(self) -> tuple:
        """Everything about the mask that the soundness of a call depends on, besides the stored bits."""
        return (type(self), *self.geometry.values(), self.batch, self.heads, self.device)

    def kept_slices(self) -> torch.Tensor:
        """Kept slices of each query block: int64 (batch, heads, blocks_q), on the mask's device."""
        return _bits.count(self.bits)

    def kept_keys(self) -> torch.Tensor:
        """Kept keys of each query block: int64 (batch, heads, blocks_q), on the mask's device."""
        short = self.blocks_k * self.slice_n - self.seqlen_k
        return self.kept_slices() * self.slice_n - _bits.last_column(self.bits, self.blocks_k) * short

    def kept_pairs(self) -> torch.Tensor:
        """Kept (query, key) pairs of each head: int64 (batch, heads), on the mask's device."""
        return (self.kept_keys() * block_rows(self.seqlen_q, self.slice_m, self.device)).sum(-1)

    @property
    def density(self) -> float:
        """Exact fraction of (query, key) pairs that are kept. Reads one number back from the device."""
        pairs = self.batch * self.heads * self.seqlen_q * self.seqlen_k
        return int(self.kept_pairs().sum()) / pairs

    # ---- conversion -----------------------------------------------------------------------------------------------
    def to_dense(self) -> torch.Tensor:
        """bool (batch, heads, blocks_q, blocks_k)."""
        return _bits.unpack(self.bits, self.blocks_k)

    def to_token_mask(self) -> torch.Tensor:
        """bool (batch, heads, seqlen_q, seqlen_k): True where the pair of tokens is kept. Large."""
        keep = self.to_dense()
        rows = torch.arange(self.seqlen_q, device=self.device) // self.slice_m
        columns = torch.arange(self.seqlen_k, device=self.device) // self.slice_n
        return keep.index_select(-2, rows).index_select(-1, columns)

    def to(self, device) -> SliceMask:
        """The same mask on another device; itself if it is there already."""
        moved = self.bits.to(device)
        return self if moved is self.bits else dataclasses.replace(self, bits=moved)

    # ---- set algebra ----------------------------------------------------------------------------------------------
    def __or__(self, other: SliceMask) -> SliceMask:
        """Slices kept by either mask. A shared batch or heads dimension broadcasts."""
        return self._combined(other, torch.bitwise_or, "|")

    def __and__(self, other: SliceMask) -> SliceMask:
        """Slices kept by both masks."""
        return self._combined(other, torch.bitwise_and, "&")

    def __sub__(self, other: SliceMask) -> SliceMask:
        """Slices kept by this mask and not by the other."""
        return self._combined(other, lambda a, b: a & ~b, "-")

    def __invert__(self) -> SliceMask:
        """Slices that this mask skips."""
        return dataclasses.replace(self, bits=~self.bits & _bits.tail_mask(self.blocks_k, self.device))

    def _combined(self, other, operation, symbol: str) -> SliceMask:
        if not isinstance(other, SliceMask):
            return NotImplemented
        differ = [f"{n} {v} {symbol} {other.geometry[n]}" for n, v in self.geometry.items() if v != other.geometry[n]]
        for name in ("batch", "heads"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and 1 not in (mine, theirs):
                differ.append(f"{name} {mine} {symbol} {theirs}")
        if self.device != other.device:
            differ.append(f"device {self.device} {symbol} {other.device}")
        if differ:
            hint = " (bring both to one granularity with refine or coarsen)" if "slice_" in differ[0] else ""
            raise MaskError(f"masks do not fit together: {', '.join(differ)}{hint}")
        return dataclasses.replace(self, bits=operation(self.bits, other.bits))

    # ---- granularity and order ------------------------------------------------------------------------------------
    def refine(self, slice_m: int, slice_n: int) -> SliceMask:
        """The same kept pairs in finer slices; exact.

        Args:
            slice_m, slice_n: divisors of the mask's own.
        """
        self._check_multiple(self.slice_m, slice_m, self.slice_n, slice_n, "refine", "divisors")
        rows = torch.arange(blocks_of(self.seqlen_q, slice_m), device=self.device) * slice_m // self.slice_m
        columns = torch.arange(blocks_of(self.seqlen_k, slice_n), device=self.device) * slice_n // self.slice_n
        words = self.bits
        if slice_n != self.slice_n:
            words = self._repacked(lambda keep: keep.index_select(-1, columns), columns.numel())
        if slice_m != self.slice_m:
            words = words.index_select(-2, rows)
        return SliceMask(words, slice_m, slice_n, self.seqlen_q, self.seqlen_k)

    def coarsen(self, slice_m: int, slice_n: int) -> SliceMask:
        """Coarser slices, kept where any of their parts is kept; a superset of the kept pairs.

        Args:
            slice_m, slice_n: multiples of the mask's own.
        """
        self._check_multiple(slice_m, self.slice_m, slice_n, self.slice_n, "coarsen", "multiples")
        words = self.bits
        if slice_n != self.slice_n:
            group, columns = slice_n // self.slice_n, blocks_of(self.seqlen_k, slice_n)

            def merge(keep: torch.Tensor) -> torch.Tensor:
                padded = torch.nn.functional.pad(keep, (0, columns * group - keep.shape[-1]))
                return padded.unflatten(-1, (columns, group)).any(-1)

            words = self._repacked(merge, columns)
        if slice_m != self.slice_m:
            group, rows = slice_m // self.slice_m, blocks_of(self.seqlen_q, slice_m)
            padded = torch.nn.functional.pad(words, (0, 0, 0, rows * group - words.shape[-2]))
            parts = padded.unflatten(-2, (rows, group)).unbind(-2)
            words = functools.reduce(torch.bitwise_or, parts)
        return SliceMask(words.contiguous(), slice_m, slice_n, self.seqlen_q, self.seqlen_k)

    def permute_keys(self, permutation: torch.Tensor) -> SliceMask:
        """The mask of permuted keys: new key ``i`` is old key ``permutation[i]``, as in ``k[:, permutation]``.

        Args:
            permutation: integer (seqlen_k,), or (batch, heads, seqlen_k) for one order per head.

        Raises:
            MaskError: slice_n is not 1 (refine first), or not a permutation. Reads one bool back.
        """
        if self.slice_n != 1:
            raise MaskError(f"keys move one by one, but slice_n is {self.slice_n}: refine({self.slice_m}, 1) first")
        order = permutation.to(self.device, torch.int64)
        full = (self.batch, self.heads, self.seqlen_k)
        legal = order.shape[-1:] == (self.seqlen_k,) and order.ndim in (1, 3)
        if not legal or not torch.equal(order.sort(-1).values, torch.arange(self.seqlen_k).to(order).expand_as(order)):
            raise MaskError(f"{tuple(permutation.shape)} is no permutation of {self.seqlen_k} keys (shared or {full})")
        if order.ndim == 1:
            return dataclasses.replace(self, bits=self._repacked(lambda k: k.index_select(-1, order), self.seqlen_k))
        for name, mine, theirs in (("batch", self.batch, order.shape[0]), ("heads", self.heads, order.shape[1])):
            if mine != theirs and 1 not in (mine, theirs):
                raise MaskError(f"the permutation has {name} {theirs}, the mask {mine}")
        shape = (max(self.batch, order.shape[0]), max(self.heads, order.shape[1]))
        bits, order = self.bits.expand(*shape, -1, -1), order.expand(*shape, -1)
        words = [
            _bits.pack(_bits.unpack(row, self.seqlen_k).index_select(-1, index))
            for row, index in zip(bits.flatten(0, 1), order.flatten(0, 1), strict=True)
        ]
        return dataclasses.replace(self, bits=torch.stack(words).unflatten(0, shape))

    def select(self, batch=None, heads=None) -> SliceMask:
        """Part of the batch entries or heads, for head-parallel or split runs.

        Args:
            batch, heads: a slice or a list of indices; None takes all. A shared dimension stays shared.
        """
        bits = self.bits
        for dim, chosen in ((0, batch), (1, heads)):
            if chosen is not None and bits.shape[dim] > 1:
                index = torch.arange(bits.shape[dim])[chosen]
                if index.ndim != 1 or index.numel() == 0:
                    raise MaskError(f"{chosen!r} selects no list of entries: give a slice or indices")
                bits = bits.index_select(dim, index.to(bits.device))
        return dataclasses.replace(self, bits=bits)

    @staticmethod
    def _check_multiple(coarse_m: int, fine_m: int, coarse_n: int, fine_n: int, verb: str, what: str) -> None:
        if min(coarse_m, fine_m, coarse_n, fine_n) < 1 or coarse_m % fine_m or coarse_n % fine_n:
            asked = (fine_m, fine_n) if verb == "refine" else (coarse_m, coarse_n)
            own = (coarse_m, coarse_n) if verb == "refine" else (fine_m, fine_n)
            raise MaskError(f"cannot {verb} slices of {own[0]} x {own[1]} to {asked[0]} x {asked[1]}: {what} work")

    def _repacked(self, change, columns: int) -> torch.Tensor:
        """Words of ``change`` applied to the bool rows (r, blocks_k) -> (r, columns), some rows at a time."""
        rows = self.bits.flatten(0, 2)
        step = max(1, _CHUNK_CELLS // max(columns, self.blocks_k))
        parts = [
            _bits.pack(change(_bits.unpack(rows[i : i + step], self.blocks_k))) for i in range(0, rows.shape[0], step)
        ]
        return torch.cat(parts).reshape(*self.bits.shape[:3], -1)

    # ---- storage --------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Writes the mask as a safetensors file with its geometry as metadata (needs the package safetensors)."""
        storage.save(path, "mask", {"bits": self.bits}, self.geometry)

    @classmethod
    def load(cls, path: str | Path, device="cpu") -> SliceMask:
        """Reads a file written by ``save``.

        Raises:
            MaskError: another kind of file, or bits that do not match the geometry.
        """
        tensors, geometry = storage.load(path, "mask", ("bits",), MaskError)
        mask = cls(**tensors, **geometry)
        if not torch.equal(mask.bits & _bits.tail_mask(mask.blocks_k, mask.device), mask.bits):
            raise MaskError(f"{path}: bits are set past the last of {mask.blocks_k} slice columns")
        return mask.to(device)

    def describe(self, q=None, k=None, lse=None, **options):
        """What the mask keeps and costs, as a printable mapping; with q and k also the softmax mass it keeps.

        See ``fgattn_cute.describe.describe_mask`` for the entries and ``options``.
        """
        from fgattn_cute.describe import describe_mask

        return describe_mask(self, q, k, lse, **options)

    def __eq__(self, other) -> bool:
        """Same geometry, batch, heads and bits. Compares on the device of the left side and reads one bool back."""
        if not isinstance(other, SliceMask):
            return NotImplemented
        if self.geometry != other.geometry or self.bits.shape != other.bits.shape:
            return False
        return torch.equal(self.bits, other.bits.to(self.device))

    __hash__ = None  # equality reads tensors, so a mask is no dictionary key

    def __repr__(self) -> str:
        def owner(count: int, name: str) -> str:
            return f"{name} shared" if count == 1 else f"{count} {name}"

        return (
            f"SliceMask({self.blocks_q} x {self.blocks_k} slices of {self.slice_m} x {self.slice_n}, "
            f"seqlen {self.seqlen_q} x {self.seqlen_k}, {owner(self.batch, 'batch')}, {owner(self.heads, 'heads')}, "
            f"{self.nbytes} bytes, {self.device})"
        )


def block_rows(seqlen_q: int, slice_m: int, device) -> torch.Tensor:
    """Queries in each query block: int64 (ceil(seqlen_q / slice_m),); only the last can be shorter than slice_m."""
    start = torch.arange(0, seqlen_q, slice_m, device=device)
    return (seqlen_q - start).clamp(max=slice_m)
