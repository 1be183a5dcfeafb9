# SPDX-License-Identifier: Apache-2.0
"""Everyone who computes the same attention, each behind one small class.

``prepare`` takes the case's inputs and gives a function to time and what it computes; the time of a provider's own
planning is measured beside it, after a first one that compiles what it needs. A provider that cannot do a case says
why, in a sentence: that is a result too.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch

import fgattn_cute as fg
from fgattn_cute import convert
from perf.workloads import Case, Inputs

PAGED_PREFILL_BYTES = 1 << 28  # FlashInfer's integer workspace: its own 8 MiB is too small for many short rows
FLEX_BLOCK = 128  # rows and keys of a block of FlexAttention's, which its kernel's tiles must divide


class Absent(Exception):
    """The provider cannot do this case here; the message says why."""


@dataclasses.dataclass
class Prepared:
    """A provider ready to run one case.

    call: launches, returns out (1, S, H, D). dense: whether it computes every pair, mask or not.
    plan_ms: host time of the provider's own planning from the mask, None where there is nothing to plan.
    """

    call: Callable[[], torch.Tensor]
    dense: bool = False
    plan_ms: float | None = None
    note: str = ""


def timed(make: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """(result, wall milliseconds) of the second of two planning steps, waiting for the device before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    make()
    wait()
    start = time.perf_counter()
    made = make()
    wait()
    return made, 1e3 * (time.perf_counter() - start)


def ours(case: Case, x: Inputs) -> Prepared:
    """fgattn_cute with lists of the blocks' own; planning is Plan.from_mask and the work order."""
    return _ours(fg.Plan.from_mask, case, x)


def ours_best(case: Case, x: Inputs) -> Prepared:
    """fgattn_cute as a call with the mask runs it: the plan that the cost model picks, and picking it."""
    return _ours(fg.best_plan, case, x)


def ours_union(case: Case, x: Inputs) -> Prepared:
    """fgattn_cute with query blocks that share the gathered union of their keys; planning is UnionPlan.from_mask."""
    return _ours(fg.UnionPlan.from_mask, case, x)


def _ours(maker, case: Case, x: Inputs) -> Prepared:
    def make():
        plan = maker(x.mask)
        plan.work(1, case.heads)
        return plan

    plan, ms = timed(make, x.q.device)
    choice = fg.explain(x.q, x.k, x.v, plan).choice
    return Prepared(lambda: fg.attention(x.q, x.k, x.v, plan), plan_ms=ms, note=f"{choice.source}: {choice.spec.name}")


def _sdpa(backend: str):
    def provider(case: Case, x: Inputs) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        which = getattr(SDPBackend, backend)
        views = [t.transpose(1, 2) for t in (x.q, x.k, x.v)]

        def call():
            with sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(*views).transpose(1, 2)

        return Prepared(call, dense=True)

    provider.__doc__ = f"torch scaled_dot_product_attention, {backend}, dense."
    return provider


def flex(case: Case, x: Inputs) -> Prepared:
    """torch FlexAttention, compiled, with the same mask: whole blocks skipped, the rest looked up pair by pair."""
    from torch.nn.attention.flex_attention import flex_attention

    if x.q.device.type != "cuda":
        raise Absent("on the CPU it is another kernel")
    block = (case.slice_m, case.slice_n)
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if block == (64, 64) else None
    if options is None:
        block = tuple(math.lcm(size, FLEX_BLOCK) for size in block)
    block_mask, ms = timed(lambda: convert.to_flex(x.mask, block), x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    views = [t.transpose(1, 2) for t in (x.q, x.k, x.v)]
    run = lambda: compiled(*views, block_mask=block_mask, kernel_options=options)
    return Prepared(lambda: run().transpose(1, 2), plan_ms=ms, note=f"blocks of {block[0]} x {block[1]}")


def _flashinfer(backend: str):
    def provider(case: Case, x: Inputs) -> Prepared:
        import flashinfer

        pages = case.slice_n > 1 and not (case.seqlen % case.slice_m or case.seqlen % case.slice_n)
        kind = flashinfer.BlockSparseAttentionWrapper if pages else flashinfer.VariableBlockSparseAttentionWrapper
        room = [torch.empty(size, dtype=torch.uint8, device=x.q.device) for size in (1 << 29, PAGED_PREFILL_BYTES)]
        wrapper = kind(room[0], backend=backend)
        wrapper.reset_workspace_buffer(*room)
        options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        heads = case.heads
        if pages:
            # Its BSR wrapper takes one pattern for all heads: heads as blocks on the diagonal give each its own.
            options["o_data_type"] = torch.bfloat16
            make = lambda: wrapper.plan(*bsr_of_heads(x.mask), 1, 1, case.head_dim, **options)
            q, k, v = (t[0].transpose(0, 1).reshape(-1, 1, case.head_dim) for t in (x.q, x.k, x.v))
            call = lambda: wrapper.run(q, k, v).unflatten(0, (heads, -1))[:, :, 0].transpose(0, 1)[None]
        else:
            make = lambda: wrapper.plan(*convert.to_flashinfer_variable(x.mask), heads, heads, case.head_dim, **options)
            q, k, v = (t[0].transpose(0, 1).contiguous() for t in (x.q, x.k, x.v))
            call = lambda: wrapper.run(q, k, v).transpose(0, 1)[None]
        _, ms = timed(make, x.q.device)
        return Prepared(call, plan_ms=ms, note=kind.__name__)

    provider.__doc__ = f"FlashInfer, back end {backend}: BSR with pages of slice_n keys, or its variable blocks."
    return provider


def bsr_of_heads(mask: fg.SliceMask) -> tuple[torch.Tensor, torch.Tensor, int, int, int, int]:
    """(indptr, indices, M, N, R, C) of a BSR matrix with one head's blocks after the other on the diagonal."""
    keep = mask.to_dense()[0]
    head, _, column = keep.nonzero(as_tuple=True)
    counts = keep.sum(-1, dtype=torch.int64).flatten()
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    indices = (head * mask.blocks_k + column).to(torch.int32)
    heads = keep.shape[0]
    return indptr, indices, heads * mask.seqlen_q, heads * mask.seqlen_k, mask.slice_m, mask.slice_n


def flashinfer_cake(case: Case, x: Inputs) -> Prepared:
    """FlashInfer's own Hopper kernel for 64 x 64 blocks (back end cake_cute), at most 64 of them per query block."""
    import flashinfer

    if (case.slice_m, case.slice_n, case.head_dim) != (64, 64, 128) or case.seqlen % 64:
        raise Absent("it takes blocks of 64 x 64 that divide the sequence, and head dim 128")
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
        torch.empty(1 << 20, dtype=torch.uint8, device=x.q.device), backend="cake_cute"
    )
    arguments = (*convert.to_flashinfer_variable(x.mask), case.heads, case.heads, case.head_dim)
    options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    _, ms = timed(lambda: wrapper.plan(*arguments, **options), x.q.device)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (x.q, x.k, x.v))
    return Prepared(lambda: wrapper.run(q, k, v).transpose(0, 1)[None], plan_ms=ms)


