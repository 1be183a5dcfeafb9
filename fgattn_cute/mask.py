# SPDX-License-Identifier: Apache-2.0
"""SliceMask: which slices of the attention map are kept, as packed bits.

A slice is ``slice_m`` queries by ``slice_n`` keys. The last slice of a row or column may be cut by the sequence length;
density and every conversion count it with its true size. One bit per slice is about a tenth of the memory of int32
lists at 30 % density, so this is the form in which masks are kept, combined and exchanged.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from fgattn_cute import bits as _bits
from fgattn_cute.errors import MaskError


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
