# SPDX-License-Identifier: Apache-2.0
"""Every supported transformer: dense at density 1, right under a mask, exact in tile order, then as before."""

import copy
import functools

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers (pip install 'fgattn-cute[diffusers]')")

from fgattn_cute import SliceMask
from fgattn_cute.integrations.diffusers import SparsePolicy, disable, enable
from tests import video_models

SLICE_M = 16
TILE = (2, 4, 3)
by_model = pytest.mark.parametrize("case", video_models.CASES, ids=str)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def everywhere(**options):
    return SparsePolicy(slice_m=SLICE_M, dense_steps=0, **options)


def random_keep(seqlen, slice_n, heads=2):
    """bool (1, heads, blocks, columns) that depends on the length only; some query blocks keep little."""
    shape = (1, heads, -(-seqlen // SLICE_M), -(-seqlen // slice_n))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seqlen)) < 0.35


def random_mask_rule(slice_n):
    def rule(site):
        seqlen = site.q.shape[1]
        keep = random_keep(seqlen, slice_n)
        return SliceMask.from_dense(keep, slice_m=SLICE_M, slice_n=slice_n, seqlen_q=seqlen, seqlen_k=seqlen)

    return rule


def tile_positions(case, seqlen):
    """Place in the attended sequence of each token in raster order, by sorting (tile, place in the tile) by hand."""
    frames, rows, columns = video_models.GRID
    tokens = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]

    def key(token):
        return tuple(x // t for x, t in zip(token, TILE, strict=True)), token

    place = {token: index for index, token in enumerate(sorted(tokens, key=key))}
    video = [place[token] for token in tokens]
    text = seqlen - len(tokens)
    return [*range(text), *(text + p for p in video)] if case.text_first else [*video, *range(len(tokens), seqlen)]


def token_mask(case, seqlen, slice_n, tiled):
    """bool (1, heads, seqlen, seqlen) in raster order: the random slices, and everything with text in its slice."""
    keep = random_keep(seqlen, slice_n)
    text = seqlen - video_models.TOKENS
    is_text = torch.zeros(seqlen, dtype=torch.bool)
    is_text[slice(0, text) if case.text_first else slice(video_models.TOKENS, seqlen)] = True
    index = torch.arange(seqlen)
    kept = keep[:, :, index // SLICE_M][..., index // slice_n].clone()
    for start in range(0, seqlen, SLICE_M):
        if is_text[start : start + SLICE_M].any():
            kept[:, :, start : start + SLICE_M] = True
    for start in range(0, seqlen, slice_n):
        if is_text[start : start + slice_n].any():
            kept[..., start : start + slice_n] = True
    if tiled:
        place = torch.tensor(tile_positions(case, seqlen))
        kept = kept[:, :, place][..., place]
    return kept


def masked_attention(case, slice_n, tiled, dense, query, key, value, attn_mask=None, **_):
    """Softmax in fp64 under the token mask for self-attention over video; anything else as it was."""
    seqlen = query.shape[2]
    if seqlen < video_models.TOKENS or key.shape[2] != seqlen:
        return dense(query, key, value, attn_mask=attn_mask)
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        length = seqlen if attn_mask is None else int(attn_mask[b, 0, 0].sum())
        q, k, v = (x[b : b + 1, :, :length].double() for x in (query, key, value))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~token_mask(case, length, slice_n, tiled), -torch.inf)
        out[b, :, :length] = torch.nan_to_num(scores.softmax(-1) @ v)[0].to(out.dtype)
    return out


def relative_error(out, expected):
    return float((out - expected).norm() / expected.norm())


@by_model
@pytest.mark.parametrize("tile", [None, TILE], ids=["raster", "tiles"])
def test_keeping_everything_is_the_dense_model(case, tile):
    model, inputs = case.build(), case.inputs()
    expected = model(**inputs).sample
    with enable(model, everywhere(density=1.0, tile=tile)) as handle:
        out = model(**inputs).sample
    rows = handle.report().rows()
    assert relative_error(out, expected) < 1e-5
    assert {row["action"] for row in rows} == {"find"} and all(row["density"] == [1.0, 1.0] for row in rows)
    assert len({row["layer"] for row in rows}) == len({id(r) for r in model_self_attention(case, model)})


def model_self_attention(case, model):
    """Self-attention modules over video, told by their names in the model's source."""
    name = "attn" if case.name.startswith("hunyuan") else "attn1"
    return [m for path, m in model.named_modules() if path.split(".")[-1] == name and "refiner" not in path]


@by_model
@pytest.mark.parametrize(("slice_n", "tile"), [(1, None), (5, None), (1, TILE)], ids=["1", "5", "tiles"])
def test_a_mask_means_dense_attention_under_the_same_token_mask(case, slice_n, tile, monkeypatch):
    model, inputs = case.build(), case.inputs()
    dense = torch.nn.functional.scaled_dot_product_attention
    with enable(model, everywhere(rule=random_mask_rule(slice_n), slice_n=slice_n, tile=tile)) as handle:
        out = model(**inputs).sample
    unmasked = model(**inputs).sample
    attention = functools.partial(masked_attention, case, slice_n, tile is not None, dense)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    expected = model(**inputs).sample
    assert relative_error(out, expected) < 1e-5
    assert relative_error(unmasked, expected) > 1e-3, "a mask that changes nothing proves nothing"
    lengths = [video_models.TOKENS + text for text in case.text]
    for row in handle.report().rows():
        masks = [token_mask(case, length, slice_n, False) for length in lengths]
        shares = [mask.double().mean((0, 2, 3)).tolist() for mask in masks]
        assert row["density"] == pytest.approx(shares[row["entry"]] if case.text[0] else shares[0])


@by_model
def test_tile_order_changes_the_blocks_but_not_the_meaning_of_a_rule(case):
    """A rule about positions keeps about the same tokens in any order: the window of whole tiles is exact in both."""
    model, inputs = case.build(), case.inputs()
    window = {"rule": "window", "rule_options": {"tile": TILE, "window": (1, 1, 1)}}
    with enable(model, everywhere(**window, tile=TILE)) as handle:
        tiled = model(**inputs).sample
    with enable(model, everywhere(**window)) as raster:
        model(**inputs)
    assert torch.isfinite(tiled).all()
    mean = [sum(sum(row["density"]) for row in h.report().rows()) for h in (handle, raster)]
    assert mean[0] < mean[1], "blocks of neighbours need fewer slices for the same window"


@by_model
def test_disable_leaves_the_model_as_it_was(case):
    model, inputs = case.build(), case.inputs()
    expected = model(**inputs).sample

    def state():
        modules = dict(model.named_modules())
        hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
        processors = {name: m.processor for name, m in modules.items() if hasattr(m, "processor")}
        contents = {name: dict(vars(p)) for name, p in processors.items()}
        attributes = {name: sorted(vars(m)) for name, m in modules.items()}
        return hooks, {name: id(p) for name, p in processors.items()}, contents, attributes

    before, weights = state(), copy.deepcopy(model.state_dict())
    handle = enable(model, everywhere(tau=0.01, tile=TILE))
    assert state() != before
    model(**inputs)
    disable(handle)
    disable(handle)
    assert state() == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(model(**inputs).sample, expected)


def test_cross_attention_and_text_refiners_stay_dense():
    case = {c.name: c for c in video_models.CASES}
    for name in ("wan-i2v", "hunyuan", "ltx"):
        model = case[name].build()
        sparse = {id(m) for m in model_self_attention(case[name], model)}
        with enable(model, everywhere(density=1.0)):
            for module in model.modules():
                if hasattr(module, "processor"):
                    ours = type(module.processor).__name__ == "SparseProcessor"
                    assert ours == (id(module) in sparse)
