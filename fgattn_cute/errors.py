# SPDX-License-Identifier: Apache-2.0
"""What fgattn_cute raises: one family, each member also the built-in that a caller would expect.

Every message says what was asked, every reason that stands against it and the nearest thing that works.
"""

from __future__ import annotations

from collections.abc import Iterable


class FgAttnError(Exception):
    """Base of everything that fgattn_cute raises on purpose."""


class InputError(FgAttnError, ValueError):
    """Tensors or arguments of a call do not fit together."""


class PlanError(FgAttnError, ValueError):
    """A plan is malformed, too small, or made for another call."""


class MaskError(FgAttnError, ValueError):
    """A mask is malformed, or an operation on masks has no exact meaning."""


class PresetError(FgAttnError, ValueError):
    """A preset file is wrong. ``file``, ``line`` and ``key`` say where (None where unknown)."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None, key: str | None = None):
        where = ":".join(str(part) for part in (file, line) if part is not None)
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}{f'{key}: ' if key else ''}{message}")
        self.file, self.line, self.key = file, line, key


class UnsupportedError(FgAttnError, NotImplementedError):
    """The request is sound but no kernel of fgattn_cute covers it."""


class DeviceError(FgAttnError, RuntimeError):
    """The machine lacks what the request needs."""


class CompileError(FgAttnError, RuntimeError):
    """A kernel could not be compiled or loaded."""


def describe_tensor(name: str, tensor) -> str:
    """``q (1, 4096, 12, 128) bfloat16 cuda:0``, or the type of what was given in place of a tensor."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        return f"{name} {type(tensor).__name__}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {tuple(tensor.shape)} {dtype} {tensor.device}"


def refusal(headline: str, asked: Iterable[str], reasons: Iterable[str], nearest: str | None = None) -> str:
    """Lays a refusal out: headline, what was asked, every reason as a bullet, the nearest thing that works.

    Args:
        headline: one clause, without a full stop.
        asked: descriptions of the inputs, joined on one line.
        reasons: one sentence each.
        nearest: what the caller can do instead.
    """
    lines = [headline]
    what = " | ".join(asked)
    if what:
        lines.append(f"  {what}")
    lines += [f"  - {reason}" for reason in reasons]
    if nearest:
        lines.append(f"  nearest thing that works: {nearest}")
    return "\n".join(lines)
