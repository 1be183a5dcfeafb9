# SPDX-License-Identifier: Apache-2.0
"""TMA tiles: one to five dimensions, every swizzle, boxes that hang over every edge, loads, stores and reductions."""

import numpy as np
import pytest
import torch

from tests.cpu.emulator.layouts import swizzled
from tests.cpu.emulator.ptx_lab import drain_shared, fault, run, tensor_map

SPAN = {0: 64, 1: 32, 2: 64, 3: 128}  # inner bytes of the box used with each swizzle mode of a tensor map
DESCRIPTOR_MODE = {0: 0, 1: 3, 2: 2, 3: 1}  # tensor map swizzle -> mode of `layouts.swizzled`
BARRIER = "%r30"


def load_and_store(rank, nbytes, coordinates, load="", store=""):
    """PTX: one thread loads a box, waits, and stores it through another map; then all drain shared memory."""
    regs = ", ".join(f"%r{10 + i}" for i in range(rank))
    return (
        "".join(f"mov.b32 %r{10 + i}, {x};" for i, x in enumerate(coordinates))
        + f"""
add.s32 {BARRIER}, smem, 32768; setp.ne.u32 %p1, tid, 0; @%p1 bra MEET;
mbarrier.init.shared::cta.b64 [{BARRIER}], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [{BARRIER}], {nbytes};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{load}
  [smem], [a0, {{{regs}}}], [{BARRIER}];
MEET: bar.sync 0;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{BARRIER}], 0; @!%p2 bra WAIT;
@%p1 bra STORED; {store or f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"} [a1, {{{regs}}}], [smem];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
STORED: bar.sync 0;
"""
        + drain_shared(nbytes, "a2")
    )


def box_indices(box, corner, dims):
    """Coordinates (rank, n) of the elements of a box, innermost dimension first and fastest, and which are inside."""
    idx = np.indices(box[::-1]).reshape(len(box), -1)[::-1] + np.array(corner)[:, None]
    inside = ((idx >= 0) & (idx < np.array(dims)[:, None])).all(0)
    return idx, inside


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_tiles_with_overhang(rank, swizzle, dtype):
    # PTX ISA 5.5.2-5.5.7: out-of-bound elements read as zero and are not written; the swizzle permutes 16-byte chunks
    es = dtype.itemsize
    box = [SPAN[swizzle] // es, 8, 2, 2, 2][:rank]
    dims = [160 // es, 10, 3, 3, 2][:rank]
    n = int(np.prod(box))
    for seed, first in enumerate((0, -16 // es, 96 // es, 1)):
        source = torch.randint(0, 9, dims[::-1]).to(dtype)
        target, tile = torch.full_like(source, 77), torch.zeros(n, dtype=dtype)
        corner = [first, 3, -1, 2, 1][:rank]
        maps = [tensor_map(t, box, swizzle) for t in (source, target)]
        run(load_and_store(rank, n * es, corner), [*maps, tile], memory=[source, target], seed=seed)
        idx, inside = box_indices(box, corner, dims)
        where = tuple(i[inside] for i in idx)[::-1]
        src, want_target = source.float().numpy(), np.full(dims[::-1], 77.0)
        linear = np.zeros(n)
        linear[inside] = src[where]
        want_target[where] = src[where]
        want_tile = np.zeros(n)
        want_tile[swizzled(np.arange(n) * es, DESCRIPTOR_MODE[swizzle]) // es] = linear
        np.testing.assert_array_equal(tile.float().numpy(), want_tile, err_msg=f"load at {corner}")
        np.testing.assert_array_equal(target.float().numpy(), want_target, err_msg=f"store at {corner}")


def test_strided_views_and_cache_hints():
    base = torch.randint(0, 99, (20, 3, 64)).to(torch.bfloat16)
    view, out = base[:, 1], torch.zeros(20, 64, dtype=torch.bfloat16)
    tile = torch.zeros(8 * 64, dtype=torch.bfloat16)
    body = "mov.b64 %d9, 0x14F0000000000000;\n" + load_and_store(2, 1024, (0, 5), load=".L2::cache_hint")
    body = body.replace(f"[{BARRIER}];\nMEET", f"[{BARRIER}], %d9;\nMEET")
    run(body, [tensor_map(view, [64, 8]), tensor_map(out, [64, 8]), tile], memory=[base, out])
    assert torch.equal(tile.view(8, 64), view[5:13])
    assert torch.equal(out[5:13], view[5:13]) and out[:5].abs().sum() == 0 and out[13:].abs().sum() == 0


def test_reduction_store_adds():
    source, target = torch.randn(8, 32), torch.randn(8, 32)
    want, tile = source + target, torch.zeros(8 * 32)
    store = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group"
    run(
        load_and_store(2, 1024, (0, 0), store=store),
        [tensor_map(source, [32, 8]), tensor_map(target, [32, 8]), tile],
        memory=[source, target],
    )
    torch.testing.assert_close(target, want, rtol=0, atol=1e-6)


SRC = torch.zeros(16, 64, dtype=torch.bfloat16)


def small(body_edit=lambda s: s, source=SRC, box=(64, 8), memory=None, kind=None, **how):
    target, tile = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
    args = [tensor_map(source, list(box)), tensor_map(target, list(box)), tile]
    return fault(kind, body_edit(load_and_store(2, 1024, (0, 0))), args, memory=memory or [source, target], **how)


def test_a_map_of_memory_outside_the_call_is_a_bounds_fault():
    small(memory=[torch.zeros(1)], kind="bounds")


def test_a_misaligned_tile_is_refused():
    small(
        lambda s: (
            s.replace("[smem], [a0", "[%r50], [a0")
            .replace("MEET:", "MEET:", 1)
            .replace("mbarrier.arrive.expect", "add.s32 %r50, smem, 8; mbarrier.arrive.expect", 1)
        ),
        kind="misaligned",
    )


def test_a_garbled_map_is_refused():
    target, tile = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
    bad = bytearray(tensor_map(SRC, [64, 8]))
    bad[8] = 0xF0 | bad[8] & 0x0F  # rank field 7
    fault(
        "descriptor",
        load_and_store(2, 1024, (0, 0)),
        [bytes(bad), tensor_map(target, [64, 8]), tile],
        memory=[SRC, target],
    )


@pytest.mark.parametrize("expected", [1040, 512])
def test_expecting_other_bytes_than_arrive_never_completes_the_phase(expected):
    error = small(lambda s: s.replace("_, [%r30], 1024", f"_, [%r30], {expected}"), kind="deadlock")
    assert "mbarrier" in str(error) and "parity 0" in str(error)
