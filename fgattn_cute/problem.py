# SPDX-License-Identifier: Apache-2.0
"""Problem: the static facts of one call, read off the tensors once and used by checks, select and explain."""

from __future__ import annotations

import dataclasses

import torch

LAYOUTS = ("bshd", "bhsd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What one attention call is, without its data. Hashable.

    batch, heads, kv_heads, head_dim: of q, k and v.
    seqlen_q, seqlen_k: tokens.
    dtype: element type of q.
    layout: "bshd" or "bhsd", the order of the dimensions as the caller gave them.
    device: where q lives.
    q_strides, k_strides, v_strides: elements between batch entries, tokens, heads and channels, in that order
        whatever the layout.
    slice_m, slice_n: the plan's slices.
    plan_batch, plan_heads: what the plan stores; 1 means shared.
    union_blocks: query blocks that share a list; 1 for a Plan.
    union_lists: "parts" for a PartsPlan, "halves" for a HalvesPlan, else "bits", as FwdSpec has it.
    density_bucket: minus log2 of the kept fraction, rounded down, as the plan's allocation tells it without asking the
        device. None where that is not known.
    nearly_full: whether eight ninths of all segments or more are kept, as the allocation tells it.
    grouped: whether lists have their aligned runs of 8 keys first.
    even: whether lists are known to be of nearly the same length; not asked of lists that blocks share.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layout: str
    device: torch.device
    q_strides: tuple[int, int, int, int]
    k_strides: tuple[int, int, int, int]
    v_strides: tuple[int, int, int, int]
    slice_m: int
    slice_n: int
    plan_batch: int
    plan_heads: int
    union_blocks: int = 1
    union_lists: str = "bits"
    density_bucket: int | None = None
    nearly_full: bool = False
    grouped: bool = False
    even: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan, layout: str = "bshd") -> Problem:
        """Reads the facts of rank-4 tensors; judges nothing."""
        q, k, v = (as_bshd(x, layout) for x in (q, k, v))
        return cls(
            batch=q.shape[0],
            seqlen_q=q.shape[1],
            seqlen_k=k.shape[1],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            dtype=q.dtype,
            layout=layout,
            device=q.device,
            q_strides=tuple(q.stride()),
            k_strides=tuple(k.stride()),
            v_strides=tuple(v.stride()),
            slice_m=plan.slice_m,
            slice_n=plan.slice_n,
            plan_batch=plan.batch,
            plan_heads=plan.heads,
            union_blocks=getattr(plan, "union_blocks", 1),
            union_lists=getattr(plan, "union_lists", "bits"),
            density_bucket=getattr(plan, "density_bucket", None),
            nearly_full=getattr(plan, "nearly_full", False),
            grouped=getattr(plan, "grouped", False),
            even=getattr(plan, "even", False),
        )

    @property
    def rows(self) -> int:
        """Queries that share a list: of one block, or of all blocks of a union."""
        return self.slice_m * self.union_blocks

    @property
    def group_size(self) -> int:
        """Query heads per K/V head."""
        return self.heads // self.kv_heads

    @property
    def dtype_name(self) -> str:
        """ "bf16" or "fp16", as FwdSpec spells it; torch's name for any other type."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, str(self.dtype).removeprefix("torch."))

    @property
    def blocks_q(self) -> int:
        """Query blocks of one head."""
        return -(-self.seqlen_q // self.slice_m)

    def effective_flops(self) -> int:
        """Multiply-adds times two of dense attention at these lengths: 4 * D * Sq * Sk per head."""
        return 4 * self.head_dim * self.seqlen_q * self.seqlen_k * self.heads * self.batch

    def describe(self) -> str:
        """One line: shapes, type, lengths, slices and device."""
        kv = "" if self.kv_heads == self.heads else f" (kv {self.kv_heads})"
        return (
            f"batch {self.batch}, heads {self.heads}{kv}, head_dim {self.head_dim}, {self.dtype_name}, "
            f"seqlen {self.seqlen_q} x {self.seqlen_k}, slices {self.slice_m} x {self.slice_n}, "
            f"{self.layout}, {self.device}"
        )


def as_bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A (batch, seqlen, heads, head_dim) view of a tensor in ``layout``; no copy."""
    return x if layout == "bshd" else x.transpose(1, 2)
