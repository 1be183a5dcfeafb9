# SPDX-License-Identifier: Apache-2.0
"""Cases of the forward kernel, shared by the emulator's tests and the GPU's: masks, inputs, and one way to run them."""

import contextlib
import dataclasses
import math
import zlib
from typing import NamedTuple
from unittest import mock

import torch

import fgattn_cute as fg
from fgattn_cute import emulator, gpu, launch
from fgattn_cute.kernels.spec import FwdSpec
from fgattn_cute.problem import Problem
from fgattn_cute.select import select
from tests.numerics import assert_within_contract

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (64, 96, 128, 256)
SLICE_MS = (16, 32, 48, 64, 80, 96, 128, 192, 256, 320, 384)
SLICE_NS = (1, 2, 3, 5, 8, 16, 64, 100, 128)
SEQLENS = ((1, 1), (64, 129), (113, 211), (200, 333), (257, 512))
FILLS = ("empty rows", "one key", "1 %", "30 %", "100 %", "ladder")


class Heads(NamedTuple):
    """Batch entries and heads of a call, and how many of each its plan stores (1: shared)."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    mask_batch: int = 1
    mask_heads: int = 1


HEADS = (
    Heads(),
    Heads(2, 2, 2, 2, 2),
    Heads(1, 4, 1, 1, 4),  # one K/V head for all
    Heads(2, 4, 2, 1, 1),  # grouped heads, one list for everything
    Heads(2, 2, 1, 1, 2),  # lists shared by the batch
    Heads(2, 3, 3, 2, 1),  # lists shared by the heads
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call. spec: a FwdSpec, a preset's id, or None for the preset that the call would take.

    num_sms and seed belong to the emulator: SMs of the chip (few make a persistent CTA take several items), schedule.
    """

    dtype: str = "bf16"
    head_dim: int = 64
    slice_m: int = 64
    slice_n: int = 1
    seqlens: tuple = (200, 333)
    fill: str = "30 %"
    heads: Heads = HEADS[0]
    spec: object = None
    num_sms: int = 2
    seed: int = 0

    @property
    def blocks(self):
        """Query blocks and key segments."""
        return -(-self.seqlens[0] // self.slice_m), -(-self.seqlens[1] // self.slice_n)

    @property
    def geometry(self):
        sq, sk = self.seqlens
        return {"slice_m": self.slice_m, "slice_n": self.slice_n, "seqlen_q": sq, "seqlen_k": sk}

    def generator(self):
        """Random numbers that depend on the case and on nothing else."""
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    def tensors(self, device="cpu"):
        """q, k, v: standard normal."""
        h, (sq, sk) = self.heads, self.seqlens
        shapes = ((h.batch, sq, h.heads, self.head_dim), *[(h.batch, sk, h.kv_heads, self.head_dim)] * 2)
        source = torch.Generator(device).manual_seed(self.generator().initial_seed())
        return [torch.randn(s, generator=source, device=device).to(DTYPES[self.dtype]) for s in shapes]

    def keep(self):
        """The bool map of the kept slices, on the CPU."""
        shape, source = (self.heads.mask_batch, self.heads.mask_heads, *self.blocks), self.generator()
        if self.fill == "ladder":
            return ladder(shape, self.kernel().tile_n, self.slice_n, self.seqlens[1], source)
        if self.fill == "one key":
            return torch.nn.functional.one_hot(torch.randint(shape[3], shape[:3], generator=source), shape[3]).bool()
        density = {"1 %": 0.01, "100 %": 1.0}.get(self.fill, 0.3)
        keep = torch.rand(shape, generator=source) < density
        if self.fill == "octets":  # two thirds of the keys in aligned runs of 8
            octets = torch.rand(*shape[:3], -(-shape[3] // 8), generator=source) < 0.2
            keep &= torch.rand(shape, generator=source) < 0.4
            keep |= octets.repeat_interleave(8, 3)[..., : shape[3]]
        if self.fill == "empty rows":
            keep.view(-1, shape[3])[::2] = False
        return keep

    def mask(self, device="cpu"):
        return fg.SliceMask.from_dense(self.keep().to(device), **self.geometry)

    def kernel(self):
        """The FwdSpec that the call runs."""
        h, (sq, sk) = self.heads, self.seqlens
        q = torch.empty(h.batch, sq, h.heads, self.head_dim, dtype=DTYPES[self.dtype], device="meta")
        k = torch.empty(h.batch, sk, h.kv_heads, self.head_dim, dtype=q.dtype, device="meta")
        mask = fg.SliceMask.full(batch=h.mask_batch, heads=h.mask_heads, **self.geometry)
        return select(Problem.of(q, k, k, mask), gpu.assumed(), self.spec).spec


def ladder(shape, tile_n, slice_n, seqlen_k, generator):
    """Lists whose lengths stand at and beside every multiple of the tile; every other one holds the last segment."""
    columns = shape[3]
    rungs = (tile_n, 0, tile_n + 1, 1, 2 * tile_n, tile_n - 1, seqlen_k, 2 * tile_n - 1, 2 * tile_n + 1, 3 * tile_n)
    lists = math.prod(shape[:3])
    keep = torch.zeros(lists, columns, dtype=torch.bool)
    for i in range(lists):
        segments = min(columns, math.ceil(rungs[i % len(rungs)] / slice_n))
        order = torch.randperm(columns, generator=generator)
        if i % 2 and segments:  # swap the last segment to the front
            order[order == columns - 1] = order[0].clone()
            order[0] = columns - 1
        keep[i, order[:segments]] = True
    return keep.view(shape)


@contextlib.contextmanager
def named(what):
    """Put the case in front of a failed assertion, for tests that run several."""
    try:
        yield
    except AssertionError as failure:
        raise AssertionError(f"{what}: {failure}") from failure


class _Allocator:
    """torch, for launch.py, with results that hold a NaN which no arithmetic makes: every bit is set."""

    def __init__(self, emu):
        self.emu, self.results = emu, []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        return self._poisoned(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._poisoned(torch.empty_like(*args, **kwargs))

    def _poisoned(self, result):
        bits_of(result).fill_(-1)
        self.emu.uninitialised(result)
        self.results.append(result)
        return result


def bits_of(x):
    """A float tensor's bits as integers, for comparisons that tell NaNs and zeros apart."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


class Emulated(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    report: object  # of the emulator's session

    @property
    def kernels(self):
        return [launched.kernel for launched in self.report]


def emulate(q, k, v, plan, *, seed=0, num_sms=2, ctas_per_sm=1, session_checks="all", **arguments):
    """fg.attention on the emulator with every check on. Asserts that each element of out and lse has been written.

    Raises:
        EmulatorError: the kernel did something that hardware does not promise.
    """
    emu = emulator.session(seed, session_checks, threads=1, num_sms=num_sms, ctas_per_sm=ctas_per_sm)
    allocator = _Allocator(emu)
    with emu, mock.patch.object(launch, "torch", allocator):
        out, lse = fg.attention(q, k, v, plan, return_lse=True, backend="emulator", **arguments)
    assert [x.data_ptr() for x in allocator.results] == [out.data_ptr(), lse.data_ptr()]
    for name, x in (("out", out), ("lse", lse)):
        missing = int((bits_of(x) == -1).sum())
        assert not missing, f"{missing} of {x.numel()} elements of {name} were never written"
    return Emulated(out, lse, emu.report())


def check(case: Case):
    """Runs a case on the emulator and asserts the numerical contract. Returns (plan, Emulated)."""
    q, k, v = case.tensors()
    plan = fg.Plan.from_mask(case.mask())
    with named(case):
        result = emulate(
            q,
            k,
            v,
            plan,
            seed=case.seed,
            num_sms=case.num_sms,
            ctas_per_sm=case.kernel().ctas_per_sm,
            spec=case.spec,
        )
        assert_within_contract(result.out, result.lse, q, k, v, plan)
    return plan, result


def only_first_pass(*arguments, **keywords):
    """``emulate`` without the redo launch: a bound of 0 claims that every score is 0, true or not."""
    result = emulate(*arguments, logit_bound=0.0, **keywords)
    assert len(result.kernels) == 1
    return result


def tiny_spec(**fields):
    """A small kernel for tests that choose their own tiles: one warpgroup, D = 64, 64 keys a tile."""
    return FwdSpec(**{"head_dim": 64, "tile_m": 64, "tile_n": 64, **fields})
