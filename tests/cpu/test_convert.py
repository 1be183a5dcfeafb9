# SPDX-License-Identifier: Apache-2.0
"""Masks to and from other libraries. The other side's format is built here by its published rule, never by our code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgattn_cute import convert
from fgattn_cute.errors import MaskError
from fgattn_cute.mask import SliceMask
from tests.strategies import dense_maps, expand_to_tokens, geometries, maps

FEW = settings(deadline=None, max_examples=25)


def mask_of(keep, **geometry):
    return SliceMask.from_dense(keep, **geometry)


def geometry_of(slice_m, slice_n, seqlen_q, seqlen_k):
    return {"slice_m": slice_m, "slice_n": slice_n, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}


def random_keep(batch, heads, geometry, density=0.4):
    blocks = -(-geometry["seqlen_q"] // geometry["slice_m"]), -(-geometry["seqlen_k"] // geometry["slice_n"])
    return torch.rand(batch, heads, *blocks) < density


def partition(total, parts):
    """Random positive sizes that add up to ``total``."""
    cuts = np.sort(np.random.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()


# ---- token masks ----------------------------------------------------------------------------------------------------
@FEW
@given(maps())
def test_token_mask(case):
    keep, geometry = case
    tokens = expand_to_tokens(keep, geometry)
    mask = convert.from_token_mask(tokens, slice_m=geometry["slice_m"], slice_n=geometry["slice_n"])
    assert mask == mask_of(keep, **geometry)
    assert torch.equal(convert.to_token_mask(mask), tokens)


def test_token_mask_refuses_a_torn_slice_and_names_it(monkeypatch):
    tokens = torch.ones(1, 2, 40, 30, dtype=torch.bool)
    tokens[0, 1, 37, 29] = False
    monkeypatch.setattr("fgattn_cute.tokens._CHUNK_PAIRS", 30 * 16 * 2)
    with pytest.raises(MaskError, match="batch 0, head 1, row 2, column 3 is kept in part"):
        convert.from_token_mask(tokens, slice_m=16, slice_n=8)
    fine = convert.from_token_mask(tokens, slice_m=1, slice_n=1)
    assert fine.coarsen(16, 8).density == 1.0
    with pytest.raises(MaskError, match=r"keep is .* not a tensor of bool values and rank 4"):
        convert.from_token_mask(tokens.float(), slice_m=1, slice_n=1)


# ---- q2k lists ------------------------------------------------------------------------------------------------------
def q2k_lists(keep, shuffle=True):
    """FastVideo's rule: idx[b, h, m, :num] names the key blocks of query block m; the rest is filler."""
    idx = torch.full(keep.shape, -1, dtype=torch.int32)
    num = torch.zeros(keep.shape[:3], dtype=torch.int32)
    for b, h, m in np.ndindex(*keep.shape[:3]):
        blocks = np.flatnonzero(keep[b, h, m].numpy())
        if shuffle:
            np.random.shuffle(blocks)
        idx[b, h, m, : len(blocks)] = torch.from_numpy(blocks.astype(np.int32))
        num[b, h, m] = len(blocks)
    return idx, num


@FEW
@given(maps())
def test_q2k(case):
    keep, geometry = case
    idx, num = q2k_lists(keep)
    assert convert.from_q2k(idx, num, **geometry) == mask_of(keep, **geometry)
    back_idx, back_num = convert.to_q2k(mask_of(keep, **geometry))
    assert torch.equal(back_num, num) and back_idx.dtype == back_num.dtype == torch.int32
    for row in np.ndindex(*keep.shape[:3]):
        assert back_idx[row][: num[row]].tolist() == keep[row].nonzero().flatten().tolist()
        assert sorted(back_idx[row].tolist()) == list(range(keep.shape[-1]))


def test_q2k_defaults_and_variable_blocks():
    keep = torch.rand(1, 2, 3, 5) < 0.5
    idx, num = q2k_lists(keep)
    assert convert.from_q2k(idx, num, slice_m=64, slice_n=64) == mask_of(keep, **geometry_of(64, 64, 192, 320))
    sizes = torch.tensor([64, 64, 64, 64, 10], dtype=torch.int32)
    mask = convert.from_q2k(idx, num, sizes, slice_m=64, slice_n=64, seqlen_q=190)
    assert mask == mask_of(keep, **geometry_of(64, 64, 190, 266))
    with pytest.raises(MaskError, match="only the last block may hold fewer than 64 keys"):
        convert.from_q2k(idx, num, sizes.flip(0), slice_m=64, slice_n=64)


