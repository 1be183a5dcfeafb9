# SPDX-License-Identifier: Apache-2.0
"""What decides which mask kernel is compiled: ``CompactSpec`` for bits to lists.

Pure Python and free of cutlass, as spec.py.
"""

import dataclasses

COMPACT_STEPS = ("count", "write")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactSpec:
    """One of the two launches that turn mask bits into id lists.

    step: "count" measures the lists, "write" fills them.
    """

    step: str

    @property
    def name(self) -> str:
        return f"compact_{self.step}"

    def reasons(self) -> list:
        """Why this spec cannot run; empty when it can."""
        return [] if self.step in COMPACT_STEPS else [f"step {self.step!r} is not one of {', '.join(COMPACT_STEPS)}"]
