"""Attention in a window of time: a loop as the oracle, and blocks that change nothing."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional import windowed_attention as package_name
from mmau.functional.windowed_attention import attend_in_blocks, find_key_blocks, windowed_attention

HEADS, WIDTH = 2, 6


def case(seed, batch=2, t=7, s=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = {
        "query": normal(batch, t, WIDTH),
        "key": normal(batch, s, WIDTH),
        "value": normal(batch, s, WIDTH),
        "null_key": normal(WIDTH),
        "null_value": normal(WIDTH),
    }
    times = {
        "query_time": torch.rand(batch, t, generator=generator, dtype=torch.float64) * 3,
        "key_time": torch.rand(batch, s, generator=generator, dtype=torch.float64) * 3,
    }
    return tensors, times


def run(tensors, times, **options):
    settings = {"window": 0.5, "slopes": torch.tensor([3.0, 0.25], dtype=torch.float64), **options}
    return windowed_attention(**tensors, **times, **settings)


def with_gradients(tensors, times, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = run(leaves, times, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum(), leaves.values())
    return out, dict(zip(leaves, gradients, strict=True))


def loop(tensors, times, mask, window, slopes):
    """One clip, one query, one head after the other."""
    out = torch.zeros_like(tensors["query"])
    size = WIDTH // HEADS
    for b, clip in enumerate(tensors["query"]):
        for t, row in enumerate(clip):
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = [row[part] @ tensors["null_key"][part] / size**0.5]
                values = [tensors["null_value"][part]]
                for s in range(tensors["key"].shape[1]):
                    gap = abs(float(times["query_time"][b, t]) - float(times["key_time"][b, s]))
                    if mask[b, s] and gap <= window:
                        score = row[part] @ tensors["key"][b, s, part] / size**0.5
                        scores.append(score - float(slopes[h]) * gap)
                        values.append(tensors["value"][b, s, part])
                out[b, t, part] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("implementation", ["dense", "local"])
@pytest.mark.parametrize("window", [0.01, 0.4, 10.0])
def test_equals_the_loop(implementation, window):
    tensors, times = case(0)
    mask = torch.rand(2, 11) > 0.3
    slopes = torch.tensor([2.0, 0.0], dtype=torch.float64)
    out = run(
        tensors, times, window=window, slopes=slopes, key_mask=mask, implementation=implementation
    )
    assert_close(out, loop(tensors, times, mask, window, slopes), rtol=1e-12, atol=1e-12)


CLOCK = st.sampled_from(["steady", "irregular", "shuffled", "late", "burst"])


def clock(kind, seconds, generator, batch, length):
    """Times of a clip: on the beat, jittered, in any order, beyond all others, all at once."""
    steady = torch.linspace(0, seconds, length, dtype=torch.float64).repeat(batch, 1)
    jitter = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    if kind == "irregular":
        return (seconds * jitter).sort(1).values
    if kind == "shuffled":
        return seconds * jitter
    if kind == "late":
        return steady + 100
    if kind == "burst":
        return torch.where(jitter < 0.7, 1.0, steady)
    return steady


@given(
    seed=st.integers(0, 1000),
    lengths=st.tuples(st.integers(1, 150), st.integers(0, 200)),
    clocks=st.tuples(CLOCK, CLOCK),
    window=st.sampled_from([0.02, 0.3, 50.0]),
    missing=st.sampled_from(["nothing", "ends", "holes", "everything", "one clip", "times"]),
)
def test_blocks_equal_all_pairs_with_gradients(seed, lengths, clocks, window, missing):
    generator = torch.Generator().manual_seed(seed)
    t, s = lengths
    tensors, times = case(seed, 3, t, s)
    times["query_time"] = clock(clocks[0], 6.0, generator, 3, t)
    times["key_time"] = clock(clocks[1], 6.0, generator, 3, s)
    mask = torch.ones(3, s, dtype=torch.bool)
    if missing == "ends":  # ragged clips
        mask = torch.arange(s) < torch.tensor([[s], [s // 2], [s // 3]])
    elif missing == "holes":
        mask = torch.rand(3, s, generator=generator) > 0.4
    elif missing == "everything":
        mask[:] = False
    elif missing == "one clip":
        mask[1] = False
    elif missing == "times":
        times["key_time"][:, ::3] = torch.nan
        times["key_time"][:, 1::5] = torch.inf
        times["query_time"][:, ::4] = torch.nan
    # What is masked may be anything, its time too.
    times["key_time"] = torch.where(mask, times["key_time"], torch.nan)
    tensors["key"][~mask] = torch.nan
    tensors["value"][~mask] = torch.inf
    options = {"window": window, "key_mask": mask}
    dense, dense_gradients = with_gradients(tensors, times, implementation="dense", **options)
    local, local_gradients = with_gradients(tensors, times, implementation="local", **options)
    assert torch.isfinite(dense).all()
    assert_close(local, dense, rtol=1e-11, atol=1e-12)
    for name, gradient in dense_gradients.items():
        assert torch.isfinite(gradient).all(), name
        # Scores of different sizes are summed in another order.
        assert_close(local_gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
        if name in ("key", "value"):
            assert not gradient[~mask].any()


@pytest.mark.parametrize(
    ("frame", "sound", "window"), [(0.92, -0.08, 1.0), (0.84, 1.84, 1.0), (0.76, 0.06, 0.7)]
)
def test_the_edge_of_the_window_counts_in_blocks_too(frame, sound, window):
    # The distance is no larger than the window, but frame +- window is rounded short of the sound.
    assert abs(frame - sound) <= window
    assert not frame - window <= sound <= frame + window
    tensors, _ = case(0, 1, 1, 1)
    times = {
        "query_time": torch.tensor([[frame]], dtype=torch.float64),
        "key_time": torch.tensor([[sound]], dtype=torch.float64),
    }
    dense = run(tensors, times, window=window, implementation="dense")
    assert not torch.allclose(dense[0, 0], tensors["null_value"])
    assert_close(run(tensors, times, window=window, implementation="local"), dense)


def test_blocks_compute_a_small_part_of_the_scores():
    frames = torch.arange(3000, dtype=torch.float64).view(1, -1) / 25
    sound = torch.arange(6000, dtype=torch.float64).view(1, -1) / 50
    assert find_key_blocks(frames, sound, 1.0).num_scores < 0.05 * 3000 * 6000


@pytest.mark.parametrize(("window", "t", "blocks"), [(0.2, 300, 1), (1e3, 300, 0), (0.2, 20, 0)])
def test_auto_takes_the_cheaper_one(window, t, blocks, monkeypatch):
    tensors, _ = case(0, 1, t, 300)
    times = {
        "query_time": torch.arange(t).view(1, -1) / 25.0,
        "key_time": torch.arange(300.0).view(1, -1) / 25,
    }
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return attend_in_blocks(*args, **options)

    # The package's attribute of this name is the function.
    module = sys.modules["mmau.functional.windowed_attention"]
    monkeypatch.setattr(module, "attend_in_blocks", counted)
    run(tensors, times, window=window)
    assert len(calls) == blocks


@pytest.mark.parametrize("implementation", ["dense", "local"])
def test_long_clocks_keep_their_differences(implementation):
    tensors, times = case(0)
    later = {name: seconds + 2.0**20 for name, seconds in times.items()}
    assert_close(
        run(tensors, later, implementation=implementation),
        run(tensors, times, implementation=implementation),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["dense", "local"])
def test_half_precision_is_close(dtype, implementation):
    tensors, times = case(0, t=70, s=90, dtype=torch.float32)
    slopes = torch.tensor([3.0, 0.25])
    exact = run(tensors, times, slopes=slopes)
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    out = run(low, times, slopes=slopes, implementation=implementation)
    assert out.dtype == dtype
    assert (out.float() - exact).norm() / exact.norm() < 0.02


def test_the_package_exports_it():
    assert package_name is windowed_attention


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"window": 0.0}, ValueError, "`window` must be in .0, inf.; got 0.0"),
        ({"implementation": "blocks"}, ValueError, "must be one of 'auto', 'dense', 'local'; got"),
        (
            {"slopes": torch.ones(4)},
            ValueError,
            "divide the width; got 4 `slopes` and a width of 6",
        ),
        ({"slopes": torch.ones(0)}, ValueError, "divide the width; got 0 `slopes`"),
        ({"key_mask": torch.ones(2, 11)}, TypeError, "`key_mask` must be a bool tensor"),
        ({"key_mask": torch.ones(2, 10) > 0}, ValueError, "axis `s` is 11 in `key` but 10"),
        (
            {"key_time": torch.ones(2, 11).half()},
            TypeError,
            "`key_time` must be float32 or float64",
        ),
        ({"query_time": torch.ones(2, 7).long()}, TypeError, "`query_time` must be float32 or"),
        ({"null_key": torch.ones(5)}, ValueError, "axis `d` is 6 in `query` but 5 in `null_key`"),
    ],
)
def test_wrong_input_is_refused(change, error, sentence):
    tensors, times = case(0)
    options = {name: value for name, value in change.items() if name not in {**tensors, **times}}
    tensors = {name: change.get(name, value) for name, value in tensors.items()}
    times = {name: change.get(name, value) for name, value in times.items()}
    with pytest.raises(error, match=sentence):
        run(tensors, times, **options)


def test_nan_is_not_a_window():
    tensors, times = case(0)
    with pytest.raises(ValueError, match="`window` must be"):
        run(tensors, times, window=math.nan)
