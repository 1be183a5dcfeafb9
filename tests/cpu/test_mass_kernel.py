# SPDX-License-Identifier: Apache-2.0
"""The mass kernels on the emulator, against the softmax of the whole attention map written out in float64.

A slice may be kept on one side only where its score lies within BAND of the threshold: the kernel computes in fp32,
with the hardware's approximate exponential (2 units in the last place), and sums in another order.
"""

import math

import pytest
import torch

from fgattn_cute import bits as _bits
from fgattn_cute import compile as compiler
from fgattn_cute import cubin, device_masks, emulator, predict
from fgattn_cute.errors import InputError
from fgattn_cute.kernels.mask_spec import BINS, MassSpec, plan_mass
from fgattn_cute.predict import Budget, Threshold, TopK, TopP, histograms

BAND = 2e-5  # relative distance of a score from the threshold, or from the edge of a bin
LSE_ERROR = 1e-5
POOLED_BAND = 0.03  # pooled means are rounded to 16 bits: 2^-9 of a score of up to about 8 nats
SELECT_BAND = 2**-11 + BAND  # the width of the last bin

# dtype, D, slice_m, slice_n, seqlen_q, seqlen_k, heads, kv_heads, statistic. Between them: every head dim, one to three
# consumer warpgroups, slices that share a warp's tile and slices of several parts, atoms of 1 to 128 keys, groups of
# many slices and slices of many tiles, several batches of words, and sequence ends at every kind of place.
CASES = {
    "flagship": ("bf16", 128, 128, 1, 200, 300, 2, 1, "mean"),
    "flagship, max": ("bf16", 128, 128, 1, 256, 256, 1, 1, "max"),
    "fine rows": ("bf16", 64, 16, 1, 70, 333, 2, 2, "mean"),
    "fine rows, several batches": ("bf16", 64, 16, 1, 40, 1100, 1, 1, "mean"),
    "blocks of 64 x 64": ("bf16", 64, 64, 64, 130, 500, 4, 2, "mean"),
    "three warpgroups": ("bf16", 64, 192, 2, 300, 290, 1, 1, "mean"),
    "three slices in three warpgroups": ("bf16", 64, 48, 8, 150, 420, 1, 1, "max"),
    "two parts": ("bf16", 64, 208, 3, 500, 300, 1, 1, "mean"),
    "three parts, long slices": ("bf16", 64, 400, 300, 410, 700, 1, 1, "mean"),
    "odd slices": ("fp16", 96, 32, 33, 100, 1000, 1, 1, "mean"),
    "slices longer than a tile": ("fp16", 64, 32, 256, 70, 1000, 1, 1, "max"),
    "wide heads": ("bf16", 256, 80, 4, 170, 300, 1, 1, "mean"),
    "one key": ("bf16", 64, 16, 1, 33, 1, 1, 1, "mean"),
    "rows": ("bf16", 128, 1, 1, 140, 300, 2, 1, "mean"),
    "rows, wide heads": ("fp16", 256, 1, 1, 30, 200, 1, 1, "mean"),
}
SLOW = {"flagship, max", "three slices in three warpgroups", "rows, wide heads", "slices longer than a tile"}
SLOW |= {"three parts, long slices", "blocks of 64 x 64", "wide heads"}


