# SPDX-License-Identifier: Apache-2.0
"""The table of instruction families: first word of an opcode -> function(builder, qualifiers, operands)."""

from __future__ import annotations

from collections.abc import Callable

from .builder import Builder

Lowering = Callable[[Builder, list[str], list[str]], object]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*roots: str) -> Callable[[Lowering], Lowering]:
    """Registers a function for the opcodes that start with one of `roots`."""

    def register(function: Lowering) -> Lowering:
        for root in roots:
            LOWERINGS[root] = function
        return function

    return register
