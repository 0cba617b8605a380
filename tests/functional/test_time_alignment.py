"""Interpolation between clocks: exact where it can be, masked where it cannot."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.time_alignment import interpolate_features


def clock(*times):
    return torch.tensor([times], dtype=torch.float64)


@given(
    slope=st.floats(-5, 5),
    start=st.floats(-3, 1e5),
    queries=st.lists(st.floats(0, 0.98), min_size=1, max_size=8),
)
def test_a_straight_line_comes_back_exactly(slope, start, queries):
    times = start + torch.arange(50, dtype=torch.float64) / 50
    features = (slope * (times - start))[None, :, None]
    query = start + torch.tensor([queries], dtype=torch.float64)
    aligned, valid = interpolate_features(features, times[None], query)
    assert valid.all()
    # float64 seconds at 1e5 have steps of 1.5e-11
    assert_close(aligned[..., 0], slope * (query - start), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 300))
def test_equals_numpy_on_the_usable_features(seed):
    generator = np.random.default_rng(seed)
    times = np.sort(generator.uniform(0, 1, 12))
    usable = generator.random(12) < 0.6
    usable[3] = True
    values, query = generator.normal(size=12), generator.uniform(-0.3, 1.3, 20)
    hidden = np.where(usable, values, np.nan)
    aligned, valid = interpolate_features(
        torch.tensor(hidden)[None, :, None],
        torch.tensor(times)[None],
        torch.tensor(query)[None],
        feature_mask=torch.tensor(usable)[None],
        max_gap=10.0,
    )
    expected = np.interp(query, times[usable], values[usable])
    assert valid.all()
    np.testing.assert_allclose(aligned[0, :, 0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_wavlm_clock_covers_every_frame_of_its_sound():
    # 16 kHz, hop 320, window 400: the features of 30000 samples against frames over all of them.
    times = (torch.arange((30000 - 400) // 320 + 1) * 320 + 199.5) / 16000
    query = torch.linspace(0, 30000 / 16000, 60)[None]
    assert interpolate_features(torch.ones(1, len(times), 1), times[None], query).valid.all()


def test_what_is_too_far_is_zero_and_not_valid():
    features = torch.ones(1, 4, 3)
    times = clock(0.0, 0.02, 1.0, 1.02)
    aligned, valid = interpolate_features(features, times, clock(-0.5, 0.05, 0.5, 0.97, 2.0))
    assert valid.tolist() == [[False, True, False, True, False]]
    assert torch.equal(aligned, valid.unsqueeze(-1).expand(-1, -1, 3).float())


def test_across_a_hole_the_near_feature_is_held():
    features = torch.tensor([[[1.0], [5.0]]])
    aligned, _ = interpolate_features(features, clock(0.0, 1.0), clock(0.03, 0.97))
    assert aligned.flatten().tolist() == [1.0, 5.0]


def test_masked_features_reach_neither_result_nor_gradient():
    features = torch.randn(1, 6, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False, False]])
    times = clock(0.0, 0.02, 0.04, 0.06, torch.nan, -7.0)
    query = clock(0.01, 0.04, 0.07, 3.0, torch.nan)
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        given = torch.where(mask[..., None], features, poison).requires_grad_()
        aligned, valid = interpolate_features(given, times, query, feature_mask=mask)
        (grad,) = torch.autograd.grad(aligned.square().sum(), given)
        assert torch.isfinite(aligned).all()
        assert not grad[~mask].any()
        results.append((aligned, grad, valid))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert results[0][2].tolist() == [[True, True, True, False, False]]


def test_no_usable_feature_at_all():
    features = torch.full((1, 3, 2), torch.nan)
    times, query = clock(0.0, 0.02, 0.04), clock(0.0, 0.01)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    for out in (
        interpolate_features(features, times, query, feature_mask=nothing),
        interpolate_features(features[:, :0], times[:, :0], query),
    ):
        assert not out.valid.any()
        assert torch.equal(out.aligned, torch.zeros(1, 2, 2))


def test_rows_of_a_batch_have_clocks_of_their_own():
    features = torch.randn(3, 5, 2)
    times = torch.arange(5.0) / 50 + torch.tensor([[0.0], [3.0], [-1.0]])
    query = times[:, [4, 0, 2]] + 0.004
    aligned, valid = interpolate_features(features, times, query)
    for row in range(3):
        one = slice(row, row + 1)
        alone = interpolate_features(features[one], times[one], query[one])
        assert torch.equal(alone.aligned, aligned[one])
        assert torch.equal(alone.valid, valid[one])


def test_compiles_without_a_graph_break():
    compiled = torch.compile(interpolate_features, fullgraph=True, backend="aot_eager")
    features, times = torch.randn(2, 9, 3), torch.arange(9.0).expand(2, 9) / 50
    query = torch.rand(2, 4) / 5
    assert_close(compiled(features, times, query), interpolate_features(features, times, query))


TIMES = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"max_gap": 0.0}, ValueError, "`max_gap` must be in .0, inf.; got 0.0"),
        ({"feature_mask": torch.ones(1, 2)}, TypeError, "`feature_mask` must be a bool tensor"),
        ({"query_times": TIMES.half()}, TypeError, "`query_times` must be float32 or float64"),
        ({"feature_times": TIMES.long()}, TypeError, "`feature_times` must be float32 or float64"),
        ({"feature_times": torch.zeros(1, 3)}, ValueError, "axis `s` is 2 in `features` but 3"),
    ],
)
def test_wrong_input_is_refused(change, error, sentence):
    given = {
        "features": torch.zeros(1, 2, 3),
        "feature_times": TIMES,
        "query_times": TIMES,
        **change,
    }
    with pytest.raises(error, match=sentence):
        interpolate_features(**given)
