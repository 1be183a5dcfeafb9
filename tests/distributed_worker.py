# SPDX-License-Identifier: Apache-2.0
"""What each process of the distributed tests does: python -m tests.distributed_worker TASKS RANK WORLD STORE.

Each process computes the shared result and the one of a single process, and compares them; a difference is a failure.
"""

import sys

import torch
import torch.distributed as dist

from fgattn_cute import SliceMask, distributed, reference
from tests import video_models

SLICE_M = 16


def case(lengths, heads, kv_heads=None, slice_n=1, shared_heads=False):
    random = torch.Generator().manual_seed(len(lengths) * 100 + heads)
    seqlen, kv_heads = sum(lengths), kv_heads or heads
    q = torch.randn(2, seqlen, heads, 24, generator=random)
    k, v = torch.randn(2, 2, seqlen, kv_heads, 24, generator=random)
    shape = (2, 1 if shared_heads else heads, -(-seqlen // SLICE_M), -(-seqlen // slice_n))
    keep = torch.rand(shape, generator=random) < 0.2
    keep[0, 0, 1] = False  # a block of queries that keeps nothing, on any process
    mask = SliceMask.from_dense(keep, slice_m=SLICE_M, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen)
    return q, k, v, mask


def own(x, lengths, rank):
    return x[:, sum(lengths[:rank]) : sum(lengths[: rank + 1])]


def check_functions(rank, world):
    even, odd = [48] * world, [16 * (1 + r % 3) for r in range(world - 1)] + [21]
    for lengths in (even, odd):
        for options in ({}, {"slice_n": 5}, {"kv_heads": world}, {"shared_heads": True}):
            q, k, v, mask = case(lengths, 2 * world, **options)
            expected = own(reference.attention(q, k, v, mask), lengths, rank)
            parts = [own(x, lengths, rank) for x in (q, k, v)]
            given = None if lengths is even else lengths
            out = distributed.ulysses(*parts, mask, lengths=given, attend=reference.attention)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            start = sum(lengths[:rank])
            rows = distributed.slice_queries(mask, start, start + lengths[rank])
            out = distributed.ring(*parts, rows, lengths=given, attend=reference.attention)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(distributed.gather_tokens(parts[0], lengths=given), q)


def check_subgroup(rank, world):
    """A ring inside part of the processes: ranks of the group are not ranks of the world."""
    groups = [dist.new_group(list(range(first, first + world // 2))) for first in (0, world // 2)]
    group, place = groups[rank // (world // 2)], rank % (world // 2)
    lengths = [32] * (world // 2)
    q, k, v, mask = case(lengths, 4)
    expected = own(reference.attention(q, k, v, mask), lengths, place)
    parts = [own(x, lengths, place) for x in (q, k, v)]
    rows = distributed.slice_queries(mask, 32 * place, 32 * place + 32)
    out = distributed.ring(*parts, rows, group, attend=reference.attention)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out = distributed.ulysses(*parts, mask, group, attend=reference.attention)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def check_diffusers(rank, world):
    """diffusers shards a Wan transformer; sparse attention inside equals the model of one process."""
    from diffusers import ContextParallelConfig

    from fgattn_cute.integrations.diffusers import SparsePolicy, enable

    torch.accelerator.device_count = lambda: 1  # diffusers places ranks on accelerators, and a CPU has none
    inputs = video_models.wan_inputs(grid=(2, 4, 2 * world))
    per_head = {"tau": 0.01, "layers": {0: {"tau": [0.01 + 0.005 * head for head in range(2 * world)]}}}
    for kind, options in (
        ("ulysses", per_head),
        ("ulysses", per_head | {"tile": (2, 2, 3)}),
        ("ulysses", {"density": 1.0}),
        ("ring", per_head),
        ("ring", {"rule": "radial", "rule_options": {"decay": 0.2}}),
    ):
        torch.manual_seed(5)
        model = video_models.wan(heads=2 * world, layers=2)
        policy = SparsePolicy(slice_m=16, dense_steps=0, **options)
        with torch.no_grad():
            with enable(model, policy) as handle:
                expected = model(**inputs, return_dict=False)[0]
            alone = handle.report().rows()
            model.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": world}))
            with enable(model, policy) as handle:
                out = model(**inputs, return_dict=False)[0]
            shared = handle.report().rows()
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        assert [row["action"] for row in shared] == ["find"] * 2
        for mine, whole in zip(shared, alone, strict=True):
            if kind == "ulysses":  # two heads here, all queries
                assert mine["density"] == whole["density"][2 * rank : 2 * rank + 2]
            else:  # all heads here, some of the queries
                density = torch.tensor(mine["density"])
                dist.all_reduce(density)
                torch.testing.assert_close((density / world).tolist(), whole["density"])
    check_refusals(world, inputs)


def check_refusals(world, inputs):
    from diffusers import ContextParallelConfig

    from fgattn_cute.errors import UnsupportedError
    from fgattn_cute.integrations.diffusers import SparsePolicy, enable

    model = video_models.wan(heads=world, layers=1)
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=world))
    for options, message in (({"tile": (2, 2, 3)}, "ulysses_degree"), ({"slice_m": 48}, "whole query blocks")):
        policy = SparsePolicy(**{"slice_m": 16, "tau": 0.1, "dense_steps": 0} | options)
        with enable(model, policy), torch.no_grad():
            try:
                model(**inputs)
            except UnsupportedError as error:
                assert message in str(error)
            else:
                raise AssertionError(f"a ring with {options} was not refused")


TASKS = {"functions": check_functions, "subgroup": check_subgroup, "diffusers": check_diffusers}


def main():
    tasks, rank, world, store = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for task in tasks:
            TASKS[task](rank, world)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
