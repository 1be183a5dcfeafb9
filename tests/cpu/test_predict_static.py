# SPDX-License-Identifier: Apache-2.0
"""Rules over positions, against loops over tokens; and the schedule that reuses masks."""

import pytest
import torch

from fgattn_cute import predict
from fgattn_cute.errors import InputError, MaskError
from fgattn_cute.mask import SliceMask
from fgattn_cute.predict import MaskSchedule, Video

VIDEO = Video(frames=5, height=4, width=6)
TOKENS = [(t, y, x) for t in range(5) for y in range(4) for x in range(6)]
FINE = {"slice_m": 1, "slice_n": 1}


def tokens_kept(mask):
    return mask.to_token_mask()[0, 0]


def expected(judge, tokens=TOKENS):
    return torch.tensor([[bool(a is not None and b is not None and judge(a, b)) for b in tokens] for a in tokens])


def test_spatial_and_temporal():
    near = expected(lambda a, b: abs(a[0] - b[0]) <= 1)
    assert torch.equal(tokens_kept(predict.spatial(VIDEO, frames=1, **FINE)), near)
    same_place = expected(lambda a, b: abs(a[1] - b[1]) <= 1 and abs(a[2] - b[2]) <= 1)
    assert torch.equal(tokens_kept(predict.temporal(VIDEO, radius=1, **FINE)), same_place)
    assert predict.temporal(VIDEO, **FINE).density == pytest.approx(1 / 24)