def test_q2k_refusals():
    idx, num = q2k_lists(torch.rand(1, 1, 3, 5) < 2)
    for position, value, message in (
        (0, 5, r"outside 0\.\.4"),
        (0, -1, r"outside 0\.\.4"),
        (1, idx[0, 0, 0, 0], "twice"),
    ):
        bad = idx.clone()
        bad[0, 0, 0, position] = value
        with pytest.raises(MaskError, match=message):
            convert.from_q2k(bad, num, slice_m=16, slice_n=8)
    with pytest.raises(MaskError, match=r"a count lies outside 0\.\.5"):
        convert.from_q2k(idx, num + 1, slice_m=16, slice_n=8)
    with pytest.raises(MaskError, match="seqlen_q 70 takes 5 blocks of 16, the map has 3"):
        convert.from_q2k(idx, num, slice_m=16, slice_n=8, seqlen_q=70)


def test_fa4_block_sparse_tensors_are_the_same_lists():
    keep = torch.rand(2, 2, 3, 5) < 0.5
    full_block_idx, full_block_cnt = q2k_lists(keep, shuffle=False)
    mask = convert.from_q2k(full_block_idx, full_block_cnt, slice_m=128, slice_n=128, seqlen_q=300, seqlen_k=600)
    assert mask == mask_of(keep, **geometry_of(128, 128, 300, 600))


# ---- SpargeAttn -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("slice_m", "slice_n"), [(128, 64), (64, 128)])
def test_sparge(slice_m, slice_n):
    geometry = geometry_of(slice_m, slice_n, 300, 400)
    keep = random_keep(2, 3, geometry)
    for dtype in (torch.int32, torch.int8, torch.bool):
        assert convert.from_sparge(keep.to(dtype), **geometry) == mask_of(keep, **geometry)
    mask_id = convert.to_sparge(mask_of(keep, **geometry))
    assert mask_id.is_contiguous() and mask_id.tolist() == keep.int().tolist()


def test_sparge_refusals():
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    with pytest.raises(MaskError, match="128 x 64, or 64 x 128 on sm_90, not 64 x 64"):
        convert.from_sparge(keep, slice_m=64, slice_n=64)
    with pytest.raises(MaskError, match="values other than 0 and 1"):
        convert.from_sparge(keep + 2, slice_m=64, slice_n=128)
    with pytest.raises(MaskError, match="0/1 integer or bool"):
        convert.from_sparge(keep.float(), slice_m=64, slice_n=128)
    with pytest.raises(MaskError, match=r"SpargeAttn on sm_90 .* has slices of 64 x 128, the mask has 64 x 1"):
        convert.to_sparge(SliceMask.full(**geometry_of(64, 1, 128, 128)))


# ---- Chipmunk -------------------------------------------------------------------------------------------------------
def chipmunk_lists(keep, multiple_of):
    """Chipmunk's rule: a descending stable argsort of the mask puts kept columns first; counts are rounded up."""
    order = keep.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    counts = keep.sum(-1)
    return order, ((counts + multiple_of - 1) // multiple_of * multiple_of).to(torch.int32)


def test_chipmunk_with_true_counts_is_exact():
    geometry = geometry_of(192, 1, 500, 333)
    keep = random_keep(2, 2, geometry)
    indices, counts = chipmunk_lists(keep, 1)
    mask = convert.from_chipmunk(indices, counts, seqlen_q=500)
    assert mask == mask_of(keep, **geometry)
    back = convert.to_chipmunk(mask, 1)
    assert torch.equal(back[0], indices) and torch.equal(back[1], counts)
    assert convert.to_chipmunk(mask, 1, 128)[0].shape[-1] == 384


def test_chipmunk_with_padded_counts_keeps_what_chipmunk_computes():
    geometry = geometry_of(192, 1, 384, 448)
    keep = random_keep(1, 1, geometry)
    indices, counts = chipmunk_lists(keep, 112)
    mask = convert.from_chipmunk(indices, counts)
    computed = torch.zeros_like(keep)
    for m in range(2):
        computed[0, 0, m, indices[0, 0, m, : counts[0, 0, m]].long()] = True
    assert mask == mask_of(computed, **geometry)
    assert torch.equal(convert.to_chipmunk(mask, 112)[1], counts)
    with pytest.raises(MaskError, match="up to a multiple of 112 with further columns"):
        convert.to_chipmunk(mask_of(keep, **geometry), 112)
    with pytest.raises(MaskError, match="Chipmunk has slices of 192 x 1, the mask has 64 x 1"):
        convert.to_chipmunk(mask.refine(64, 1), 112)


# ---- FlashInfer -----------------------------------------------------------------------------------------------------
@FEW
@given(
    st.sampled_from([(16, 8), (1, 1), (64, 3)]), st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0])
)
def test_flashinfer_bsr(block, rows, columns, density):
    sparse = pytest.importorskip("scipy.sparse")
    r, c = block
    keep = torch.rand(1, 1, rows, columns) < density
    tokens = expand_to_tokens(keep, geometry_of(r, c, rows * r, columns * c))[0, 0].numpy()
    bsr = sparse.bsr_matrix(tokens, blocksize=(r, c))
    indptr, indices = torch.from_numpy(bsr.indptr.copy()), torch.from_numpy(bsr.indices.copy())
    mask = convert.from_flashinfer_bsr(indptr, indices, rows * r, columns * c, r, c)
    assert mask == mask_of(keep, **geometry_of(r, c, rows * r, columns * c))
    got = convert.to_flashinfer_bsr(mask)
    assert torch.equal(got[0], indptr) and torch.equal(got[1], indices) and got[0].dtype == torch.int32
    assert got[2:] == (rows * r, columns * c, r, c)


