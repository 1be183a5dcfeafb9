# SPDX-License-Identifier: Apache-2.0
"""A whole CuTe DSL kernel, compiled and called as on a GPU: types, majors, operand sources, clusters, schedules."""

import functools

import cutlass
import pytest
import torch

from fgattn_cute import emulator
from tests.cpu.emulator.gemm import compile_gemm

TYPES = {
    cutlass.BFloat16: torch.bfloat16,
    cutlass.Float16: torch.float16,
    cutlass.Float8E4M3FN: torch.float8_e4m3fn,
    cutlass.Float8E5M2: torch.float8_e5m2,
}
compiled = functools.cache(compile_gemm)


def operand(rows, k, dtype, major):
    x = torch.randint(-3, 4, (rows, k)).float().to(dtype)
    return x if major == "k" else x.t().contiguous().t()


def check(kernel, dtype, majors, shape, emu):
    m, n, k = shape
    a, b = operand(m, k, dtype, majors[0]), operand(n, k, dtype, majors[1])
    c = torch.zeros(m, n, dtype=torch.float16)
    emu.outputs(c)
    kernel(a, b, c)
    assert torch.equal(c.float(), a.float() @ b.float().T)  # integers: exact in any order


@pytest.mark.parametrize(
    ("dtype", "majors", "options"),
    [
        (cutlass.BFloat16, ("k", "k"), {}),
        (cutlass.BFloat16, ("mn", "mn"), {}),
        (cutlass.Float16, ("k", "mn"), {"stages": 3}),
        (cutlass.Float16, ("mn", "k"), {"stages": 1}),
        (cutlass.BFloat16, ("k", "k"), {"a_source": "registers"}),
        (cutlass.Float8E4M3FN, ("k", "k"), {}),
        (cutlass.Float8E5M2, ("k", "k"), {"cluster": 2}),
        (cutlass.BFloat16, ("k", "mn"), {"cluster": 2}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_schedule_gives_the_exact_product(dtype, majors, options):
    kernel = compiled(dtype, *majors, **options)
    for m, n, k in ((200, 136, 256), (64, 64, 128), (8, 16, 512)):
        body = functools.partial(check, kernel, TYPES[dtype], majors, (m, n, k))
        reports = emulator.run_all_schedules(body, n=5)
        assert all(r.findings == [] for r in reports)


def test_counters_of_the_warp_roles():
    kernel = compiled(cutlass.BFloat16)
    m, n, k = 128, 64, 256
    with emulator.session() as emu:
        check(kernel, torch.bfloat16, ("k", "k"), (m, n, k), emu)
    (launch,) = emu.report()
    consumer, producer = sorted(launch.result.roles, key=lambda r: r.warps)
    assert consumer.registers == 216 and producer.registers == 40
    assert consumer.warps == (0, 1, 2, 3) and producer.warps == (4, 5, 6, 7)
    total = launch.result.counters
    assert total["wgmma_flops"] == 2 * m * n * k
    assert consumer.counters["wgmma_flops"] == 2 * m * n * k and producer.counters["wgmma_flops"] == 0
    # the loads: one A and one B tile of 64 x 64 bf16 per step of two CTAs; the store: C in fp16
    assert producer.counters["tma_load_bytes"] == 2 * (k // 64) * 2 * 64 * 64 * 2
    assert consumer.counters["tma_store_bytes"] == m * n * 2
    assert total["distinct_global_read_bytes"] == (m + n) * k * 2
    assert total["distinct_global_write_bytes"] == m * n * 2
    table = str(emu.report())
    assert "wgmma_flops" in table and f"{2 * m * n * k:,}" in table


def test_same_seed_same_report_on_any_number_of_threads():
    kernel = compiled(cutlass.BFloat16)
    a, b = operand(320, 256, torch.bfloat16, "k"), operand(192, 256, torch.bfloat16, "k")
    a, b = torch.randn_like(a), torch.randn_like(b)
    for seed in (0, 3, 4):
        seen = set()
        for threads in (1, 2, 2):
            c = torch.zeros(320, 192, dtype=torch.float16)
            with emulator.session(seed=seed, threads=threads) as emu:
                kernel(a, b, c)
            data = emu.report().to_dict()
            for launch in data["launches"]:
                launch.pop("seconds")
            seen.add((c.view(torch.int16).numpy().tobytes(), str(data)))
        assert len(seen) == 1, f"seed {seed}"


def test_different_seeds_run_different_schedules():
    kernel = compiled(cutlass.BFloat16)
    a, b = operand(64, 1024, torch.bfloat16, "k"), operand(64, 1024, torch.bfloat16, "k")
    instructions = set()
    for seed in emulator.schedules(6):
        with emulator.session(seed=seed) as emu:
            kernel(a, b, torch.zeros(64, 64, dtype=torch.float16))
        instructions.add(emu.report()[0].result.counters["instructions"])
    assert len(instructions) > 1  # spins of a wait that is not ready are counted


@pytest.mark.parametrize("lines", [1, 64])
def test_a_ragged_last_tile_leaves_the_memory_behind_the_output_alone(lines):
    kernel = compiled(cutlass.BFloat16)
    a, b = operand(64 + lines, 128, torch.bfloat16, "k"), operand(64, 128, torch.bfloat16, "k")
    whole = torch.full((200, 64), 7.0, dtype=torch.float16)
    with emulator.session():
        kernel(a, b, whole[: 64 + lines])
    assert (whole[64 + lines :] == 7).all()
