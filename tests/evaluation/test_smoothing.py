"""Smoothing is what its docstring says, crosses no gap, and streams; ensembles of models."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.evaluation import ensemble, smooth, smoothing
from mmau.evaluation.smoothing import ExponentialSmoother

KINDS = ("mean", "median", "exponential")


def make_video(seed, frames=40, holes=True):
    """An irregular clock that has gaps, stands and jumps back, and frames without a face."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor([0.03, 0.04, 0.1, 0.9, 0.0, -0.6])
    drawn = torch.multinomial(torch.tensor([4.0, 4, 2, 1, 1, 1]), frames, True, generator=generator)
    times = steps[drawn].double().cumsum(0)
    prob = torch.rand(frames, 2, generator=generator, dtype=torch.float64)
    valid = torch.rand(frames, generator=generator) < (0.85 if holes else 2)
    return prob, times, valid


def segments(times, valid, max_gap):
    number, current = [], 0
    for i in range(len(times)):
        passed = times[i] - times[i - 1]
        if i and (not (valid[i] and valid[i - 1]) or passed > max_gap or passed < 0):
            current += 1
        number.append(current)
    return number


def literally(prob, times, valid, window, kind, unit, max_gap=0.5):
    """Return what the docstring says, frame by frame, for one Action Unit."""
    segment = segments(times, valid, max_gap)
    result = prob.clone()
    if window == 0:
        return result
    for i in range(len(prob)):
        if not valid[i]:
            continue
        mates = [j for j in range(len(prob)) if segment[j] == segment[i]]
        clock = times.tolist() if unit == "seconds" else list(range(len(prob)))
        if kind == "exponential":
            past = [j for j in mates if j <= i]
            weights = [math.exp(-(clock[i] - clock[j]) / window) for j in past]
            total = sum(w * float(prob[j]) for w, j in zip(weights, past, strict=True))
            result[i] = total / sum(weights)
            continue
        reach = window / 2 if unit == "seconds" else (window - 1) / 2
        near = prob[[j for j in mates if abs(clock[j] - clock[i]) <= reach + 1e-6]]
        result[i] = near.mean() if kind == "mean" else near.quantile(0.5)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("unit", "windows"), [("seconds", (0.1, 0.7)), ("seconds", (0.0, 2.0)), ("frames", (3, 9))]
)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 30))
def test_every_kind_is_what_its_docstring_says(kind, unit, windows, seed, frames):
    prob, times, valid = make_video(seed, frames)
    result = smooth(prob, times, windows, kind=kind, unit=unit, valid=valid)
    for c, window in enumerate(windows):
        expected = literally(prob[:, c], times, valid, window, kind, unit)
        assert_close(result[:, c], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), at=st.integers(0, 39))
def test_smoothing_never_crosses_a_gap(kind, seed, at):
    """Change one frame: nothing outside of its segment may notice, whatever the window."""
    prob, times, valid = make_video(seed)
    other = prob.clone()
    other[at] = 1 - other[at]
    before = smooth(prob, times, (0.3, 100.0), kind=kind, valid=valid)
    after = smooth(other, times, (0.3, 100.0), kind=kind, valid=valid)
    segment = torch.tensor(segments(times, valid, 0.5))
    outside = segment != segment[at]
    assert torch.allclose(before[outside], after[outside], rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10_000), at=st.integers(0, 39))
def test_exponential_smoothing_is_causal_and_the_others_are_not(seed, at):
    prob, times, valid = make_video(seed)
    changed = prob.clone()
    changed[at:] = 1 - changed[at:]
    before, after = (
        smooth(p, times, 1.0, kind="exponential", valid=valid) for p in (prob, changed)
    )
    assert torch.equal(before[:at], after[:at])


def test_a_window_looks_ahead():
    prob, times, _ = make_video(0, holes=False)
    changed = prob.clone()
    changed[-1] = 1 - changed[-1]
    times = torch.arange(len(prob)) / 30
    for kind in ("mean", "median"):
        assert not torch.equal(
            *(smooth(p, times, 9, kind=kind, unit="frames")[:-1] for p in (prob, changed))
        )


@pytest.mark.parametrize("unit", ["seconds", "frames"])
@given(seed=st.integers(0, 10_000))
def test_frame_by_frame_equals_the_whole_video(unit, seed):
    prob, times, valid = make_video(seed)
    prob[~valid] = float("nan")
    windows = (0.0, 0.6)
    whole = smooth(prob, times, windows, kind="exponential", unit=unit, valid=valid)
    smoother = ExponentialSmoother(windows, unit=unit)
    for again in range(2):
        if again:
            smoother.reset()
        for i in range(len(prob)):
            live = smoother.step(prob[i], float(times[i]), valid=bool(valid[i]))
            assert_close(live, whole[i], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), value=st.floats(0, 1))
def test_constants_stay_and_results_lie_within_what_was_there(kind, seed, value):
    prob, times, valid = make_video(seed)
    flat = smooth(torch.full_like(prob, value), times, 0.4, kind=kind, valid=valid)
    assert_close(flat, torch.full_like(prob, value), rtol=0, atol=1e-12)
    smoothed = smooth(prob, times, 0.4, kind=kind, valid=valid)
    assert float(smoothed.min()) >= float(prob.min()) - 1e-12
    assert float(smoothed.max()) <= float(prob.max()) + 1e-12
    mirrored = smooth(1 - prob, times, 0.4, kind=kind, valid=valid)
    assert_close(mirrored, 1 - smoothed, rtol=0, atol=1e-12)


def test_a_median_removes_a_spike_and_keeps_an_edge():
    prob = torch.tensor([0.1, 0.1, 0.9, 0.1, 0.1, 0.9, 0.9, 0.9])[:, None]
    kept = smooth(prob, torch.arange(8) / 30, 3, kind="median", unit="frames").flatten()
    assert_close(kept, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9]))


