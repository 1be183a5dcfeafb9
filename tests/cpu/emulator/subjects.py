# SPDX-License-Identifier: Apache-2.0
"""The kernels that the mutation suite breaks: the tests' own GEMM in two forms, and the product's forward kernel."""

import contextlib

import torch

import fgattn_cute as fg
from tests.cpu.emulator.mutation import Subject


@contextlib.contextmanager
def nan_filled_memory():
    """`torch.empty` gives NaN: outputs that the product allocates cannot hold the last run's right result."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gemm(name, **options):
    """Integer data, so that the result is exact; K of eight steps through two stages, ragged M and N."""
    import cutlass

    from tests.cpu.emulator.gemm import compile_gemm

    compiled = compile_gemm(cutlass.BFloat16, **options)
    a, b = (torch.randint(-3, 4, (rows, 512)).to(torch.bfloat16) for rows in (200, 136))
    want = a.float() @ b.float().T

    def run(emu):
        c = torch.zeros(200, 136, dtype=torch.float16)
        emu.outputs(c)
        compiled(a, b, c)
        return float((c.float() - want).abs().max().nan_to_num(float("inf")))

    return Subject(name, "Gemm", run, 0.0)


def problem(spec, slice_m, seqlens, heads, density, last_keys, kind):
    """q, k, v, a plan of a kind and the oracle's out and LSE. Block 0 of head 0 keeps nothing, the last block
    `last_keys` keys; with `last_keys` 0 every block keeps 21."""
    sq, sk = seqlens
    q, k, v = (torch.randn(1, n, heads, spec.head_dim).to(torch.bfloat16) for n in (sq, sk, sk))
    allowed = torch.rand(1, heads, 1, sk) < 0.8
    allowed[..., 0] = False
    keep = (torch.rand(1, heads, -(-sq // slice_m), sk) < density / 0.8) & allowed
    keep[0, 0, 0] = False
    for row in [keep[0, -1, -1]] if last_keys else keep.flatten(0, 2):
        row[row.nonzero()[last_keys or 21 :]] = False
    mask = fg.SliceMask.from_dense(keep, slice_m=slice_m, slice_n=1, seqlen_q=sq, seqlen_k=sk)
    plan = kind.from_mask(mask)
    out, lse = fg.reference.attention(q, k, v, mask, return_lse=True)
    used = keep.any(2).transpose(1, 2)[..., None]
    k, v = (torch.where(used, x, float("nan")) for x in (k, v))
    return q, k, v, plan, out.float(), lse


def forward(
    name, density=0.4, seqlens=(192, 1200), heads=1, slice_m=None, tile_n=64, kind=fg.Plan, options=None, **fields
):
    """fg.attention on random lists, against the fp32 oracle.

    What the kernel must not use shows if it is used: keys that a head keeps nowhere are NaN in K and V, key 0 among
    them (the id that pads lists). Lists are eight tiles long, so that every slot of every ring is used again; the
    last list ends inside its last tile, in a second problem inside its first, and in a third all lists do. The bound
    on the logits does away with the redo pass, which would repair what a broken fixed-reference kernel gets wrong.
    """
    from fgattn_cute.kernels.spec import FwdSpec

    spec = FwdSpec(head_dim=64, tile_n=tile_n, **fields)
    slice_m = slice_m or spec.tile_m
    problems = [problem(spec, slice_m, seqlens, heads, density, keys, kind) for keys in (7 * tile_n + 21, 21, 0)]

    def run(emu):
        worst = 0.0
        for q, k, v, plan, want, want_lse in problems:
            how = {"return_lse": True, "backend": "emulator", "spec": spec, "logit_bound": 15.0}
            with nan_filled_memory():
                out, lse = fg.attention(q, k, v, plan, **how)
            finite = torch.isfinite(want_lse)
            lse_error = (lse - want_lse)[finite].abs().max() if torch.equal(torch.isfinite(lse), finite) else 1e9
            error = torch.maximum((out.float() - want).abs().max(), torch.as_tensor(10.0 * lse_error))
            worst = max(worst, float(error.nan_to_num(1e9)))
        return worst

    return Subject(name, spec.name, run, 0.02, options or {})


SUBJECTS = {
    "GEMM, A from shared memory": lambda: gemm("gemm"),
    "GEMM, A from registers": lambda: gemm("gemm-rs", a_source="registers"),
    "GEMM, cluster of two with multicast": lambda: gemm("gemm-cluster", cluster=2),
    "forward, exact softmax, one warpgroup": lambda: forward("exact", softmax="exact", tile_m=64),
    "forward, fixed reference, persistent, ping-pong": lambda: forward(
        "fixed_ref",
        scheduler="zigzag",
        ping_pong=True,
        q_source="registers",
        heads=2,
        seqlens=(256, 1200),
        options={"num_sms": 1},  # one CTA strides over all items
    ),
    "forward, union in halves": lambda: forward(
        "halves", kind=fg.HalvesPlan, union_blocks=4, union_lists="halves", slice_m=32, tile_n=128, kv_stages=3
    ),
    "forward, consumer's fence, blocks of 48 queries": lambda: forward(
        "rows", softmax="exact", tile_m=64, proxy_fence="consumer", slice_m=48, seqlens=(144, 1200)
    ),
}
