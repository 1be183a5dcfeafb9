# SPDX-License-Identifier: Apache-2.0
"""For all tests without a GPU."""

import pytest

from fgattn_cute import emulator


@pytest.fixture(scope="session", autouse=True)
def _emulator_first():
    """A process that has compiled a kernel for the GPU cannot emulate one afterwards: the emulator must come first."""
    emulator.prepare()
