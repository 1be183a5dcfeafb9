# SPDX-License-Identifier: Apache-2.0
"""Finding masks: from the softmax mass itself, from pooled queries and keys, from rules; and reusing them.

Every function returns a SliceMask, so results combine: ``keep(text) | rule | mass(q, k, ...)``.
"""

from fgattn_cute.predict.dynamic import mass, pooled, recall
from fgattn_cute.predict.schedule import MaskSchedule
from fgattn_cute.predict.select import Budget, Threshold, TopK, TopP
from fgattn_cute.predict.static import (
    Video,
    best_per_head,
    first_frame,
    from_rule,
    keep_tokens,
    local_stride,
    radial,
    sinks,
    spatial,
    stack_heads,
    temporal,
    tile_window,
)

__all__ = [
    "Budget",
    "MaskSchedule",
    "Threshold",
    "TopK",
    "TopP",
    "Video",
    "best_per_head",
    "first_frame",
    "from_rule",
    "keep_tokens",
    "local_stride",
    "mass",
    "pooled",
    "radial",
    "recall",
    "sinks",
    "spatial",
    "stack_heads",
    "temporal",
    "tile_window",
]
