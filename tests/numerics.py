# SPDX-License-Identifier: Apache-2.0
"""The error rule, as one assertion: what a result may differ from the fp32 oracle by.

Error of the output <= 2 x the error of an eager attention that computes in the inputs' own precision on the same keys,
plus one rounding band of that precision. The eager attention below gathers rows block by block and shares nothing with
the product but the plan it is given.
"""

import math

import torch

from fgattn_cute import reference

LSE_RTOL = 2**-20  # fp32 logarithm of an fp32 sum, a few units in the last place
LSE_ATOL = {torch.bfloat16: 2e-4, torch.float16: 2e-4, torch.float32: 2e-5}


def as_bhsd(x, layout):
    return x.transpose(1, 2) if layout == "bshd" else x


def token_mask(plan):
    """bool (B or 1, H or 1, Sq, Sk) of a Plan or SliceMask, read off its public lists or bits."""
    if hasattr(plan, "to_token_mask"):
        return plan.to_token_mask()
    keep = torch.zeros(*plan.keys.shape[:2], plan.seqlen_q, plan.seqlen_k, dtype=torch.bool, device=plan.ids.device)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in plan.keys.shape)).reshape(-1, 3).tolist():
        first, keys = int(plan.offset[b, h, m]), int(plan.keys[b, h, m])
        for i in range(math.ceil(keys / plan.slice_n)):
            start = int(plan.ids[first + i]) * plan.slice_n
            keep[b, h, m * plan.slice_m : (m + 1) * plan.slice_m, start : start + plan.slice_n] = True
    return keep


def eager(q, k, v, plan, scale=None, layout="bshd"):
    """Attention over the kept keys with every step in the inputs' dtype. Output in the layout of the inputs."""
    q, k, v = (as_bhsd(x, layout) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = token_mask(plan).expand(q.shape[0], q.shape[1], -1, -1)
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, q.shape[2], plan.slice_m):
                rows = slice(start, start + plan.slice_m)
                keys = keep[b, h, start].nonzero().flatten()
                if keys.numel():
                    scores = (q[b, h, rows] @ k[b, h // group, keys].T) * scale
                    out[b, h, rows] = torch.softmax(scores, -1) @ v[b, h // group, keys]
    return as_bhsd(out, layout)


def rounding_band(ref, dtype):
    """Largest change that one addition and subtraction of 0.3 makes in ``dtype``: the size of its rounding."""
    low = ref.to(dtype)
    return (low + 0.3 - 0.3 - low).abs().max().item()


def assert_within_contract(out, lse, q, k, v, plan, scale=None, layout="bshd"):
    """Asserts the whole numerical contract of one call.

    Args:
        out: result shaped like q.
        lse: (B, H, Sq) fp32, natural log, or None to leave it out.
        q, k, v, plan, scale, layout: the call's inputs.
    """
    ref, ref_lse = reference.attention(q, k, v, plan, scale=scale, return_lse=True, layout=layout)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert not out.isnan().any(), "NaN in the output"
    own = (out.float() - ref).abs().max().item()
    allowed = 2 * (eager(q, k, v, plan, scale, layout).float() - ref).abs().max().item() + rounding_band(ref, q.dtype)
    assert own <= allowed, f"error {own:.3e} exceeds {allowed:.3e}"

    empty = ~token_mask(plan).any(-1).expand(q.shape[0], ref_lse.shape[1], -1)
    assert (as_bhsd(out, layout)[empty] == 0).all(), "a row that keeps nothing is not exactly 0"
    if lse is None:
        return
    assert lse.shape == ref_lse.shape and lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, empty), "-inf of the LSE does not sit exactly at the rows that keep nothing"
    finite = ~empty
    difference = (lse - ref_lse)[finite].abs()
    band = LSE_ATOL[q.dtype] + LSE_RTOL * ref_lse[finite].abs()
    worst = (difference - band).max().item() if finite.any() else 0.0
    assert worst <= 0, f"LSE differs by {difference.max().item():.3e}"
