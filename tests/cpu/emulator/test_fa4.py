# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-4's Hopper forward kernel from PyPI: a kernel of other authors, whose results on real chips are good.

pip install --no-deps flash-attn-4==4.0.0b36 quack-kernels einops
"""

import importlib.util
import math
import sys
import types

import pytest
import torch

from fgattn_cute import emulator

pytestmark = pytest.mark.fa4


@pytest.fixture(scope="module")
def attention():
    """FA4's forward with the patches that let it take CPU tensors for device tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
        patch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
        if importlib.util.find_spec("triton") is None:  # quack's __init__ imports it, the parts used here do not
            package = types.ModuleType("quack")
            package.__path__ = list(importlib.util.find_spec("quack").submodule_search_locations)
            patch.setitem(sys.modules, "quack", package)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        from flash_attn.cute.interface import _flash_attn_fwd

        yield _flash_attn_fwd


def reference(q, k, v, lengths, causal=False, window=None):
    """fp32 attention in (B, S, H, D) with grouped heads; returns out and LSE (B, H, Sq)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    row, key = torch.arange(q.shape[2])[None, :, None], torch.arange(k.shape[2])[None, None]
    limit = lengths[:, None, None]
    offset = limit - q.shape[2]
    hidden = key >= limit
    if causal:
        hidden = hidden | (key > row + offset)
    if window:
        hidden = hidden | (key > row + offset + window[1]) | (key < row + offset - window[0])
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    out = torch.softmax(scores, -1).nan_to_num(0) @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2), torch.logsumexp(scores, -1)


def paged(k, page, table):
    """Pages of K or V in the table's order; what no key fills is NaN, so that reading it shows."""
    pages = torch.full((table.numel(), page, *k.shape[2:]), math.nan, dtype=k.dtype)
    for b in range(k.shape[0]):
        for j in range(table.shape[1]):
            piece = k[b, j * page : (j + 1) * page]
            pages[table[b, j], : len(piece)] = piece
    return pages


CASES = {
    "dense": {},
    "causal": {"causal": True},
    "causal, grouped heads, ragged": {"shape": (2, 200, 333, 4, 2, 64), "causal": True},
    "window": {"shape": (1, 300, 300, 1, 1, 64), "window": (64, 0)},
    "pages of one tile by TMA": {"shape": (1, 256, 384, 2, 2, 128), "page": 128},
    "pages of 16 keys by cp.async gather": {"shape": (2, 128, 304, 2, 2, 128), "page": 16, "lengths": [300, 171]},
}
# FA4 writes gathered K and V by cp.async (generic proxy) and reads them by WGMMA (async proxy) with no proxy fence.
KNOWN = {"pages of 16 keys by cp.async gather": {"proxy"}}


@pytest.mark.parametrize("name", CASES)
def test_forward(attention, name):
    case = CASES[name]
    b, sq, sk, h, hk, d = case.get("shape", (1, 256, 256, 2, 2, 128))
    q = torch.randn(b, sq, h, d).bfloat16()
    k, v = (torch.randn(b, sk, hk, d).bfloat16() for _ in range(2))
    lengths = torch.tensor(case.get("lengths", [sk] * b), dtype=torch.int32)
    options = {"causal": case.get("causal", False)}
    if "window" in case:
        options["window_size_left"], options["window_size_right"] = case["window"]
    keys, values = k, v
    if "page" in case:
        per_sequence = -(-sk // case["page"])
        table = torch.randperm(b * per_sequence).view(b, per_sequence).int()
        keys, values = paged(k, case["page"], table), paged(v, case["page"], table)
        options["page_table"] = table
    if "lengths" in case:
        options["seqused_k"] = lengths
    want, want_lse = reference(q, k, v, lengths, options["causal"], case.get("window"))
    for seed in emulator.schedules(4):
        out = torch.empty_like(q)
        with emulator.session(seed=seed, on_violation="collect", outputs=[out]) as emu:
            lse = attention(q, keys, values, return_lse=True, out=out, **options)[1]
        assert emu.report().kinds <= KNOWN.get(name, set()), str(emu.report())
        error = (out.float() - want).abs().max().item()
        half_ulp = 2.0**-9 * want.abs().max().item()  # of bf16 at the largest output
        assert error < 2 * half_ulp + 1e-3, f"seed {seed}: {error}"
        finite = torch.isfinite(want_lse)
        assert (lse - want_lse)[finite].abs().max() < 1e-4 and torch.equal(torch.isfinite(lse), finite)