def test_the_median_in_chunks_equals_the_median_at_once(monkeypatch):
    prob, times, valid = make_video(3, frames=200)
    whole = smooth(prob, times, 1.0, kind="median", valid=valid)
    monkeypatch.setattr(smoothing, "MEDIAN_CHUNK", 100)
    assert torch.equal(smooth(prob, times, 1.0, kind="median", valid=valid), whole)


def test_the_dtype_stays():
    prob = torch.rand(10, 2)
    for kind in KINDS:
        assert smooth(prob, torch.arange(10) / 30, 0.2, kind=kind).dtype == torch.float32


def test_unusable_frames_influence_nothing_even_if_nan():
    prob = torch.tensor([[0.2], [float("nan")], [0.8], [0.4]])
    valid = torch.tensor([True, False, True, True])
    result = smooth(prob, torch.arange(4.0) / 10, 1.0, valid=valid)
    assert_close(result, torch.tensor([[0.2], [float("nan")], [0.6], [0.6]]), equal_nan=True)
    no_frame = torch.zeros(4, dtype=torch.bool)
    assert_close(smooth(prob, torch.arange(4.0), 1.0, valid=no_frame), prob, equal_nan=True)


# -------------------------------------------------------------------------------------- ensembles
@given(seed=st.integers(0, 10_000), average=st.sampled_from(["logit", "probability"]))
def test_a_mean_of_models_is_symmetric_bounded_and_keeps_what_all_agree_on(seed, average):
    generator = torch.Generator().manual_seed(seed)
    probs = list(torch.rand(3, 5, 2, generator=generator, dtype=torch.float64))
    weights = [1.0, 2.0, 0.5]
    together = ensemble(probs, average=average, weights=weights)
    backwards = ensemble(probs[::-1], average=average, weights=weights[::-1])
    assert_close(together, backwards)
    stacked = torch.stack(probs)
    assert bool((together >= stacked.amin(0) - 1e-12).all())
    assert bool((together <= stacked.amax(0) + 1e-12).all())
    assert_close(ensemble([1 - p for p in probs], average=average, weights=weights), 1 - together)
    assert_close(ensemble([probs[0]] * 3, average=average), probs[0])
    assert_close(ensemble([probs[0], probs[1]], average=average, weights=[0, 3]), probs[1])


def test_logit_averaging_averages_logits_and_weighting_repeats_a_model():
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    probs = [torch.sigmoid(one) for one in logits]
    assert_close(ensemble(probs), torch.sigmoid(logits.mean(0)))
    assert_close(ensemble(probs, weights=[2, 1]), ensemble([probs[0], *probs]))


def test_one_certain_model_does_not_outvote_all_others():
    certain, doubt = torch.tensor([1.0]), torch.tensor([0.01])
    assert float(ensemble([certain, *[doubt] * 9])) < 0.1
    assert ensemble([torch.tensor([float("nan")]), certain]).isnan().all()
    assert float(ensemble([certain, torch.tensor([0.0])])) == 0.5


# ----------------------------------------------------------------------------------------- errors
ONE = torch.full((3, 1), 0.5)
CLOCK = torch.arange(3.0) / 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smooth(ONE, CLOCK, 1.0, kind="mode"), "`kind` must be one of 'mean', 'median'"),
        (lambda: smooth(ONE, CLOCK, 1.0, unit="ms"), "`unit` must be one of 'seconds', 'frames'"),
        (lambda: smooth(ONE, CLOCK, 2, unit="frames"), "odd number of frames, or 0; got 2"),
        (lambda: smooth(ONE, CLOCK, 0.5, unit="frames"), "odd number of frames, or 0; got 0.5"),
        (lambda: smooth(ONE, CLOCK, float("inf")), r"`window` must be in \[0, inf\); got inf"),
        (lambda: smooth(ONE * 4, CLOCK, 1.0), "got values from 2 to 2. Are these logits"),
        (lambda: ExponentialSmoother([1.0]).step(torch.ones(2), 0.0), "axis `c` of `prob` must be"),
        (
            lambda: ExponentialSmoother([1.0]).step(torch.tensor([float("nan")]), 0.0),
            "NaN in a usable frame",
        ),
        (lambda: smooth(ONE, torch.full((3,), float("nan")), 1.0), "`timestamps` must be finite"),
        (lambda: smooth(ONE, CLOCK, -1.0), "`window` must be in"),
        (lambda: smooth(ONE, CLOCK, 1.0, max_gap=0), "`max_gap` must be in"),
        (lambda: smooth(ONE * float("nan"), CLOCK, 1.0), "NaN in a usable frame"),
        (lambda: ensemble([]), "at least one model; got none"),
        (lambda: ensemble([ONE, ONE[:1]]), r"one shape; got \(3, 1\) and, at 1, \(1, 1\)"),
        (lambda: ensemble([ONE, 4 * ONE]), r"`probs\[1\]` must be in \[0, 1\].* Are these logits"),
        (lambda: ensemble([ONE], average="mean"), "`average` must be one of"),
        (lambda: ensemble([ONE], weights=[1, 1]), "`weights` must be 1 numbers; got 2"),
        (lambda: ensemble([ONE, ONE], weights=[1, -1]), "`weights` must be in"),
        (lambda: ensemble([ONE], weights=[0]), "`weights` must not all be 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`timestamp` must be finite; got nan"):
        ExponentialSmoother([1.0]).step(torch.ones(1), float("nan"))


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="`valid` must be a bool tensor"):
        smooth(ONE, CLOCK, 1.0, valid=torch.ones(3))
    with pytest.raises(TypeError, match=r"`probs\[0\]` must be a tensor"):
        ensemble([0.5])
