"""The contract suite passes on our backends, and fails, by name, on each way of breaking it."""

import dataclasses

import pytest
import torch

from mmau.registry import MissingDependencyError, UnknownComponentError
from mmau.scan import (
    SCAN_BACKENDS,
    ScanBackend,
    chunked,
    compiled,
)
from mmau.scan.api import resolve_scan_backend
from mmau.testing import check_scan_backend

REFERENCE = resolve_scan_backend("reference").run


@pytest.mark.parametrize("name", list(SCAN_BACKENDS))
def test_every_registered_backend_keeps_the_contract(name):
    try:
        record = SCAN_BACKENDS.get(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if "cpu" not in record.devices and not torch.cuda.is_available():
        pytest.skip(f"{name} runs on {sorted(record.devices)}, none of which is here")
    check_scan_backend(name)


@pytest.mark.parametrize("short_chunks", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", ["reference", "chunked", "compiled"])
def test_ours_keep_it_to_the_bit_and_to_rounding(name, dtype, tolerance, short_chunks, monkeypatch):
    try:
        record = SCAN_BACKENDS.get(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if short_chunks:
        monkeypatch.setattr(chunked, "WORK_ELEMENTS", 3 * 2 * 5 * 3)
        monkeypatch.setattr(compiled, "FRAMES_PER_CHUNK", 3)
    assert record.compiles
    single = dataclasses.replace(record, dtypes=frozenset({dtype}))
    lengths = (1, 2, 3, 4, 7, 9)
    check_scan_backend(single, tolerance=tolerance, lengths=lengths, bitwise=True)


@pytest.mark.parametrize("frames", [1, 3, 32])
@pytest.mark.parametrize("small_frame", [1, 1 << 11])
def test_chunked_keeps_it_around_its_chunk_sizes(frames, small_frame, monkeypatch):
    monkeypatch.setattr(chunked, "WORK_ELEMENTS", frames * 2 * 5 * 3)
    monkeypatch.setattr(chunked, "SMALL_FRAME", small_frame)
    check_scan_backend("chunked", lengths=(1, frames, frames + 1, 3 * frames - 1, 3 * frames))


def broken(change=None, *, after=None, **declared):
    """The reference with one thing wrong."""

    def run(x, delta, A, B, C, **options):
        if change is not None:
            x, delta, A, B, C, options = change(x, delta, A, B, C, options)
        y, state = REFERENCE(x, delta, A, B, C, **options)
        return (y, state) if after is None else after(y, state, x)

    return ScanBackend(**{"name": "theirs", "run": run, **declared})


def options(**new):
    return lambda x, delta, A, B, C, old: (x, delta, A, B, C, old | new)


def touch_input(x, delta, A, B, C, old):
    with torch.no_grad():
        x.mul_(2)
    return x, delta, A, B, C, old


def multiply_reset(x, delta, A, B, C, *, initial_state, reset, discretization):
    """Drops the state by a product, which NaN survives."""
    h = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        if reset is not None:
            h = h * ~reset[:, t, None, None]
        x_t, delta_t, B_t, C_t = (v[:, t : t + 1] for v in (x, delta, B, C))
        y, h = REFERENCE(
            *(x_t, delta_t, A, B_t, C_t),
            initial_state=h,
            reset=None,
            discretization=discretization,
        )
        outputs.append(y)
    return torch.cat(outputs, 1), h


def random(y, state, x):
    torch.rand(1)
    return y, state


def branch_on_values(y, state, x):
    if y.sum().item() > 1e9:
        y = y * 1
    return y, state


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (broken(name=""), "clause 'the record': it has no name"),
        (broken(discretizations=frozenset({"zho"})), "'the record': `discretizations` must be a"),
        (broken(devices=frozenset()), "clause 'the record': `devices` must not be empty"),
        (broken(options(discretization="euler")), r"values and gradients.*from the reference .zoh"),
        (broken(options(initial_state=None)), "values and gradients': "),
        (
            broken(after=lambda y, h, x: (y.detach().requires_grad_(), h)),
            "clause 'values and gradients': ",
        ),
        (broken(after=lambda y, h, x: (y + 1e-6, h)), "`?y`? differs from the reference"),
        (broken(after=lambda y, h, x: (y, h.clone().mul(1 + 1e-6))), "the final state differs"),
        (
            broken(after=lambda y, h, x: (y, h) if x.shape[1] else (y, torch.zeros_like(h))),
            "clause 'state in and out': no frames must give",
        ),
        (
            broken(lambda x, d, A, B, C, o: (x, d.clamp(min=1e-12), A, B, C, o)),
            "clause 'state in and out': steps of 0 must return the initial state",
        ),
        (
            broken(lambda x, d, A, B, C, o: (x, d.clamp(max=12), A, B, C, o)),
            "clause 'tiny and huge steps': `y` differs from the reference .steps of 20",
        ),
        (
            ScanBackend(name="theirs", run=multiply_reset),
            "clause 'resets': a clip packed behind one of NaN",
        ),
        (broken(touch_input), "clause '.*': "),
        (broken(after=random), "clause 'global state': the random state was changed"),
        (broken(after=branch_on_values), "clause 'compilation': it raised"),
        (
            broken(after=lambda y, h, x: (y.contiguous().detach(), h)),
            "clause 'values and gradients': it raised|differs",
        ),
    ],
)
def test_each_way_of_breaking_it_is_found_and_named(record, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_scan_backend(record, lengths=(1, 4))


def test_bits_are_asked_for_only_by_request():
    rounds = broken(after=lambda y, h, x: (y * (1 + 1e-15 * x.shape[1]), h), compiles=False)
    check_scan_backend(rounds, lengths=(4,))
    with pytest.raises(AssertionError, match=r"'state in and out': chunks .*, to the bit\."):
        check_scan_backend(rounds, lengths=(4,), bitwise=True)


def test_what_is_not_declared_is_not_asked_for():
    small = broken(options(initial_state=None, reset=None), takes_state=False, takes_reset=False)
    check_scan_backend(small, lengths=(1, 4))
    single = dataclasses.replace(small, dtypes=frozenset({torch.float32}))
    check_scan_backend(single, lengths=(1, 4))
    euler = dataclasses.replace(single, discretizations=frozenset({"euler"}))
    check_scan_backend(euler, lengths=(1, 4))
    check_scan_backend(broken(after=branch_on_values, compiles=False), lengths=(1, 4))


def test_the_tolerance_is_an_option():
    rough = broken(after=lambda y, h, x: (y * (1 + 1e-4), h))
    check_scan_backend(rough, lengths=(4,), tolerance=1e-3)
    with pytest.raises(AssertionError, match="allowed 1e-06"):
        check_scan_backend(rough, lengths=(4,), tolerance=1e-6)


def test_an_unknown_name_is_not_a_failed_clause():
    with pytest.raises(UnknownComponentError, match="no scan backend named 'chunkd'"):
        check_scan_backend("chunkd")
