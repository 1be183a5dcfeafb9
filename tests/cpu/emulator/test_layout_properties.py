# SPDX-License-Identifier: Apache-2.0
"""Properties of descriptors, swizzles and fragments over random shapes: what must hold whatever the numbers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.emulator.layouts import ATOM_BYTES, accumulator_fragment, operand_fragment, place, swizzled
from tests.cpu.emulator.ptx_lab import drain_shared, run, tensor_map
from tests.cpu.emulator.test_tma import DESCRIPTOR_MODE, load_and_store
from tests.cpu.emulator.test_wgmma import TYPES, multiply

quick = settings(max_examples=25, deadline=None, derandomize=True)


@given(mode=st.integers(0, 3), rows=st.sampled_from([8, 16, 64]))
def test_the_swizzle_of_the_tests_is_a_permutation_that_undoes_itself(mode, rows):
    offsets = np.arange(rows * 128)
    moved = swizzled(offsets, mode)
    assert sorted(moved) == list(offsets)
    np.testing.assert_array_equal(swizzled(moved, mode), offsets)
    np.testing.assert_array_equal(moved // 128, offsets // 128)


@given(n=st.integers(1, 32).map(lambda x: 8 * x))
def test_accumulator_fragments_hold_every_element_once(n):
    matrix = np.arange(64 * n).reshape(64, n)
    assert sorted(accumulator_fragment(matrix).reshape(-1)) == list(range(64 * n))


@given(es=st.sampled_from([1, 2, 4]))
def test_operand_fragments_hold_every_byte_once(es):
    values = np.arange(64 * 32) % 251
    got = operand_fragment(values.astype(np.uint8).reshape(64, 32 // es, es)).view(np.uint8)
    np.testing.assert_array_equal(np.bincount(got.reshape(-1), minlength=256), np.bincount(values, minlength=256))


@quick
@given(
    kind=st.sampled_from(sorted(TYPES)),
    n=st.integers(1, 32).map(lambda x: 8 * x),
    majors=st.tuples(st.sampled_from(["k", "mn"]), st.sampled_from(["k", "mn"])),
    mode=st.integers(0, 3),
    from_registers=st.booleans(),
    seed=st.integers(0, 20),
)
def test_wgmma_of_any_legal_form(kind, n, majors, mode, from_registers, seed):
    if TYPES[kind].itemsize != 2:
        majors = ("k", "k")
    if from_registers:
        majors = ("k", majors[1])
    got, want = multiply(kind, n, *majors, mode, from_registers, seed=seed)
    np.testing.assert_array_equal(got, want)


@quick
@given(
    rank=st.integers(2, 5),
    swizzle=st.integers(0, 3),
    data=st.data(),
    seed=st.integers(0, 20),
)
def test_a_tile_loads_and_stores_what_the_box_covers(rank, swizzle, data, seed):
    inner = {0: 64, 1: 32, 2: 64, 3: 128}[swizzle] // 2
    box = [inner, *(data.draw(st.integers(1, 5)) for _ in range(rank - 1))]
    dims = [8 * data.draw(st.integers(1, 12)), *(data.draw(st.integers(1, 6)) for _ in range(rank - 1))]
    corner = [data.draw(st.integers(-b, d)) for b, d in zip(box, dims, strict=True)]
    corner[0] = corner[0] // 8 * 8
    n = int(np.prod(box))
    source = torch.arange(1, int(np.prod(dims)) + 1, dtype=torch.int16).reshape(dims[::-1])
    target, tile = torch.zeros_like(source), torch.zeros(-(-n // 2) * 2, dtype=torch.int16)
    maps = [tensor_map(t, box, swizzle) for t in (source, target)]
    run(load_and_store(rank, n * 2, corner), [*maps, tile], memory=[source, target], seed=seed)
    # the store inverts the load: inside the box the target equals the source, elsewhere it is untouched
    region = tuple(slice(max(0, c), max(0, min(d, c + b))) for b, c, d in zip(box, corner, dims, strict=True))[::-1]
    want = torch.zeros_like(source)
    want[region] = source[region]
    assert torch.equal(target, want)
    # and shared memory holds each covered element once, at the place the swizzle gives it
    padded = np.zeros([d + 2 * b for b, d in zip(box, dims, strict=True)][::-1], np.int16)
    inside = tuple(slice(b, b + d) for b, d in zip(box, dims, strict=True))[::-1]
    padded[inside] = source.numpy()
    window = tuple(slice(b + c, 2 * b + c) for b, c in zip(box, corner, strict=True))[::-1]
    expected = np.zeros(len(tile), np.int16)
    expected[swizzled(np.arange(n) * 2, DESCRIPTOR_MODE[swizzle]) // 2] = padded[window].reshape(-1)
    np.testing.assert_array_equal(tile.numpy(), expected)


@quick
@given(mode=st.integers(1, 3), step=st.integers(0, 3), row_group=st.integers(0, 7))
def test_a_k_step_inside_an_atom_is_the_start_address_plus_its_bytes(mode, step, row_group):
    """The address bits that swizzling uses are absolute, so advancing K by 32 bytes needs no other descriptor."""
    width = ATOM_BYTES[mode]
    if step * 32 >= width:
        step = 0
    elements = np.zeros((64, width, 1), np.uint8)
    elements[8 * row_group : 8 * row_group + 8, 32 * step : 32 * step + 32] = 1
    image = place(elements, "k", mode, 0, 8 * width)
    rows = np.flatnonzero(image) // width
    assert set(rows) == set(range(8 * row_group, 8 * row_group + 8))
    assert image.sum() == 8 * 32


@quick
@given(words=st.integers(1, 64).map(lambda x: 4 * x), seed=st.integers(0, 20))
def test_a_bulk_copy_moves_exactly_its_bytes(words, seed):
    nbytes = words * 4
    source = torch.randint(-128, 128, (nbytes + 16,), dtype=torch.int8)
    got = torch.zeros(nbytes, dtype=torch.int8)
    body = f"""setp.ne.u32 %p1, tid, 0; @%p1 bra MEET; mbarrier.init.shared::cta.b64 [smem+8192], 1;
fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+8192], {nbytes};
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem], [a0], {nbytes}, [smem+8192];
MEET: bar.sync 0; WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [smem+8192], 0; @!%p2 bra WAIT;
"""
    run(body + drain_shared(nbytes, "a1"), [source, got], seed=seed)
    assert torch.equal(got, source[:nbytes])
