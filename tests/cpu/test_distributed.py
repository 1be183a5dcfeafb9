# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that processes share equals attention of one process: masks cut by head and by key."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgattn_cute import SliceMask, distributed, reference
from fgattn_cute.errors import InputError, MaskError

ROOT = Path(__file__).resolve().parents[2]
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers (pip install 'fgattn-cute[diffusers]')"
)


@pytest.mark.parametrize(
    ("tasks", "world"),
    [
        ("functions", 2),
        ("functions,subgroup", 4),  # together: the processes cost more than what they compute
        pytest.param("diffusers", 2, marks=needs_diffusers),
        pytest.param("diffusers", 4, marks=[pytest.mark.slow, needs_diffusers]),
    ],
)
def test_processes_together_compute_what_one_computes(tasks, world, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_worker", tasks]
    logs = [tmp_path / f"{rank}.log" for rank in range(world)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                arguments = [*command, str(rank), str(world), str(tmp_path / "store")]
                workers.append(
                    subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        codes = [worker.wait(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)


# ---- cutting ----------------------------------------------------------------------------------------------------
def token_mask(mask):
    """bool (batch, heads, seqlen_q, seqlen_k) of what a mask keeps."""
    keep = mask.to_dense()
    rows, columns = (torch.arange(n) // s for n, s in ((mask.seqlen_q, mask.slice_m), (mask.seqlen_k, mask.slice_n)))
    return keep[:, :, rows][..., columns]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_part_of_a_mask_keeps_the_same_pairs(data):
    slice_n, seqlen_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 150))
    seqlen_q = data.draw(st.integers(1, 100))
    shape = (1, 2, -(-seqlen_q // 32), -(-seqlen_k // slice_n))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seqlen_k)) < 0.5
    mask = SliceMask.from_dense(keep, slice_m=32, slice_n=slice_n, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    start = data.draw(st.integers(0, seqlen_k - 1))
    stop = data.draw(st.integers(start + 1, seqlen_k))
    part = distributed.slice_keys(mask, start, stop)
    assert torch.equal(token_mask(part), token_mask(mask)[..., start:stop])
    assert torch.equal(token_mask(distributed.slice_heads(mask, range(1, 2))), token_mask(mask)[:, 1:])
    first = data.draw(st.integers(0, (seqlen_q - 1) // 16)) * 16
    part = distributed.slice_queries(mask, first, seqlen_q)
    assert torch.equal(token_mask(part), token_mask(mask)[:, :, first:])


def test_parts_that_no_kernel_could_run_are_refused():
    mask = SliceMask.full(slice_m=32, slice_n=4, seqlen_q=64, seqlen_k=64)
    for cut, arguments in (
        (distributed.slice_queries, (8, 64)),
        (distributed.slice_queries, (0, 40)),
        (distributed.slice_queries, (32, 96)),
        (distributed.slice_keys, (5, 5)),
        (distributed.slice_keys, (0, 65)),
    ):
        with pytest.raises(MaskError):
            cut(mask, *arguments)
    with pytest.raises(InputError, match="6 heads cannot be shared by 4"):
        distributed.head_range(6, 0, 4)


# ---- merging ----------------------------------------------------------------------------------------------------
def test_merging_equals_attention_over_both_sets_of_keys():
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    keep = torch.rand(1, 2, 3, 40) < 0.5
    keep[:, :, 0] = False  # no keys at all: out 0, lse -inf, and no NaN
    keep[:, :, 1, 20:] = False  # nothing in the second half
    geometry = {"slice_m": 16, "slice_n": 1, "seqlen_q": 40}
    whole = SliceMask.from_dense(keep, **geometry, seqlen_k=40)
    halves = [SliceMask.from_dense(part, **geometry, seqlen_k=20) for part in keep.split(20, -1)]
    parts = [
        reference.attention(q, *pair, mask, return_lse=True, dtype=torch.float64)
        for pair, mask in zip(zip(k.split(20, 1), v.split(20, 1), strict=True), halves, strict=True)
    ]
    out, lse = distributed.merge(*parts[0], *parts[1])
    expected, expected_lse = reference.attention(q, k, v, whole, return_lse=True)
    torch.testing.assert_close(out.float(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.float(), expected_lse, atol=1e-6, rtol=1e-5)
    assert (lse[:, :, :16] == -math.inf).all() and (out[:, :16] == 0).all()