def test_tile_window_keeps_its_size_at_the_border():
    tile, window = (2, 2, 3), (2, 1, 1)
    mask = predict.tile_window(VIDEO, tile=tile, window=window, **FINE)

    def judge(a, b):
        tiles, own, other = (3, 2, 2), *([p // t for p, t in zip(place, tile, strict=True)] for place in (a, b))
        for axis in range(3):
            first = max(0, min(own[axis] - window[axis] // 2, tiles[axis] - window[axis]))
            if not first <= other[axis] < first + window[axis]:
                return False
        return True

    assert torch.equal(tokens_kept(mask), expected(judge))
    whole = predict.tile_window(VIDEO, tile=tile, window=(9, 9, 9), **FINE)
    assert whole.density == 1.0


def test_tile_order_makes_windows_contiguous():
    tiled = Video(frames=4, height=4, width=6, tile=(2, 2, 3))
    mask = predict.tile_window(tiled, tile=(2, 2, 3), window=(1, 1, 1), slice_m=12, slice_n=12)
    assert torch.equal(mask.to_dense()[0, 0], torch.eye(8, dtype=torch.bool))
    order = tiled.order()
    assert sorted(order.tolist()) == list(range(96))
    assert order[:12].tolist() == [t * 24 + y * 6 + x for t in (0, 1) for y in (0, 1) for x in (0, 1, 2)]
    plain = predict.tile_window(Video(4, 4, 6), tile=(2, 2, 3), window=(1, 1, 1), **FINE)
    fine = predict.tile_window(tiled, tile=(2, 2, 3), window=(1, 1, 1), **FINE)
    assert torch.equal(tokens_kept(plain)[order][:, order], tokens_kept(fine))


def test_radial():
    def judge(a, b):
        distance = abs(a[0] - b[0])
        if distance <= 1:
            return True
        octave = 1 if distance < 4 else 2
        return abs((a[1] - b[1]) * 6 + a[2] - b[2]) < 24 / 2**octave

    assert torch.equal(tokens_kept(predict.radial(VIDEO, **FINE)), expected(judge))
    assert predict.radial(VIDEO, decay=0.5, **FINE).density < predict.radial(VIDEO, **FINE).density


@pytest.mark.parametrize("text_first", [False, True])
def test_text_is_left_to_keep_tokens(text_first):
    video = Video(frames=2, height=2, width=3, text=4, text_first=text_first)
    places = [(t, y, x) for t in range(2) for y in range(2) for x in range(3)]
    tokens = [None] * 4 + places if text_first else places + [None] * 4
    same_frame = expected(lambda a, b: a[0] == b[0], tokens)
    assert torch.equal(tokens_kept(predict.spatial(video, **FINE)), same_frame)
    first = 0 if text_first else 12
    text = predict.keep_tokens(first, 4, **FINE, seqlen_q=16, seqlen_k=16)
    is_text = torch.tensor([token is None for token in tokens])
    assert torch.equal(tokens_kept(text), is_text[:, None] | is_text[None, :])
    keys_only = predict.keep_tokens(first, 4, rows=False, **FINE, seqlen_q=16, seqlen_k=16)
    assert torch.equal(tokens_kept(keys_only), is_text[None, :].expand(16, -1))


def test_sinks_first_frame_and_local_stride():
    geometry = {**FINE, "seqlen_q": 30, "seqlen_k": 50}
    assert torch.equal(tokens_kept(predict.sinks(7, **geometry)), (torch.arange(50) < 7).expand(30, -1))
    frame = tokens_kept(predict.first_frame(VIDEO, **FINE))
    assert torch.equal(frame, (torch.arange(120) < 24).expand(120, -1))
    strided = tokens_kept(predict.local_stride(local=3, stride=16, **geometry))
    assert strided[10].nonzero().flatten().tolist() == [0, 8, 9, 10, 11, 12, 16, 32, 48]


def test_a_slice_is_kept_if_any_of_its_pairs_is():
    fine = predict.radial(VIDEO, **FINE)
    assert predict.radial(VIDEO, slice_m=16, slice_n=7) == fine.coarsen(16, 7)


def test_stack_and_best_per_head():
    space, time = (rule(VIDEO, slice_m=16, slice_n=1) for rule in (predict.spatial, predict.temporal))
    both = predict.stack_heads([space, time])
    assert both.heads == 2 and both.select(heads=[1]) == time
    frame = torch.nn.functional.one_hot(torch.tensor([t for t, _, _ in TOKENS]), 32)
    place = torch.nn.functional.one_hot(torch.tensor([y * 6 + x for _, y, x in TOKENS]), 32)
    q = 20.0 * torch.stack([frame, place], 1)[None]  # head 0 looks at its frame, head 1 at its place
    assert predict.best_per_head([space, time], q, q) == both
    with pytest.raises(MaskError, match="one head and one geometry"):
        predict.stack_heads([space, both])
    with pytest.raises(MaskError, match="at least one candidate"):
        predict.best_per_head([], q, q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Video(0, 2, 2), "a video of 0 x 2 x 2"),
        (lambda: Video(2, 2, 2, tile=(2, 2)), r"tile=\(2, 2\) is not three sizes"),
        (lambda: predict.tile_window(VIDEO, window=(0, 1, 1), **FINE), "three sizes of at least 1"),
        (lambda: predict.radial(VIDEO, decay=0, **FINE), "decay=0 is not above 0"),
        (lambda: predict.local_stride(local=1, stride=0, **FINE, seqlen_q=8, seqlen_k=8), "stride=0"),
        (
            lambda: predict.keep_tokens(5, 5, **FINE, seqlen_q=8, seqlen_k=8),
            "tokens 5 to 10 lie outside a sequence of 8",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- schedule -------------------------------------------------------------------------------------------------------
def some_mask(density=1.0):
    return SliceMask.full(slice_m=16, slice_n=1, seqlen_q=64, seqlen_k=64)


def test_schedule_says_what_to_do_when():
    schedule = MaskSchedule(10, 3, dense_steps=2, dense_layers=[0], refresh=3, density=lambda step: 1 / (1 + step))
    asked = []

    def find(density):
        asked.append(density)
        return some_mask()

    seen = {}
    for step in range(10):
        for layer in range(3):
            seen[step, layer] = schedule.action(step, layer)
            schedule.mask(step, layer, find)
    assert [seen[step, 0] for step in range(10)] == ["dense"] * 10
    assert [seen[step, 1] for step in range(10)] == ["dense"] * 2 + ["find", "reuse", "reuse"] * 2 + ["find", "reuse"]
    assert asked == [1 / 3] * 2 + [1 / 6] * 2 + [1 / 9] * 2
    assert schedule.nbytes == 2 * some_mask().nbytes == 2 * 4 * 2 * 4
    text = schedule.describe()
    assert "14 calls dense, 16 sparse, of which 6 find a mask and 10 reuse one; 2 masks held, 64 bytes" in text
    assert schedule.action(2, 1) == "find"  # a new run begins: the held mask is of a later step
    schedule.clear()
    assert schedule.nbytes == 0 and schedule.action(9, 1) == "find"


def test_schedule_finds_anew_after_a_skipped_refresh():
    schedule = MaskSchedule(10, 1, refresh=4)
    first, second = some_mask(), some_mask()
    assert schedule.mask(1, 0, lambda density: first) is first
    assert schedule.mask(3, 0, lambda density: second) is first
    assert schedule.mask(6, 0, lambda density: second) is second


def test_schedule_refusals():
    with pytest.raises(
        InputError, match=r"refresh=0 must be at least 1; dense_steps=11 is not from 0 to 10; .* 0\.\.2"
    ):
        MaskSchedule(10, 3, dense_steps=11, dense_layers=[3], refresh=0)
    schedule = MaskSchedule(10, 3, density=lambda step: 2.0)
    with pytest.raises(InputError, match=r"returned 2\.0 at step 0"):
        schedule.mask(0, 0, some_mask)
    with pytest.raises(InputError, match="step 10, layer 0 lies outside"):
        schedule.action(10, 0)
