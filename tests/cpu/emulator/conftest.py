# SPDX-License-Identifier: Apache-2.0
"""The emulator must hook the DSL before the first `cute.compile` of the process."""

from fgattn_cute import emulator

emulator.prepare()
