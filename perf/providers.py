# SPDX-License-Identifier: Apache-2.0
"""Everyone who computes the same attention, each behind one small class.

``prepare`` takes the case's inputs and gives a function to time and what it computes; the time of a provider's own
planning is measured beside it. A provider that cannot do a case says why, in a sentence: that is a result too.
None but ``ours`` has been run from here yet; signatures are those of the libraries' documentation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

import fgattn_cute as fg
from fgattn_cute import convert
from perf.workloads import Case, Inputs

MAX_FLEX_CELLS = 1 << 28  # FlexAttention's block lists at (16, 1) slices would need more memory than a GPU has


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
    """(result, wall milliseconds) of a planning step, waiting for the device before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    made = make()
    wait()
    return made, 1e3 * (time.perf_counter() - start)


def ours(case: Case, x: Inputs) -> Prepared:
    """fgattn_cute with the kernel that a call takes; planning is Plan.from_mask."""
    plan, ms = timed(lambda: fg.Plan.from_mask(x.mask), x.q.device)
    spec = fg.explain(x.q, x.k, x.v, plan).choice
    return Prepared(lambda: fg.attention(x.q, x.k, x.v, plan), plan_ms=ms, note=f"{spec.source}: {spec.spec.name}")


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
    """torch FlexAttention, compiled, with the same mask where its blocks can hold it."""
    from torch.nn.attention.flex_attention import flex_attention

    cells = case.heads * -(-case.seqlen // case.slice_m) * -(-case.seqlen // case.slice_n)
    if cells > MAX_FLEX_CELLS or case.slice_n < 16 or case.slice_m % 128:
        raise Absent(f"slices of {case.slice_m} x {case.slice_n} are not blocks that its kernel can skip")
    block_mask, ms = timed(lambda: convert.to_flex(x.mask), x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    views = [t.transpose(1, 2) for t in (x.q, x.k, x.v)]
    return Prepared(lambda: compiled(*views, block_mask=block_mask).transpose(1, 2), plan_ms=ms)


def _flashinfer(backend: str):
    def provider(case: Case, x: Inputs) -> Prepared:
        import flashinfer

        if case.seqlen % case.slice_m or case.seqlen % case.slice_n:
            raise Absent("its blocks must divide the sequence")
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
            torch.empty(1 << 29, dtype=torch.uint8, device=x.q.device), backend=backend
        )
        arguments = convert.to_flashinfer_variable(x.mask)
        options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        _, ms = timed(lambda: wrapper.plan(*arguments, case.heads, case.heads, case.head_dim, **options), x.q.device)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (x.q, x.k, x.v))
        return Prepared(lambda: wrapper.run(q, k, v).transpose(0, 1)[None], plan_ms=ms)

    provider.__doc__ = f"FlashInfer VariableBlockSparseAttentionWrapper, back end {backend}."
    return provider


def fa4_dense(case: Case, x: Inputs) -> Prepared:
    """flash-attn-4 (CuTe), dense: the yardstick."""
    from flash_attn.cute import flash_attn_func

    return Prepared(lambda: _first(flash_attn_func(x.q, x.k, x.v)), dense=True)


def fa4_block_sparse(case: Case, x: Inputs) -> Prepared:
    """flash-attn-4 (CuTe) with block-sparse tensors of 128 x 128."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    if (case.slice_m, case.slice_n) != (128, 128):
        raise Absent("its sm_90 kernel skips blocks of 128 x 128 only")
    (ids, counts), ms = timed(lambda: convert.to_q2k(x.mask), x.q.device)
    none = torch.zeros_like(counts)
    sparse = BlockSparseTensorsTorch(none, torch.zeros_like(ids), counts, ids, block_size=(128, 128))
    return Prepared(lambda: _first(flash_attn_func(x.q, x.k, x.v, block_sparse_tensors=sparse)), plan_ms=ms)


def cudnn_bsa(case: Case, x: Inputs) -> Prepared:
    """cuDNN frontend's block-sparse attention, 64 x 64."""
    from cudnn import BSA

    if (case.slice_m, case.slice_n) != (64, 64) or case.seqlen % 64:
        raise Absent("it takes blocks of 64 x 64 that divide the sequence")
    (ids, counts), ms = timed(lambda: convert.to_q2k(x.mask), x.q.device)
    views = [t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v)]
    options = {"block_sparse_num": ids.shape[-1], "q2k_block_nums": counts, "sparse_block_size": 64, "layout": "bhsd"}
    run = lambda: _first(BSA.block_sparse_attention_forward(*views, ids, allow_empty_block_nums=True, **options))
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
    "fa4-dense": fa4_dense,
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "flashinfer-fa3": _flashinfer("fa3"),
    "flashinfer-fa2": _flashinfer("fa2"),
    "fa4-block-sparse": fa4_block_sparse,
    "flex": flex,
    "cudnn-bsa": cudnn_bsa,
    "chipmunk": chipmunk,
}