def test_flashinfer_bsr_with_inner_masks():
    indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    inner = torch.rand(3, 4, 2) < 0.5
    mask = convert.from_flashinfer_bsr(indptr, indices, 8, 6, 4, 2, inner)
    tokens = torch.zeros(8, 6, dtype=torch.bool)
    tokens[0:4, 0:2], tokens[0:4, 4:6], tokens[4:8, 2:4] = inner
    assert torch.equal(mask.to_dense()[0, 0], tokens) and (mask.slice_m, mask.slice_n) == (1, 1)


def test_flashinfer_bsr_refusals():
    good = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    for args, message in (
        ((*good, 9, 6, 4, 2), "9 x 6 is not made of whole blocks of 4 x 2"),
        ((torch.tensor([0, 3, 2]), good[1], 8, 6, 4, 2), "indptr must rise from 0 to 2"),
        ((torch.tensor([0, 1]), good[1], 8, 6, 4, 2), "in 3 steps"),
        ((good[0], torch.tensor([0, 3]), 8, 6, 4, 2), r"outside 0\.\.2"),
        ((torch.tensor([0, 2, 2]), torch.tensor([1, 1]), 8, 6, 4, 2), "twice in one row"),
        ((*good, 8, 6, 4, 2, torch.ones(2, 4, 3) > 0), r"is not bool \(2, 4, 2\)"),
    ):
        with pytest.raises(MaskError, match=message):
            convert.from_flashinfer_bsr(*args)
    keep = torch.zeros(1, 2, 2, 3, dtype=torch.bool)
    keep[0, 1, 0, 0] = True
    with pytest.raises(MaskError, match="one pattern for all heads"):
        convert.to_flashinfer_bsr(mask_of(keep, **geometry_of(4, 2, 8, 6)))
    with pytest.raises(MaskError, match="seqlen_k 5 is not a multiple of slice_n 2"):
        convert.to_flashinfer_bsr(mask_of(keep, **geometry_of(4, 2, 8, 5)))


@pytest.mark.parametrize(("slice_m", "slice_n"), [(None, None), (1, 1), (4, 2)])
def test_flashinfer_variable(slice_m, slice_n):
    rows, columns = ([8, 12, 4, 7], [12, 4, 4, 11]), ([6, 2, 5], [2, 8, 3])
    keep = torch.rand(2, 4, 3) < 0.5
    sizes = torch.tensor(rows, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)
    mask = convert.from_flashinfer_variable(keep, *sizes, slice_m=slice_m, slice_n=slice_n)
    for head in range(2):
        expected = np.repeat(np.repeat(keep[head].numpy(), rows[head], 0), columns[head], 1)
        assert np.array_equal(mask.to_token_mask()[0, head].numpy(), expected)
    assert (mask.slice_m, mask.slice_n) == (slice_m or 4, slice_n or 2)


