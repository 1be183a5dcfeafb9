# SPDX-License-Identifier: Apache-2.0
"""Masks in and out of the formats of other libraries: ``from_NAME`` and ``to_NAME``.

Every function takes or returns the other library's own arguments in its own order. A conversion is exact or it is
refused with a MaskError that names what would be exact; nothing is rounded silently.
"""

from fgattn_cute.convert.chipmunk import from_chipmunk, to_chipmunk
from fgattn_cute.convert.flashinfer import (
    from_flashinfer_bsr,
    from_flashinfer_variable,
    to_flashinfer_bsr,
    to_flashinfer_variable,
)
from fgattn_cute.convert.flex import from_flex, from_mask_mod, to_flex, to_mask_mod
from fgattn_cute.convert.magi import from_magi_ranges, to_magi_ranges
from fgattn_cute.convert.q2k import from_q2k, to_q2k
from fgattn_cute.convert.sparge import from_sparge, to_sparge
from fgattn_cute.convert.svg2 import from_svg2, to_svg2
from fgattn_cute.convert.token_mask import from_token_mask, to_token_mask

__all__ = [
    "from_chipmunk",
    "from_flashinfer_bsr",
    "from_flashinfer_variable",
    "from_flex",
    "from_magi_ranges",
    "from_mask_mod",
    "from_q2k",
    "from_sparge",
    "from_svg2",
    "from_token_mask",
    "to_chipmunk",
    "to_flashinfer_bsr",
    "to_flashinfer_variable",
    "to_flex",
    "to_magi_ranges",
    "to_mask_mod",
    "to_q2k",
    "to_sparge",
    "to_svg2",
    "to_token_mask",
]
