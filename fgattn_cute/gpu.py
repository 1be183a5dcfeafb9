# SPDX-License-Identifier: Apache-2.0
"""Facts about the GPU that kernels are chosen and launched for. No CUDA call when imported."""

from __future__ import annotations

import dataclasses
import functools

from . import settings
from .errors import DeviceError

SUPPORTED_CC = (9, 0)
# `sm90` of configs/: what kernels are chosen for where there is no GPU (explain, the emulator) and nothing names one.
DEFAULT_CONFIG = "sm90"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU.

    name: as the driver says it, "NVIDIA H200".
    cc: compute capability, (9, 0).
    sms: streaming multiprocessors.
    l2_bytes: size of the L2 cache.
    source: where the facts come from: "cuda:0", or "configs/h200.yaml".
    """

    name: str
    cc: tuple[int, int]
    sms: int
    l2_bytes: int
    source: str

    def reasons(self) -> list[str]:
        """Why the kernels cannot run on this GPU; empty when they can."""
        if tuple(self.cc) != SUPPORTED_CC:
            return [
                f"{self.name} has compute capability {self.cc[0]}.{self.cc[1]}; the kernels are sm_90a code, which "
                "runs on Hopper (H100, H200, GH200, H20) and on nothing else"
            ]
        return []

    def __str__(self) -> str:
        return f"{self.name} ({self.cc[0]}.{self.cc[1]}, {self.sms} SMs, from {self.source})"


def current(device=None) -> Gpu:
    """The GPU to choose kernels for on ``device``: the one FGATTN_GPU names, else the CUDA device itself.

    Args:
        device: torch.device, its string, or an index; None takes torch's current CUDA device.

    Raises:
        DeviceError: no CUDA device and FGATTN_GPU not set.
        PresetError: FGATTN_GPU names no file of configs/.
    """
    named = settings.gpu_name()
    return from_config(named) if named else from_cuda(device)


def assumed() -> Gpu:
    """The GPU to choose kernels for on a machine that has none: FGATTN_GPU, or the generic Hopper of configs/."""
    return from_config(settings.gpu_name() or DEFAULT_CONFIG)


def from_config(stem: str) -> Gpu:
    """The facts of ``configs/<stem>.yaml``."""
    from . import presets

    file = presets.builtin(stem)
    return Gpu(file.gpu.names[0], file.gpu.cc, file.gpu.sms, file.gpu.l2_bytes, source=f"configs/{stem}.yaml")


def from_cuda(device=None) -> Gpu:
    """What torch says about a CUDA device; asked once for each.

    Raises:
        DeviceError: torch sees no CUDA device.
    """
    index = None if device is None else _index(device)
    if index is None:
        _need_cuda()
        import torch

        index = torch.cuda.current_device()
    return _properties(index)


def _index(device) -> int | None:
    import torch

    if isinstance(device, int):
        return device
    device = device if isinstance(device, torch.device) else torch.device(device)
    return device.index


@functools.cache
def _properties(index: int) -> Gpu:
    _need_cuda()
    import torch

    p = torch.cuda.get_device_properties(index)
    return Gpu(p.name, (p.major, p.minor), p.multi_processor_count, p.L2_cache_size, source=f"cuda:{index}")


def _need_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        return
    why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    raise DeviceError(
        f'no GPU: {why}\n  nearest thing that works: backend="emulator" runs the same kernel on the CPU, '
        "CPU tensors run on the reference, FGATTN_GPU=h200 chooses kernels for a GPU that is elsewhere"
    )