def test_flashinfer_variable_round_trip_and_groups():
    geometry = geometry_of(16, 8, 40, 50)
    keep = random_keep(1, 2, geometry)
    grouped = mask_of(keep.repeat_interleave(3, 1), **geometry)
    block_map, rows, columns = convert.to_flashinfer_variable(grouped, 6, 2)
    assert torch.equal(block_map, keep[0])
    assert rows.tolist() == [[16, 16, 8]] * 2 and columns.tolist() == [[8, 8, 8, 8, 8, 8, 2]] * 2
    assert convert.from_flashinfer_variable(block_map, rows, columns, 6, 2, slice_m=16, slice_n=8) == grouped
    with pytest.raises(MaskError, match="query heads of one group differ"):
        convert.to_flashinfer_variable(mask_of(random_keep(1, 6, geometry), **geometry), 6, 2)


def test_flashinfer_variable_refusals():
    keep = torch.ones(1, 2, 1, dtype=torch.bool)
    rows, columns = torch.tensor([[24, 8]]), torch.tensor([[10]])
    with pytest.raises(MaskError, match="slice_m=16 would cut: divisors of 24 are exact"):
        convert.from_flashinfer_variable(keep, rows, columns, slice_m=16)
    with pytest.raises(MaskError, match="num_kv_heads is 2"):
        convert.from_flashinfer_variable(keep, rows, columns, 4, 2)
    with pytest.raises(MaskError, match="add up to one length in every head"):
        convert.from_flashinfer_variable(keep.expand(2, 2, 1), torch.tensor([[24, 8], [8, 8]]), columns.expand(2, 1))


# ---- SVG2 -----------------------------------------------------------------------------------------------------------
def test_svg2_clusters():
    q_sizes, k_sizes = [partition(40, 4) for _ in range(2)], [partition(50, 6) for _ in range(2)]
    keep = torch.rand(1, 2, 4, 6) < 0.5
    sizes = torch.tensor(q_sizes)[None], torch.tensor(k_sizes)[None]
    mask = convert.from_svg2(keep, *sizes)
    for head in range(2):
        expected = np.repeat(np.repeat(keep[0, head].numpy(), q_sizes[head], 0), k_sizes[head], 1)
        assert np.array_equal(mask.to_token_mask()[0, head].numpy(), expected)


def test_svg2_with_key_labels_keeps_the_original_order():
    labels = torch.randint(0, 5, (1, 2, 60))
    keep = torch.rand(1, 2, 3, 5) < 0.5
    kc_size = torch.nn.functional.one_hot(labels, 5).sum(2)
    qc_size = torch.tensor([16, 32, 2]).expand(1, 2, -1)
    permutation = labels.argsort(dim=-1, stable=True)  # what permute_tensor_by_labels sorts by
    mask = convert.from_svg2(keep, qc_size, kc_size, permutation)
    assert (mask.slice_m, mask.slice_n, mask.seqlen_q) == (16, 1, 50)
    query_cluster = torch.tensor([0] * 16 + [1] * 32 + [2] * 2)
    for head in range(2):
        expected = keep[0, head][query_cluster][:, labels[0, head]]
        assert torch.equal(mask.to_token_mask()[0, head], expected)
    with pytest.raises(MaskError, match="slice_n is 1, not 8"):
        convert.from_svg2(keep, qc_size, kc_size, permutation, slice_n=8)


def test_svg2_empty_clusters_and_round_trip():
    keep = torch.tensor([[[[True, False, True]]]])
    mask = convert.from_svg2(keep, torch.tensor([[[16]]]), torch.tensor([[[0, 6, 4]]]))
    assert mask.to_token_mask()[0, 0, 0].tolist() == [False] * 6 + [True] * 4
    geometry = geometry_of(16, 8, 40, 50)
    dense = random_keep(2, 3, geometry)
    block_map, qc, kc = convert.to_svg2(mask_of(dense, **geometry))
    assert torch.equal(block_map, dense)
    assert qc[1, 2].tolist() == [16, 16, 8] and kc[0, 0].tolist() == [8, 8, 8, 8, 8, 8, 2]