def fa4_dense(case: Case, x: Inputs) -> Prepared:
    """flash-attn-4 (CuTe), dense: the yardstick."""
    from flash_attn.cute import flash_attn_func

    return Prepared(lambda: _first(flash_attn_func(x.q, x.k, x.v)), dense=True)


def fa4_block_sparse(case: Case, x: Inputs) -> Prepared:
    """flash-attn-4 (CuTe) with block-sparse tensors."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    if case.slice_m % 64 or case.slice_n not in (64, 128):
        raise Absent("its sm_90 kernel skips blocks of 64 or 128 keys and a multiple of 64 queries")
    (ids, counts), ms = timed(lambda: convert.to_q2k(x.mask), x.q.device)
    none = torch.zeros_like(counts)
    size = (case.slice_m, case.slice_n)
    sparse = BlockSparseTensorsTorch(none, torch.zeros_like(ids), counts, ids, block_size=size)
    return Prepared(lambda: _first(flash_attn_func(x.q, x.k, x.v, block_sparse_tensors=sparse)), plan_ms=ms)


def cudnn_bsa(case: Case, x: Inputs) -> Prepared:
    """cuDNN frontend's block-sparse attention, 64 x 64 or 128 x 128."""
    from cudnn import BSA

    if (case.slice_m, case.slice_n) not in ((64, 64), (128, 128)) or case.seqlen % case.slice_m:
        raise Absent("it takes blocks of 64 x 64 or 128 x 128 that divide the sequence")
    (ids, counts), ms = timed(lambda: convert.to_q2k(x.mask), x.q.device)
    views = [t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v)]
    options = {"q2k_block_nums": counts, "sparse_block_size": case.slice_m, "allow_empty_block_nums": True}
    run = lambda: BSA.block_sparse_attention_forward(*views, ids, **options)["o_tensor"]
    return Prepared(lambda: run().transpose(1, 2), plan_ms=ms)


def chipmunk(case: Case, x: Inputs) -> Prepared:
    """Chipmunk's column-sparse attention: [192, 1] columns, counts a multiple of 112, so it computes further keys."""
    import chipmunk.ops

    if (case.slice_m, case.slice_n, case.head_dim) != (192, 1, 128):
        raise Absent("it takes slices of 192 x 1 and head dim 128")
    (ids, counts), ms = timed(lambda: convert.to_chipmunk(x.mask, multiple_of=112), x.q.device)
    views = [t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v)]
    return Prepared(lambda: _first(chipmunk.ops.csp_attn(*views, ids, counts)).transpose(1, 2), plan_ms=ms)


def _first(result):
    return result[0] if isinstance(result, tuple) else result


PROVIDERS: dict[str, Callable[[Case, Inputs], Prepared]] = {
    "ours": ours,
    "ours-best": ours_best,
    "ours-union": ours_union,
    "fa4-dense": fa4_dense,
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "flashinfer-fa3": _flashinfer("fa3"),
    "flashinfer-fa2": _flashinfer("fa2"),
    "flashinfer-cake": flashinfer_cake,
    "fa4-block-sparse": fa4_block_sparse,
    "flex": flex,
    "cudnn-bsa": cudnn_bsa,
    "chipmunk": chipmunk,
}
