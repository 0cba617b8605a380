"""Every error message of `_checks`, and that the checks trace."""

import pytest
import torch

from mmau._checks import check_choice, check_mask, check_range, check_shapes, did_you_mean


def test_matching_shapes_pass():
    check_shapes(
        x=(torch.ones(2, 3, 4), "b t d"),
        a=(torch.ones(2, 3, 5), "b t a"),
        points=(torch.ones(2, 3, 68, 2), "... k 2"),
        nothing=(None, "b t"),
        sizes={"d": 4},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": (torch.ones(2, 4, 1), "b t d"), "a": (torch.ones(2, 3, 6), "b t a")},
            r"axis `t` is 4 in `x` but 3 in `a`, which must have shape \(b, t, a\); got \(2, 3, 6",
        ),
        (
            {"x": (torch.ones(2, 4), "b t d")},
            r"`x` must have shape \(b, t, d\); got \(2, 4\), which has 2 axes",
        ),
        (
            {"p": (torch.ones(5, 3), "... k 2")},
            r"`p` must have shape \(\.\.\., k, 2\); got \(5, 3\)",
        ),
        ({"p": (torch.ones(5), "... k 2")}, r"which has 1 axes"),
    ],
)
def test_wrong_shapes_say_both_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(**arguments)


def test_known_size():
    with pytest.raises(ValueError, match=r"axis `d` of `x` must be 8, as \(b, d\); got \(2, 4\)"):
        check_shapes(x=(torch.ones(2, 4), "b d"), sizes={"d": 8})


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"`x` must be a tensor \(b, t\); got list"):
        check_shapes(x=([1, 2], "b t"))


def test_mask_must_be_bool():
    check_mask("mask", None)
    check_mask("mask", torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor.*got dtype torch.float32"):
        check_mask("mask", torch.ones(2))
    with pytest.raises(TypeError, match="got list"):
        check_mask("mask", [True])


def test_choice():
    with pytest.raises(ValueError, match=r"`mode` must be one of 'a', 'b'; got 'c'\."):
        check_choice("mode", "c", ("a", "b"))


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_range(value):
    check_range("m", 0.0, 0, 1, open_high=True)
    with pytest.raises(ValueError, match=r"`m` must be in \[0, 1\); got"):
        check_range("m", value, 0, 1, open_high=True)


def test_range_open_and_unbounded():
    with pytest.raises(ValueError, match=r"`m` must be in \(0, inf\); got 0"):
        check_range("m", 0, 0, open_low=True)


def test_did_you_mean():
    assert did_you_mean("chunkd", ["chunked"]) == "; did you mean 'chunked'?"
    assert did_you_mean("zzz", ["chunked"]) == "."


def test_checks_trace_in_one_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def checked(x, mask):
        check_shapes(x=(x, "b t"), mask=(mask, "b t"))
        check_mask("mask", mask)
        return x * mask

    assert checked(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)).sum() == 6
