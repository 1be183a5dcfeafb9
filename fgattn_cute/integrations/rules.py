# SPDX-License-Identifier: Apache-2.0
"""From a policy and a site to a mask: the rule, and the text tokens that it always keeps."""

from __future__ import annotations

import functools

from fgattn_cute import predict
from fgattn_cute.errors import InputError, MaskError
from fgattn_cute.integrations.policy import Site
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict import Video

_STATIC = {
    "window": predict.tile_window,
    "radial": predict.radial,
    "spatial": predict.spatial,
    "temporal": predict.temporal,
}


def find(site: Site, text: tuple[int, int]) -> SliceMask:
    """The mask of a site.

    Args:
        site: queries, keys and where they come from.
        text: first position and number of the text tokens; they always take part, as queries and as keys.

    Raises:
        InputError, MaskError: the rule's options or a mask made by the user's function do not fit.
    """
    policy = site.policy
    geometry = {"slice_m": policy.slice_m, "slice_n": policy.slice_n}
    seqlen = site.q.shape[1]
    if callable(policy.rule):
        mask = policy.rule(site)
        _check(mask, site)
    elif policy.rule in ("mass", "pooled"):
        mask = _dynamic(site, geometry)
    elif policy.rule == "spatial_or_temporal":
        candidates = [
            _static(name, site.video, site.q.device, tuple(sorted(_options(policy, name).items())), **geometry)
            for name in ("spatial", "temporal")
        ]
        mask = predict.best_per_head(candidates, site.q, site.k, scale=site.scale)
    else:
        options = tuple(sorted(policy.rule_options.items()))
        mask = _static(policy.rule, site.video, site.q.device, options, **geometry)
    first, count = text
    return mask | _text(first, count, seqlen, mask.slice_m, mask.slice_n, site.q.device) if count else mask


def _dynamic(site: Site, geometry: dict) -> SliceMask:
    policy, seqlen = site.policy, site.q.shape[1]
    name, select = policy.selector(site.component, site.layer, site.heads)
    if name == "density" and min(select.values) >= 1.0:
        return SliceMask.full(**geometry, seqlen_q=seqlen, seqlen_k=seqlen, device=site.q.device)
    how = predict.mass if policy.rule == "mass" else predict.pooled
    return how(site.q, site.k, select=select, scale=site.scale, **geometry, **policy.rule_options)


def _options(policy, name: str) -> dict:
    """Options of one of two rules: {"spatial": {...}, "temporal": {...}}."""
    return dict(policy.rule_options.get(name, {}))


@functools.lru_cache(maxsize=32)
def _static(name: str, video: Video, device, options: tuple, *, slice_m: int, slice_n: int) -> SliceMask:
    """A rule about positions: the same for every layer, head and step, so it is made once."""
    return _STATIC[name](video, slice_m=slice_m, slice_n=slice_n, device=device, **dict(options))


@functools.lru_cache(maxsize=32)
def _text(first: int, count: int, seqlen: int, slice_m: int, slice_n: int, device) -> SliceMask:
    return predict.keep_tokens(
        first, count, slice_m=slice_m, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen, device=device
    )


def _check(mask, site: Site) -> None:
    """A function of the user's must return a mask for what it was shown."""
    batch, seqlen, heads, _ = site.q.shape
    if not isinstance(mask, SliceMask):
        raise MaskError(f"the rule {site.policy.rule_name} returned a {type(mask).__name__}, not a SliceMask")
    why = []
    if (mask.seqlen_q, mask.seqlen_k) != (seqlen, seqlen):
        why.append(f"it is for seqlen {mask.seqlen_q} x {mask.seqlen_k}, attention has {seqlen}")
    if mask.batch not in (1, batch) or mask.heads not in (1, heads):
        why.append(f"it holds {mask.batch} x {mask.heads} (batch, heads), attention has {batch} x {heads}")
    if mask.device != site.q.device:
        why.append(f"it is on {mask.device}, attention on {site.q.device}")
    if why:
        raise InputError(f"the mask of rule {site.policy.rule_name} does not fit: {'; '.join(why)}")