def named(names):
    return [pytest.param(CASES[name], id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def probabilities(q, k):
    """float64 (B, H, Sq, Sk)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5).softmax(-1)


def exact_scores(p, slice_m, slice_n, statistic):
    """float64 (B, H, blocks, columns), slice by slice."""
    rows = []
    for block in p.split(slice_m, 2):
        parts = block.split(slice_n, 3)
        rows.append([x.sum(3).mean(2) if statistic == "mean" else x.amax((2, 3)) for x in parts])
    return torch.stack([torch.stack(row, -1) for row in rows], 2)


class Problem:
    """Random queries and keys, and the exact scores of their slices."""

    def __init__(self, case, batch=1):
        dtype, head_dim, slice_m, slice_n, seqlen_q, seqlen_k, heads, kv_heads, statistic = case
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self.q = (torch.randn(batch, seqlen_q, heads, head_dim) * 2).to(kind)
        self.k = torch.randn(batch, seqlen_k, kv_heads, head_dim).to(kind)
        self.scale = head_dim**-0.5
        self.sizes = {"slice_m": slice_m, "slice_n": slice_n}
        self.options = {**self.sizes, "scale": self.scale, "statistic": statistic, "backend": "emulator"}
        k = self.k.repeat_interleave(heads // kv_heads, 2)
        logits = torch.einsum("bqhd,bkhd->bhqk", self.q.double(), k.double()) * self.scale
        self.lse = logits.logsumexp(-1)
        self.columns = -(-seqlen_k // slice_n)
        self.scores = exact_scores(logits.softmax(-1), slice_m, slice_n, statistic)

    def keep(self, tau):
        """Bool map of the kernel's bits; padding bits must be zero."""
        words = device_masks.slice_bits(self.q, self.k, self.lse.float(), tau, **self.options)
        everything = _bits.unpack(words, 32 * words.shape[-1])
        assert not everything[..., self.columns :].any(), "a bit past the last column is set"
        return everything[..., : self.columns]


def assert_flips_in_band(kept, scores, tau, band):
    """Every slice on which kernel and oracle disagree has a score within a relative band of the threshold."""
    wanted = scores >= tau
    flipped = (kept != wanted).nonzero()
    distance = (scores / tau - 1).abs()[kept != wanted]
    found = [f"{where.tolist()}: {d:.2e}" for where, d in zip(flipped, distance, strict=True)]
    assert (distance <= band).all(), f"slices flip away from the threshold, by its share: {'; '.join(found)}"


@pytest.mark.parametrize("case", named(CASES))
def test_bits(case):
    """A low, a middle and a high threshold, another for each head."""
    problem = Problem(case)
    ranked = problem.scores.flatten(2).sort(-1).values
    with emulator.session():
        for share in (0.05, 0.5, 0.95):
            tau = ranked[..., int(share * (ranked.shape[-1] - 1))].float()[..., None]
            assert_flips_in_band(problem.keep(tau), problem.scores, tau.double()[..., None], BAND)
        assert problem.keep(torch.tensor(0.0)).all()
        assert not problem.keep(torch.tensor(math.inf)).any()


def test_bits_exact_where_arithmetic_is():
    """Every probability is 1, so sums and maxima are whole numbers: nothing is rounded and nothing flips."""
    q = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16)
    k = torch.zeros(1, 256, 1, 64, dtype=torch.bfloat16)
    lse = torch.zeros(1, 1, 64)  # not that of these scores: it makes the mass of a slice the number of its keys
    with emulator.session():
        for slice_n in (1, 3, 8, 100, 200):
            lengths = torch.tensor([min(slice_n, 256 - start) for start in range(0, 256, slice_n)])
            options = {"slice_m": 16, "slice_n": slice_n, "scale": 1.0, "backend": "emulator"}
            for tau in (0.5, 1.0, float(slice_n), slice_n + 0.5):
                words = device_masks.slice_bits(q, k, lse, torch.tensor(tau), statistic="mean", **options)
                kept = _bits.unpack(words, lengths.numel())
                assert torch.equal(kept, (lengths >= tau).expand_as(kept)), (slice_n, tau)
        for tau in (1.0, 1.0 + 2**-20):
            words = device_masks.slice_bits(q, k, lse, torch.tensor(tau), statistic="max", **options)
            assert bool(_bits.unpack(words, lengths.numel()).all()) == (tau == 1)


@pytest.mark.parametrize("case", named(("flagship", "wide heads", "slices longer than a tile")))
def test_lse(case):
    problem = Problem(case, batch=2)
    with emulator.session():
        lse = device_masks.row_lse(problem.q, problem.k, scale=problem.scale, backend="emulator")
    assert (lse - problem.lse).abs().max() < LSE_ERROR


@pytest.mark.parametrize("case", named(("flagship", "blocks of 64 x 64", "rows", "flagship, max")))
def test_histogram(case):
    """Counts are exact but for scores at the edge of a bin; summed scores add up to what they must."""
    problem = Problem(case)
    edge = torch.tensor(histograms.LOWEST, dtype=torch.int32)
    low, high = problem.scores * (1 - BAND), problem.scores * (1 + BAND)
    ends = [(x.float().view(torch.int32) - edge) >> 20 for x in (low, high)]
    with emulator.session():
        counts, sums = (
            device_masks.histogram(
                problem.q, problem.k, problem.lse.float(), edge, shift=20, unit=unit, **problem.options
            ).long()
            for unit in (None, 2.0**20)
        )
    assert counts.shape[-1] == BINS and counts.sum() == (ends[0] >= 0).sum()
    for bins, at_least in ((ends[0], torch.le), (ends[1], torch.ge)):
        from_top = torch.stack([(bins >= i).sum(-1) for i in range(BINS)], -1)
        assert at_least(from_top, counts.flip(-1).cumsum(-1).flip(-1)).all()
    total = problem.scores.sum(-1)
    assert (sums.sum(-1) / 2**20 - total).abs().max() <= problem.columns * 2**-20 + BAND * total.max()


def test_any_schedule_gives_the_same():
    """Bits and histograms, whatever the order in which warps run and copies land."""
    problem = Problem(("bf16", 64, 16, 1, 70, 300, 1, 1, "mean"))
    edge, tau = torch.tensor(histograms.LOWEST, dtype=torch.int32), torch.tensor(1 / 300)
    found = []
    for seed in (0, 1, 4):
        with emulator.session(seed=seed):
            counts = device_masks.histogram(
                problem.q, problem.k, problem.lse.float(), edge, shift=20, unit=1e6, **problem.options
            )
            found.append((problem.keep(tau), counts))
    assert all(torch.equal(x, y) for run in found[1:] for x, y in zip(run, found[0], strict=True))


def test_strided_inputs():
    """Heads first, and a slice out of a larger tensor that TMA cannot address as it is."""
    problem = Problem(("bf16", 64, 64, 1, 64, 100, 2, 2, "mean"))
    tau = torch.tensor(0.01)
    wide = torch.zeros(1, 64, 2, 65, dtype=torch.bfloat16)
    wide[..., 1:] = problem.q
    with emulator.session():
        wanted = problem.keep(tau)
        problem.q = wide[..., 1:]
        problem.k = problem.k.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(problem.keep(tau), wanted)


# ---- the rules ------------------------------------------------------------------------------------------------------
SQ, SK, M, N = 70, 90, 16, 8


def inputs(batch=2, heads=4, kv_heads=2):
    q = (torch.randn(batch, SQ, heads, 64) * 2).to(torch.bfloat16)
    return q, torch.randn(batch, SK, kv_heads, 64).to(torch.bfloat16)


def find(function, q, k, select, backend, **options):
    return function(q, k, slice_m=M, slice_n=N, select=select, backend=backend, **options)


@pytest.mark.parametrize("statistic", ["mean", pytest.param("max", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "select",
    [Threshold([0.01, 0.05, 0.1, 1.0]), TopK(3), TopK([0, 1, 2, 1000]), TopP(0.7), TopP(0.0), Budget(0.3, sample=2)],
    ids=str,
)
def test_rules_agree_with_torch(select, statistic):
    """Kernel and torch path may differ in slices at the threshold alone: those of the last bin, and rounding."""
    q, k = inputs()
    with emulator.session():
        kept = find(predict.mass, q, k, select, "emulator", statistic=statistic).to_dense()
    wanted = find(predict.mass, q, k, select, "torch", statistic=statistic).to_dense()
    scores = exact_scores(probabilities(q, k), M, N, statistic)
    # The least score that the torch path keeps is its threshold: per block, or of all blocks for a budget.
    dims = (1, 2, 3) if isinstance(select, Budget) else (3,)
    tau = scores.masked_fill(~wanted, math.inf).amin(dims, keepdim=True)
    differ = kept != wanted
    assert ((scores / tau - 1).abs()[differ] <= SELECT_BAND).all()
    if isinstance(select, TopK):
        assert (kept.sum(-1) >= wanted.sum(-1)).all(), "a top-k keeps at least k"


@pytest.mark.parametrize("select", [Threshold(0.05), TopK(3), TopP(0.7), Budget(0.3)], ids=str)
def test_pooled_rules_agree_with_torch(select):
    q, k = inputs()
    with emulator.session():
        kept = find(predict.pooled, q, k, select, "emulator").to_dense()
    wanted = find(predict.pooled, q, k, select, "torch").to_dense()
    scores = probabilities(*(torch.stack([x.double().mean(1) for x in t.split(n, 1)], 1) for t, n in ((q, M), (k, N))))
    dims = (1, 2, 3) if isinstance(select, Budget) else (3,)
    tau = scores.masked_fill(~wanted, math.inf).amin(dims, keepdim=True)
    assert ((scores / tau - 1).abs()[kept != wanted] <= POOLED_BAND).all()
    assert (kept != wanted).float().mean() < 0.02


def test_budget_per_head_and_whole():
    q, k = inputs(batch=1)
    with emulator.session():
        own = find(predict.mass, q, k, Budget([0.1, 0.2, 0.3, 0.4], sample=1000), "emulator")
        none, every = (find(predict.mass, q, k, Budget(share), "emulator") for share in (0.0, 1.0))
    kept = own.to_dense().float().mean((0, 2, 3))
    assert kept.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    assert none.density == 0.0 and every.density == 1.0


def test_what_the_kernel_refuses():
    q, k = inputs()
    with pytest.raises(InputError, match=r"backend='torch' can\): float32 is not one of bf16, fp16"):
        find(predict.mass, q.float(), k.float(), TopK(1), "emulator")
    with pytest.raises(InputError, match="slice_m 24 is not a multiple of 16"):
        predict.mass(q, k, slice_m=24, slice_n=1, select=TopK(1), backend="emulator")
    with pytest.raises(InputError, match="head_dim 32 is not one of 64, 96, 128, 256"):
        find(predict.mass, q[..., :32], k[..., :32], TopK(1), "emulator")
    with pytest.raises(InputError, match="backend='cpu' is not one of"):
        find(predict.mass, q, k, TopK(1), "cpu")
    with pytest.raises(InputError, match=r"scale -1\.0 is not finite and at least 0"):
        find(predict.mass, q, k, TopK(1), "emulator", scale=-1.0)
    # A choice that nobody made falls back.
    assert find(predict.mass, q.float(), k.float(), TopK(1), None).density > 0


# ---- the compiled code ---------------------------------------------------------------------------------------------
GEOMETRIES = [(m, n) for m in (64, 128, 192, 208) for n in (1, 2, 3, 8, 64, 1000)] + [(1, 1)]


def every_spec():
    """The kernels behind all of these slices."""
    found = set()
    for head_dim in (64, 96, 128, 256):
        for dtype in ("bf16", "fp16"):
            for output in ("bits", "histogram", "lse"):
                for statistic in ("mean", "max"):
                    for m, n in GEOMETRIES if output != "lse" else [(1, 1)]:
                        options = {"slice_m": m, "slice_n": n, "seqlen_k": 10**5}
                        found.add(
                            plan_mass(head_dim=head_dim, dtype=dtype, output=output, statistic=statistic, **options)
                        )
    return sorted({spec for spec, _ in found}, key=lambda spec: spec.name)


def test_every_geometry_has_a_kernel_that_can_run():
    specs = every_spec()
    assert not [(spec.name, spec.reasons()) for spec in specs if spec.reasons()]
    assert len({spec.name for spec in specs}) == len(specs), "two kernels share a name"
    assert any(spec.ctas_per_sm == 2 for spec in specs if spec.head_dim == 128)


def quick_specs():
    """Kernels that the tests above compile too."""
    found = []
    for slice_m, slice_n, output in ((128, 1, "bits"), (128, 1, "histogram"), (1, 1, "lse"), (1, 1, "bits")):
        options = {"slice_m": slice_m, "slice_n": slice_n, "seqlen_k": 9999}
        found.append(plan_mass(head_dim=128, dtype="bf16", output=output, statistic="mean", **options)[0])
    return found


def check_code(spec: MassSpec):
    artifact = compiler.artifact(spec)
    instructions = cubin.opcodes(cubin.from_object(artifact.object_file))
    assert artifact.facts["stack_bytes"] == 0 and artifact.facts["smem_bytes"] == spec.smem_bytes()
    assert artifact.facts["registers"] * spec.num_threads * spec.ctas_per_sm <= 65536
    boxes = spec.head_dim * 2 // (64 if spec.head_dim == 96 else 128)  # a TMA box is one swizzle atom wide
    expected = {
        "HGMMA": spec.head_dim // 16,
        "WARPGROUP.DEPBAR": 1,  # ptxas serialises every product where a spill or a branch stands in between
        "STL": 0,
        "LDL": 0,
        "UTMALDG": boxes * (spec.consumer_warpgroups + 1),
        "RED": 0,
        "ATOMG": 0,  # nothing is added up in global memory
    }
    assert {name: cubin.count(instructions, name) for name in expected} == expected
    if spec.output == "bits" and spec.keeps_slots and spec.statistic == "mean":
        exponentials = cubin.count(instructions, "MUFU.EX2")
        assert exponentials == spec.tile_n // 2, "one exponential per score"


needs_nvdisasm = pytest.mark.skipif(cubin.nvdisasm() is None, reason="needs nvdisasm (nvidia-cuda-nvdisasm)")


@needs_nvdisasm
@pytest.mark.parametrize("spec", quick_specs(), ids=lambda spec: spec.name)
def test_compiled_code(spec):
    check_code(spec)


@needs_nvdisasm
@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in every_spec() if spec.dtype == "bf16"], ids=lambda spec: spec.name)
def test_compiled_code_of_every_kernel(spec):
    check_code(spec)