# ---- FlexAttention --------------------------------------------------------------------------------------------------
def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def banded(b, h, q_idx, kv_idx):
    return ((q_idx // 16 - kv_idx // 8).abs() <= 1 + h) | (kv_idx < 8 * (b + 1))


def test_flex_block_mask_made_by_torch():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    for seqlens in ((64, 64), (50, 70)):
        block_mask = flex.create_block_mask(banded, 2, 2, *seqlens, device="cpu", BLOCK_SIZE=32)
        mask = convert.from_flex(block_mask, slice_m=16, slice_n=8)
        assert torch.equal(mask.to_token_mask(), flex.create_mask(banded, 2, 2, *seqlens, device="cpu"))
        with pytest.raises(MaskError, match="32 x 32 cannot hold this mask"):
            convert.from_flex(block_mask)
    causal_mask = flex.create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    fine = convert.from_flex(causal_mask, slice_m=1, slice_n=1)
    assert torch.equal(fine.to_token_mask()[0, 0], torch.ones(64, 64).tril().bool())


@pytest.mark.parametrize("block_size", [None, 64, (32, 64)])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_to_flex_attends_alike_in_torch(block_size):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    geometry = geometry_of(32, 16, 100, 130)
    keep = random_keep(1, 2, geometry)
    keep[:, :, :, :4] = True
    block_mask = convert.to_flex(mask_of(keep, **geometry), block_size)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (100, 130, 130))
    out = flex.flex_attention(q, k, v, block_mask=block_mask)
    tokens = expand_to_tokens(keep, geometry)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    size = block_mask.BLOCK_SIZE
    assert convert.from_flex(block_mask, slice_m=32, slice_n=16) == mask_of(keep, **geometry)
    # every listed full block is full, every unlisted block is empty
    padded = torch.nn.functional.pad(tokens, (0, -130 % size[1], 0, -100 % size[0]))
    areas = padded.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0])).sum((3, 5))
    full, partial = (_listed(block_mask, prefix, areas.shape) for prefix in ("full_kv", "kv"))
    assert torch.equal(full, areas == size[0] * size[1])
    assert torch.equal(full | partial, areas > 0) and not (full & partial).any()


def _listed(block_mask, prefix, shape):
    listed = torch.zeros(shape, dtype=torch.bool)
    counts, indices = getattr(block_mask, f"{prefix}_num_blocks"), getattr(block_mask, f"{prefix}_indices")
    for row in np.ndindex(*shape[:3]):
        listed[row][indices[row][: counts[row]].long()] = True
    return listed


@FEW
@given(st.data(), geometries(max_len=80))
def test_mask_mod_round_trip(data, geometry):
    keep = data.draw(dense_maps(geometry))
    mask = mask_of(keep, **geometry)
    back = convert.from_mask_mod(
        convert.to_mask_mod(mask),
        mask.batch,
        mask.heads,
        mask.seqlen_q,
        mask.seqlen_k,
        slice_m=mask.slice_m,
        slice_n=mask.slice_n,
    )
    assert back == mask
    mod = convert.to_mask_mod(mask)
    tokens = expand_to_tokens(keep, geometry)
    index = [torch.tensor(np.random.randint(n)) for n in tokens.shape]
    assert bool(mod(*index)) == bool(tokens[tuple(index)])


def test_mask_mod_refusals():
    with pytest.raises(MaskError, match="row 0, column 1 is kept in part"):
        convert.from_mask_mod(causal, None, None, 64, 64, slice_m=16, slice_n=1)
    with pytest.raises(MaskError, match="mask_mod is a Tensor"):
        convert.from_mask_mod(torch.ones(2), 1, 1, 8, 8, slice_m=1, slice_n=1)


# ---- MagiAttention --------------------------------------------------------------------------------------------------
def tokens_of_ranges(q_ranges, k_ranges, total_q, total_k):
    tokens = torch.zeros(total_q, total_k, dtype=torch.int32)
    for (q0, q1), (k0, k1) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        tokens[q0:q1, k0:k1] += 1
    return tokens


@FEW
@given(maps(max_len=70))
def test_magi_ranges_of_several_heads(case):
    keep, geometry = case
    keep = keep[:1]
    mask = mask_of(keep, **geometry)
    q_ranges, k_ranges, types = convert.to_magi_ranges(mask)
    assert q_ranges.dtype == k_ranges.dtype == torch.int32 and not types.any()
    heads = mask.heads
    folded = tokens_of_ranges(q_ranges, k_ranges, heads * mask.seqlen_q, heads * mask.seqlen_k)
    blocks = torch.block_diag(*expand_to_tokens(keep, geometry)[0].int())
    assert torch.equal(folded, blocks.int())
    assert convert.from_magi_ranges(q_ranges, k_ranges, types, num_heads=heads, **geometry) == mask


