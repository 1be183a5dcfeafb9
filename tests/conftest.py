# SPDX-License-Identifier: Apache-2.0
"""What every test stands on: fixed seeds, a kernel cache of its own, and a reason beside every skip."""

import importlib.util
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"
_CACHE_KEY = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption(
        "--kernel-cache",
        metavar="DIR",
        help="keep compiled kernels in DIR between runs; by default each run compiles into an empty folder of its own",
    )


def pytest_configure(config):
    """Give the run one kernel cache. The xdist workers inherit it, so each kernel is compiled once."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
        return
    kept = config.getoption("--kernel-cache")
    if kept is None:
        config.stash[_CACHE_KEY] = tempfile.mkdtemp(prefix="fgattn-test-cache-")
    os.environ["FGATTN_CACHE_DIR"] = str(Path(kept).resolve()) if kept else config.stash[_CACHE_KEY]


def pytest_unconfigure(config):
    if _CACHE_KEY in config.stash:
        shutil.rmtree(config.stash[_CACHE_KEY], ignore_errors=True)


def pytest_collection_modifyitems(items):
    no_gpu, no_fa4 = _why_no_hopper(), _why_no_fa4()
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=no_gpu))
        if no_fa4 and item.get_closest_marker("fa4"):
            item.add_marker(pytest.mark.skip(reason=no_fa4))


@pytest.fixture(autouse=True)
def _seeds():
    """The same random numbers for each test, whatever ran before it in this process."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _why_no_hopper() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "needs a Hopper GPU; torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0; {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    return None


def _why_no_fa4() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn-4 (pip install flash-attn-4)"
    return None
