# SPDX-License-Identifier: Apache-2.0
"""What tests of unions in halves and of lists in parts have in common: inputs, and a call on the emulator."""

import pytest
import torch

import fgattn_cute as fg
from fgattn_cute import emulator


def quick(names, chosen):
    """Parameters, those that are not chosen slow."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


def inputs(mask, *, batch=1, heads=None, kv_heads=None, head_dim=128, dtype=torch.bfloat16):
    """q, k and v; keys that no block keeps are NaN, where each head has its own."""
    heads = heads or mask.heads
    q = torch.randn(batch, mask.seqlen_q, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, mask.seqlen_k, kv_heads or heads, head_dim).to(dtype) for _ in range(2))
    if (mask.batch, mask.heads, kv_heads or heads) == (batch, heads, heads):
        unused = ~mask.to_token_mask().any(2).transpose(1, 2)
        k[unused], v[unused] = float("nan"), float("nan")
    return q, k, v


def emulated(q, k, v, plan, **options):
    with emulator.session(seed=3, checks="all", num_sms=2):
        return fg.attention(q, k, v, plan, return_lse=True, backend="emulator", **options)
