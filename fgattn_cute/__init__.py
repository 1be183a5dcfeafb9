# SPDX-License-Identifier: Apache-2.0
"""FG-Attn: sparse attention that computes only the kept slices of the attention map, M queries by N keys.

    import fgattn_cute as fg

    mask = fg.SliceMask.from_dense(keep, slice_m=128, slice_n=1, seqlen_q=Sq, seqlen_k=Sk)
    plan = fg.Plan.from_mask(mask)
    out = fg.attention(q, k, v, plan)

Names are loaded on first use: importing the package imports neither torch, the CuTe DSL nor a CUDA context.
"""

import importlib

_FROM = {
    "attention": "api",
    "autotune": "tuner",
    "best_plan": "plan_choice",
    "explain": "api",
    "Explanation": "explanation",
    "SliceMask": "mask",
    "HalvesPlan": "halves",
    "PartsPlan": "parts",
    "Plan": "plan",
    "UnionPlan": "unions",
    "FwdSpec": "kernels.spec",
    "CompileError": "errors",
    "DeviceError": "errors",
    "FgAttnError": "errors",
    "InputError": "errors",
    "MaskError": "errors",
    "PlanError": "errors",
    "PresetError": "errors",
    "UnsupportedError": "errors",
}
_MODULES = ("convert", "emulator", "orders", "pictures", "predict", "reference")

__all__ = [
    "CompileError",
    "DeviceError",
    "Explanation",
    "FgAttnError",
    "FwdSpec",
    "HalvesPlan",
    "InputError",
    "MaskError",
    "PartsPlan",
    "Plan",
    "PlanError",
    "PresetError",
    "SliceMask",
    "UnionPlan",
    "UnsupportedError",
    "__version__",
    "attention",
    "autotune",
    "best_plan",
    "convert",
    "emulator",
    "explain",
    "orders",
    "pictures",
    "predict",
    "reference",
]


def __getattr__(name: str):
    if name in _FROM:
        value = getattr(importlib.import_module(f".{_FROM[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Of the installed distribution, or a placeholder in a bare checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fgattn-cute")
    except PackageNotFoundError:
        return "0+checkout"
