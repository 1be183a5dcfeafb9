# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for masks, and the plain Python counts that tests hold them against."""

import torch
from hypothesis import strategies as st

DENSITIES = (0.0, 0.02, 0.3, 0.9, 1.0)


@st.composite
def geometries(draw, max_len=150, slice_ms=(1, 3, 16, 48, 64, 128), slice_ns=(1, 2, 5, 8, 64)):
    """slice_m, slice_n, seqlen_q and seqlen_k as keyword arguments."""
    return {
        "slice_m": draw(st.sampled_from(slice_ms)),
        "slice_n": draw(st.sampled_from(slice_ns)),
        "seqlen_q": draw(st.integers(1, max_len)),
        "seqlen_k": draw(st.integers(1, max_len)),
    }


@st.composite
def dense_maps(draw, geometry, batches=(1, 2), heads=(1, 3)):
    """A bool map (B, H, Mb, Nb) for a geometry: random at some density, the last column sometimes forced on."""
    shape = (
        draw(st.sampled_from(batches)),
        draw(st.sampled_from(heads)),
        -(-geometry["seqlen_q"] // geometry["slice_m"]),
        -(-geometry["seqlen_k"] // geometry["slice_n"]),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from(DENSITIES))
    if draw(st.booleans()):
        keep[..., -1] = True
    return keep


@st.composite
def maps(draw, **kwargs):
    """(bool map, geometry)."""
    geometry = draw(geometries(**kwargs))
    return draw(dense_maps(geometry)), geometry


def expand_to_tokens(keep, geometry):
    """bool (B, H, Sq, Sk) of a slice map, by repeating it: the definition of a slice."""
    tokens = keep.repeat_interleave(geometry["slice_m"], 2).repeat_interleave(geometry["slice_n"], 3)
    return tokens[:, :, : geometry["seqlen_q"], : geometry["seqlen_k"]]
