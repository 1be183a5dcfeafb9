# SPDX-License-Identifier: Apache-2.0
"""Runs a compiled kernel on torch tensors: allocates the results, sizes the grid, launches, and nothing else.

No synchronisation, no copy between host and device, no allocation but out and lse. The launch goes to torch's current
stream and can be captured in a CUDA graph once the kernel has been loaded and the plan's work descriptors exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from . import compile as compiler
from .errors import FgAttnError, InputError, describe_tensor, refusal
from .kernels import phases
from .kernels.spec import MAX_REDO_ITEMS, FwdSpec
from .problem import Problem, as_bshd

# fixed_ref poisons rows whose sum of exponentials passes 2^100 relative to their reference. Scores of magnitude at most
# b nats lie at most 2 b log2(e) octaves above the reference, and Sk of them add log2(Sk): up to 99 no row can pass.
SAFE_OCTAVES = 99.0
# Where blocks share a list, the reference may come from a key that a row does not keep, and sums below 2^-60 are
# poisoned as well.
SAFE_UNION_OCTAVES = 59.0


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Everything about a launch that the tensors' facts decide.

    kernel: takes (q, k, v, out, lse, ids, work, scale, slice_m, ctas_per_block, num_ctas, ctas_per_wave,
        members, blocks).
    redo: the same for the second pass over poisoned rows; None for exact softmax.
    """

    spec: FwdSpec
    kernel: Callable
    redo: Callable | None
    slice_m: int
    ctas_per_block: int
    layout: str


@functools.lru_cache(maxsize=4096)
def prepare(problem: Problem, spec: FwdSpec, emulated: bool = False) -> Launcher:
    """Compiles or loads the kernels of a spec for a problem.

    Raises:
        CompileError: see ``compile.get``.
    """
    redo = None
    if spec.softmax == "fixed_ref":
        redo = compiler.get(spec.redo_spec(), emulated=emulated).call
    return Launcher(
        spec=spec,
        kernel=compiler.get(spec, emulated=emulated).call,
        redo=redo,
        slice_m=problem.slice_m,
        ctas_per_block=ctas_per_block(spec, problem.slice_m),
        layout=problem.layout,
    )


def ctas_per_block(spec: FwdSpec, slice_m: int) -> int:
    """CTAs that share a query block and its list."""
    return -(-slice_m // spec.tile_m)


def ctas_per_wave(spec: FwdSpec, sms: int) -> int:
    """CTAs that fit the GPU at once."""
    return sms * spec.ctas_per_sm


def grid_size(spec: FwdSpec, num_work: int, slice_m: int, sms: int) -> int:
    """CTAs of a launch: one per item and tile, those of all phases of a persistent kernel, or in zigzag as many as fit
    the GPU at once."""
    items = num_work * ctas_per_block(spec, slice_m)
    if spec.scheduler == "grid":
        return items
    wave = ctas_per_wave(spec, sms)
    return min(items, wave) if spec.scheduler == "zigzag" else phases.num_ctas(items, wave)


def redo_grid_size(spec: FwdSpec, num_work: int, slice_m: int, sms: int) -> int:
    """CTAs of the redo pass after a launch of ``spec``: as many as fit the GPU at once, or as its flags need."""
    items = num_work * ctas_per_block(spec, slice_m)
    return max(min(items, ctas_per_wave(spec, sms)), -(-items // MAX_REDO_ITEMS))


def needs_redo(seqlen_k: int, logit_bound: float | None, union_blocks: int = 1) -> bool:
    """Whether a fixed_ref launch may have poisoned rows.

    Args:
        seqlen_k: keys.
        logit_bound: upper bound of |scale * q.k| in nats, or None where nothing is known.
        union_blocks: query blocks that share a list.
    """
    safe = SAFE_UNION_OCTAVES if union_blocks > 1 else SAFE_OCTAVES
    return logit_bound is None or 2 * logit_bound * math.log2(math.e) + math.log2(seqlen_k) > safe


def on_cuda(launcher: Launcher, q, k, v, plan, scale: float, logit_bound: float | None):
    """Launches on the tensors' GPU. Returns (out, lse)."""
    device = q.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(launcher, q, k, v, plan, scale, logit_bound, _sms(device.index))
    return _launch(launcher, q, k, v, plan, scale, logit_bound, _sms(device.index))


def on_emulator(launcher: Launcher, q, k, v, plan, scale: float, logit_bound: float | None):
    """Runs the kernel in the active emulator session, or in one of its own. Returns (out, lse), CPU tensors."""
    from . import emulator
    from .emulator.launch import active_session

    session = active_session()
    with contextlib.ExitStack() as stack:
        if session is None:
            session = stack.enter_context(emulator.session(ctas_per_sm=launcher.spec.ctas_per_sm))
        return _launch(launcher, q, k, v, plan, scale, logit_bound, session.options.num_sms)


@functools.cache
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _launch(launcher: Launcher, q, k, v, plan, scale, logit_bound, sms: int):
    spec = launcher.spec
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    views = (q, k, v, out)
    if launcher.layout != "bshd":
        views = [as_bshd(x, launcher.layout) for x in views]
    batch, seqlen_q, heads, _ = views[0].shape
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    work = plan.work(batch, heads)
    items = work.shape[0]
    tensors = (*views, lse, plan.ids, work, scale, launcher.slice_m, launcher.ctas_per_block)
    wave = ctas_per_wave(spec, sms)
    unions = (plan.members, plan.blocks) if spec.union_blocks > 1 else (None, None)
    try:
        launcher.kernel(*tensors, grid_size(spec, items, launcher.slice_m, sms), wave, *unions)
        sharing = 1 if spec.parts else spec.union_blocks  # in parts a row's reference is a key that it keeps
        if launcher.redo is not None and needs_redo(plan.seqlen_k, logit_bound, sharing):
            launcher.redo(*tensors, redo_grid_size(spec, items, launcher.slice_m, sms), wave, *unions)
    except (TypeError, ValueError) as why:
        if isinstance(why, FgAttnError):
            raise
        # TVM-FFI compares every argument with the compiled signature: what checks="off" lets through ends here.
        asked = [describe_tensor(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
        found = str(why).split(" when calling")[0]
        raise InputError(
            refusal("the compiled kernel refuses these arguments", asked, [found], 'checks="fast" says what to change')
        ) from why
    return out, lse