def test_magi_ranges_of_grouped_heads():
    geometry = geometry_of(16, 8, 32, 24)
    keep = random_keep(1, 4, geometry)
    q_ranges, k_ranges, _ = convert.to_magi_ranges(mask_of(keep, **geometry), 2)
    folded = tokens_of_ranges(q_ranges, k_ranges, 4 * 32, 2 * 24)
    tokens = expand_to_tokens(keep, geometry)[0].int()
    expected = torch.block_diag(torch.cat([tokens[0], tokens[1]]), torch.cat([tokens[2], tokens[3]]))
    assert torch.equal(folded, expected.int())
    back = convert.from_magi_ranges(q_ranges, k_ranges, num_heads=4, num_kv_heads=2, **geometry)
    assert back == mask_of(keep, **geometry)


def test_magi_coarsest_granularity_and_refusals():
    q = torch.tensor([[0, 32], [32, 70]])
    k = torch.tensor([[8, 24], [0, 90]])
    mask = convert.from_magi_ranges(q, k)
    assert (mask.slice_m, mask.slice_n, mask.seqlen_q, mask.seqlen_k) == (32, 8, 70, 90)
    assert torch.equal(mask.to_token_mask()[0, 0].int(), tokens_of_ranges(q, k, 70, 90))
    for args, options, message in (
        ((q, k), {"slice_m": 64}, "q_ranges have edges that slice_m=64 would cut: divisors of 32 are exact"),
        ((q, k, torch.tensor([0, 1])), {}, "causal ranges, which cut slices"),
        ((q, torch.cat([k, k])), {}, "2 q_ranges and 4 k_ranges do not pair up"),
        ((torch.cat([q, q[:1]]), torch.cat([k, k[:1]])), {}, "range pairs overlap"),
        ((q.flip(1), k), {}, "which is empty, outside"),
        ((q, k), {"seqlen_k": 80}, "which is empty, outside 0..80"),
        ((q[:0], k[:0]), {}, "pass the seqlen"),
    ):
        with pytest.raises(MaskError, match=message):
            convert.from_magi_ranges(*args, **options)


# ---- random geometries for the formats whose cases above are fixed --------------------------------------------------
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum)


@FEW
@given(st.data(), st.sampled_from([(128, 64), (64, 128)]))
def test_sparge_round_trip(data, block):
    geometry = data.draw(geometries(max_len=400, slice_ms=block[:1], slice_ns=block[1:]))
    keep = data.draw(dense_maps(geometry))
    mask = convert.from_sparge(keep.to(torch.int32), **geometry)
    assert mask == mask_of(keep, **geometry) and torch.equal(convert.to_sparge(mask).bool(), keep)


@FEW
@given(st.data())
def test_chipmunk_round_trip(data):
    geometry = data.draw(geometries(max_len=400, slice_ms=(192,), slice_ns=(1,)))
    keep = data.draw(dense_maps(geometry))
    lengths = {name: geometry[name] for name in ("seqlen_q", "seqlen_k")}
    mask = convert.from_chipmunk(*chipmunk_lists(keep, 1), **lengths)
    assert mask == mask_of(keep, **geometry)
    assert convert.from_chipmunk(*convert.to_chipmunk(mask, 1, 112), **lengths) == mask


@FEW
@given(st.data(), SIZES, SIZES)
def test_variable_blocks_round_trip(data, rows, columns):
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=(n := len(rows) * len(columns)), max_size=n)))
    keep = keep.view(1, len(rows), len(columns))
    expected = np.repeat(np.repeat(keep[0].numpy(), rows, 0), columns, 1)
    mask = convert.from_flashinfer_variable(keep, torch.tensor([rows]), torch.tensor([columns]))
    assert np.array_equal(mask.to_token_mask()[0, 0].numpy(), expected)
    clusters = convert.from_svg2(keep[None], torch.tensor([[rows]]), torch.tensor([[columns]]))
    assert clusters == mask
    assert convert.from_flashinfer_variable(*convert.to_flashinfer_variable(mask), slice_m=1, slice_n=1) == mask.refine(
        1, 1
    )
    assert convert.from_svg2(*convert.to_svg2(mask), slice_m=1, slice_n=1) == mask.refine(1, 1)


@FEW
@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]))
def test_flex_round_trip(data, times_m, times_n):
    pytest.importorskip("torch.nn.attention.flex_attention")
    geometry = data.draw(geometries(max_len=90, slice_ms=(8, 16), slice_ns=(4, 8)))
    mask = mask_of(data.draw(dense_maps(geometry)), **geometry)
    block_mask = convert.to_flex(mask, (times_m * mask.slice_m, times_n * mask.slice_n))
    assert convert.from_flex(block_mask, slice_m=mask.slice_m, slice_n=mask.slice_n) == mask
