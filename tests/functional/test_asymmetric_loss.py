import functools
import importlib

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.asymmetric_loss import asymmetric_loss, focal_loss

# By import: the function of the same name hides the module from attribute look-up.
MODULE = importlib.import_module("mmau.functional.asymmetric_loss")

GAMMAS = [0.0, 0.5, 1.0, 2.0, 4.0]
MARGINS = [0.0, 0.05, 0.2]
LOGITS = [-1000.0, -100.0, -30.0, -5.0, -2.9, -1.0, 0.0, 0.3, 2.0, 8.0, 20.0, 40.0, 100.0, 1000.0]

logits_lists = st.lists(st.floats(-60, 60), min_size=1, max_size=12)
exponents = st.sampled_from(GAMMAS) | st.floats(0, 6)
margins = st.sampled_from(MARGINS) | st.floats(0, 0.9)


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def exact(x, positive, gamma, margin):
    """Loss and derivative from the paper's formula, with 50 digits and no 1 - p."""
    with mpmath.workdps(50):
        x, gamma, margin = mpmath.mpf(x), mpmath.mpf(gamma), mpmath.mpf(margin)
        p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
        if positive:
            log_p = -mpmath.log1p(mpmath.exp(-x)) if x > 0 else x - mpmath.log1p(mpmath.exp(x))
            loss = -(q**gamma) * log_p
            gradient = gamma * q**gamma * p * log_p - q ** (gamma + 1)
        elif p <= margin:
            loss = gradient = mpmath.mpf(0)
        else:
            pm, log_rest = p - margin, mpmath.log(q + margin)
            loss = -(pm**gamma) * log_rest
            gradient = pm**gamma / (q + margin) - gamma * pm ** (gamma - 1) * log_rest
            gradient *= p * q
        return float(loss), float(gradient)


@given(values=logits_lists, data=st.data())
def test_without_gamma_and_margin_it_is_binary_cross_entropy(values, data):
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(x), max_size=len(x))))
    ours = value_and_gradient(
        lambda z: asymmetric_loss(z, y, gamma_pos=0, gamma_neg=0, margin=0), x
    )
    torchs = value_and_gradient(lambda z: F.binary_cross_entropy_with_logits(z, y.double()), x)
    assert_close(ours, torchs, rtol=1e-9, atol=1e-14)


@functools.cache
def references(dtype, gamma, margin, positive):
    """Logits that the dtype can hold, and what is exact for them."""
    x = torch.tensor(LOGITS).to(dtype)
    # The margin that the loss sees is a float32 unless the logits are float64.
    seen = margin if dtype == torch.float64 else torch.tensor(margin).item()
    results = [exact(v, positive, gamma, seen) for v in x.double().tolist()]
    return x, torch.tensor(results, dtype=torch.float64).unbind(1)


def plain(loss, x):
    return value_and_gradient(loss, x)


def apart(loss, x):
    """Ordinary logits go another way than a batch with one extreme logit in it."""
    ordinary = x.abs() < 80
    parts = [value_and_gradient(lambda z, k=k: loss(z, k), x[k]) for k in (ordinary, ~ordinary)]
    whole = tuple(torch.empty(len(x), dtype=part.dtype) for part in parts[0])
    for k, part in zip((ordinary, ~ordinary), parts, strict=True):
        for out, values in zip(whole, part, strict=True):
            out[k] = values
    return whole


def for_second_derivatives(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x, create_graph=True)[0].detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("way", [plain, apart, for_second_derivatives])
def test_values_and_gradients_match_exact_arithmetic(way, dtype, gamma, margin):
    options = {"gamma_pos": gamma, "gamma_neg": gamma, "margin": margin, "reduction": "none"}
    for positive in (True, False):
        x, (values, gradients) = references(dtype, gamma, margin, positive)
        value, gradient = way(
            lambda z, k=None, y=positive: asymmetric_loss(
                z, torch.full(z.shape, int(y)), **options
            ),
            x,
        )
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        tight = 1e-13 if dtype == torch.float64 else 1e-6
        assert_close(value.double(), values, rtol=tight, atol=tight)
        # Gradients of half precision logits are rounded once to that precision, no more is lost.
        rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
        assert_close(gradient.double(), gradients, rtol=tight + rounding, atol=tight)


@pytest.mark.parametrize("options", [{}, {"gamma_neg": 0.5}, {"margin": 0.0, "gamma_pos": 0.0}])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.int8, torch.float64, torch.float16])
def test_a_batch_of_several_chunks_is_exact(monkeypatch, options, missing, target_dtype):
    monkeypatch.setattr(MODULE, "CHUNK", 16384 // torch.get_num_threads())
    x = torch.randn(5700, 12) * 6  # not a multiple of the rows of a chunk
    y = torch.randint(-1 if missing else 0, 2, x.shape)
    x[-1, 0] = 300.0
    value, gradient = value_and_gradient(
        lambda z: asymmetric_loss(z, y.to(target_dtype), **options), x
    )
    wide = x.double()
    exactly, gradients = value_and_gradient(lambda z: asymmetric_loss(z, y, **options), wide)
    assert_close(value.double(), exactly, rtol=1e-6, atol=0)
    assert_close(gradient.double() * y.numel(), gradients * y.numel(), rtol=1e-5, atol=1e-5)
    # float64 itself against the other form, which is written for autograd.
    wide.requires_grad_()
    (differentiable,) = torch.autograd.grad(
        asymmetric_loss(wide, y, **options), wide, create_graph=True
    )
    assert_close(gradients, differentiable.detach(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_chunks_change_nothing(monkeypatch, reduction):
    x, y = torch.randn(3, 7, 5), torch.randint(-1, 2, (3, 7, 5))
    options = {"gamma_neg": torch.linspace(0, 4, 5), "class_weight": torch.rand(5)}
    whole = value_and_gradient(lambda z: asymmetric_loss(z, y, reduction=reduction, **options), x)
    monkeypatch.setattr(MODULE, "CHUNK", 10)
    chunks = value_and_gradient(lambda z: asymmetric_loss(z, y, reduction=reduction, **options), x)
    assert_close(chunks, whole)
    with pytest.raises(ValueError, match="got 2 other values"):
        asymmetric_loss(x, torch.where(torch.arange(105).view(3, 7, 5) % 70 == 3, 5, y))


@given(
    values=st.lists(st.floats(-1000, 1000), min_size=1, max_size=8),
    gamma_pos=exponents,
    gamma_neg=exponents,
    margin=margins,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    label=st.sampled_from([0, 1]),
)
def test_never_nan_never_of_the_wrong_sign(values, gamma_pos, gamma_neg, margin, dtype, label):
    x = torch.tensor([*values, float("inf"), float("-inf")]).to(dtype)
    value, gradient = value_and_gradient(
        lambda z: asymmetric_loss(
            z,
            torch.full(z.shape, label),
            gamma_pos=gamma_pos,
            gamma_neg=gamma_neg,
            margin=margin,
            reduction="none",
        ),
        x,
    )
    assert not torch.isnan(value).any()
    assert (value >= 0).all()
    assert torch.isfinite(gradient).all()
    assert ((gradient <= 0) if label else (gradient >= 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_hardest_positives_keep_their_gradient(dtype, gamma):
    x = torch.tensor([-20.0, -100.0, -1000.0]).to(dtype)
    _, gradient = value_and_gradient(
        lambda z: asymmetric_loss(z, torch.ones(3), gamma_pos=gamma, reduction="none"), x
    )
    assert_close(gradient, -torch.ones(3, dtype=dtype), rtol=1e-6, atol=1e-6)


def test_a_nan_logit_with_a_label_stays_visible():
    value, gradient = value_and_gradient(
        lambda z: asymmetric_loss(z, torch.tensor([1, 0])), torch.tensor([float("nan"), 0.0])
    )
    assert value.isnan()
    assert gradient[0].isnan()


@given(
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=10),
    garbage=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30, 0.0]),
    mark=st.sampled_from([-1.0, float("nan")]),
    reduction=st.sampled_from(["mean", "sum"]),
    gamma=exponents,
)
def test_masked_labels_have_no_influence(values, garbage, mark, reduction, gamma):
    x = torch.tensor(values)
    y = (torch.arange(len(x)) % 2).float()
    alone = value_and_gradient(
        lambda z: asymmetric_loss(z, y, gamma_neg=gamma, reduction=reduction), x
    )
    padded = torch.cat([torch.full((3,), garbage), x])
    marks = torch.cat([torch.full((3,), mark), y])
    value, gradient = value_and_gradient(
        lambda z: asymmetric_loss(z, marks, gamma_neg=gamma, reduction=reduction), padded
    )
    assert_close(value, alone[0])
    assert_close(gradient[3:], alone[1])
    assert torch.equal(gradient[:3], torch.zeros(3))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_labelled_gives_zero_with_zero_gradient(shape, reduction):
    x = torch.full(shape, float("nan"))
    value, gradient = value_and_gradient(
        lambda z: asymmetric_loss(z, torch.full(shape, -1), reduction=reduction), x
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("options", [{}, {"gamma_pos": 0, "gamma_neg": 0.5, "margin": 0.2}])
def test_gradcheck(options):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1, -1]]).repeat(4, 1)
    assert torch.autograd.gradcheck(
        lambda z: asymmetric_loss(z, y, reduction="none", **options), (x,)
    )


def test_mean_is_over_labelled_entries_and_normalizer_replaces_that_count():
    x, y = torch.randn(5, 12), torch.randint(-1, 2, (5, 12))
    entries = asymmetric_loss(x, y, reduction="none")
    labelled = int((y >= 0).sum())
    assert_close(asymmetric_loss(x, y), entries[y >= 0].mean())
    assert_close(asymmetric_loss(x, y, reduction="sum"), entries.sum())
    for count in (2.5, torch.tensor(2.5), torch.tensor([2.5])):
        assert_close(asymmetric_loss(x, y, normalizer=count), entries.sum() / 2.5)
    # Two halves of a batch, each divided by the count of the whole, add up to the whole.
    halves = [asymmetric_loss(x[i], y[i], normalizer=labelled) for i in ([0, 1], [2, 3, 4])]
    assert_close(sum(halves), asymmetric_loss(x, y))
    nothing = torch.full_like(y, -1)
    for zero in (0, torch.tensor(0)):
        assert asymmetric_loss(x, nothing, normalizer=zero) == 0


def test_options_per_action_unit_are_those_of_each_column():
    x, y = torch.randn(6, 3), torch.randint(-1, 2, (6, 3))
    gamma_pos, gamma_neg, margin = [0.0, 1.0, 2.5], torch.tensor([4.0, 0.0, 1.0]), (0.0, 0.1, 0.3)
    together = asymmetric_loss(
        x, y, gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin, reduction="none"
    )
    for c in range(3):
        column = asymmetric_loss(
            x[:, [c]],
            y[:, [c]],
            gamma_pos=gamma_pos[c],
            gamma_neg=float(gamma_neg[c]),
            margin=margin[c],
            reduction="none",
        )
        assert_close(together[:, [c]], column)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16])
def test_labels_of_any_dtype(dtype):
    x, y = torch.randn(3, 4), torch.randint(0, 2, (3, 4))
    assert_close(asymmetric_loss(x, y.to(dtype)), asymmetric_loss(x, y.float()))


def test_another_mark_for_missing_labels():
    x, y = torch.randn(1, 3), torch.tensor([[0, 1, 9]])
    assert_close(
        asymmetric_loss(x, y, ignore_index=9), asymmetric_loss(x, torch.tensor([[0, 1, -1]]))
    )


def test_focal_loss_weighs_the_true_class():
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4, 3))
    p = torch.sigmoid(x)
    pt = torch.where(y == 1, p, 1 - p)
    at = torch.where(y == 1, 0.25, 0.75).double()
    assert_close(focal_loss(x, y, gamma=2.0, alpha=0.25), -(at * (1 - pt) ** 2 * pt.log()).mean())
    assert_close(focal_loss(x, y, gamma=3.0), -((1 - pt) ** 3 * pt.log()).mean())


# torch's own tracer instantiates autograd.Function and so triggers torch's own warning about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compiles_in_one_graph_that_is_as_exact():
    def loss(x, y):
        return asymmetric_loss(x, y, gamma_neg=gammas, margin=0.05, reduction="none")

    gammas = torch.tensor(GAMMAS)
    x = torch.tensor(LOGITS)[:, None].repeat(2, len(GAMMAS))
    y = (torch.arange(len(x)) < len(LOGITS)).long()[:, None].repeat(1, len(GAMMAS))
    y[3], x[3] = -1, float("nan")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    ours = value_and_gradient(lambda z: compiled(z, y), x)
    assert_close(ours, value_and_gradient(lambda z: loss(z, y), x), rtol=1e-6, atol=1e-6)
    # A graph cannot raise on values, so a bad label must show in loss and gradient.
    wrong, gradient = value_and_gradient(lambda z: compiled(z, torch.full_like(y, 3)), x)
    assert wrong.isnan().all()
    assert gradient.isnan().all()


def test_it_leaves_the_callers_gradient_mode_alone():
    with torch.no_grad():
        asymmetric_loss(torch.zeros(1), torch.zeros(1))
        assert not torch.is_grad_enabled()


SECOND = [
    {},
    {"gamma_pos": 0, "gamma_neg": 0.5, "margin": 0.2},
    {"gamma_pos": 0.5, "gamma_neg": 2, "margin": [0.0, 0.05, 0.3]},
    {"gamma_neg": [0.0, 1.0, 4.0], "pos_weight": 3.0, "class_weight": [1.0, 0.5, 2.0]},
    {"soft_labels": True},
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("options", SECOND, ids=str)
def test_second_derivatives(options, reduction):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1, -1], [1, 0, 0], [0, -1, 1], [1, 1, 0]]).double()
    y[3] = torch.tensor([0.25, 0.5, 1.0] if "soft_labels" in options else [1.0, 1.0, 0.0])

    def loss(z):
        return asymmetric_loss(z, y, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


def test_a_gradient_penalty_is_finite_beside_garbage_and_extremes():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.3, -1000.0, 1000.0, -2.9444, nan, inf, -inf], requires_grad=True)
    loss = asymmetric_loss(x, torch.tensor([1, 1, 0, 0, -1, -1, -1]), gamma_neg=0.5)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[4:] == 0).all()


def test_a_second_backward_pass_over_one_graph_gives_the_same():
    x = torch.randn(5, 3, requires_grad=True)
    loss = asymmetric_loss(x, torch.randint(-1, 2, (5, 3)))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 2, x)
    assert torch.equal(first, kept)
    assert_close(second, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_autocast_changes_nothing():
    x, y = torch.randn(50, 12, requires_grad=True), torch.randint(-1, 2, (50, 12))
    plainly = value_and_gradient(lambda z: asymmetric_loss(z, y), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(value_and_gradient(lambda z: asymmetric_loss(z, y), x), plainly)


# --------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("per_unit", [False, True])
def test_weights_multiply_entries_and_leave_the_count_alone(per_unit):
    x, y = torch.randn(6, 3), torch.randint(-1, 2, (6, 3))
    entries = asymmetric_loss(x, y, reduction="none")
    pos_weight = torch.tensor([2.0, 0.5, 7.0]) if per_unit else 3.0
    class_weight = torch.tensor([0.0, 1.0, 2.5])
    expected = entries * class_weight * torch.where(y == 1, pos_weight, 1.0)
    options = {"class_weight": class_weight, "pos_weight": pos_weight}
    assert_close(asymmetric_loss(x, y, reduction="none", **options), expected)
    assert_close(asymmetric_loss(x, y, **options), expected.sum() / (y >= 0).sum())
    focal = focal_loss(x, y, alpha=0.3, class_weight=class_weight, reduction="none")
    assert_close(focal, focal_loss(x, y, alpha=0.3, reduction="none") * class_weight)


@given(share=st.floats(0, 1), values=logits_lists)
def test_soft_labels_are_linear(share, values):
    x = torch.tensor(values, dtype=torch.float64)
    of_one, of_zero, between = (
        value_and_gradient(
            lambda z, y=y: asymmetric_loss(
                z, torch.full(z.shape, y, dtype=torch.float64), soft_labels=True, reduction="none"
            ),
            x,
        )
        for y in (1.0, 0.0, share)
    )
    for one, zero, mixed in zip(of_one, of_zero, between, strict=True):
        assert_close(mixed, share * one + (1 - share) * zero, rtol=1e-12, atol=1e-300)
    hard = asymmetric_loss(x, torch.ones_like(x), reduction="none")
    assert_close(of_one[0], hard, rtol=1e-12, atol=1e-300)


def test_soft_labels_still_have_gaps_and_bounds():
    x = torch.tensor([float("nan"), 0.5, 0.5], requires_grad=True)
    loss = asymmetric_loss(x, torch.tensor([-1.0, 0.5, float("nan")]), soft_labels=True)
    loss.backward()
    assert_close(loss, asymmetric_loss(x[1:2], torch.tensor([0.5]), soft_labels=True))
    assert x.grad[0] == x.grad[2] == 0
    with pytest.raises(ValueError, match=r"`target` must be in \[0, 1\], or -1 .* such as 1.5"):
        asymmetric_loss(x[:1], torch.tensor([1.5]), soft_labels=True)


@pytest.mark.parametrize("way", [plain, for_second_derivatives])
def test_a_detached_focus_is_a_constant_to_the_gradient(way):
    x, y = torch.linspace(-8, 8, 30, dtype=torch.float64), torch.arange(30) % 2
    value, gradient = way(lambda z: asymmetric_loss(z, y, detach_focus=True, reduction="none"), x)
    assert_close(value, asymmetric_loss(x, y, reduction="none"))
    p = torch.sigmoid(x)
    negative = torch.where(p > 0.05, (p - 0.05).clamp(min=0) ** 4 / (1.05 - p) * p * (1 - p), 0.0)
    assert_close(gradient, torch.where(y == 1, -((1 - p) ** 2), negative))


def test_where_looking_would_mean_waiting_a_bad_label_makes_loss_and_gradient_nan():
    for bad in (2.0, 0.5, float("inf")):
        value, gradient = value_and_gradient(
            lambda z, b=bad: asymmetric_loss(z, torch.tensor([1.0, b, -1.0]), check_labels=False),
            torch.zeros(3),
        )
        assert value.isnan()
        assert gradient.isnan().tolist() == [False, True, False]
    value, _ = value_and_gradient(
        lambda z: asymmetric_loss(
            z, torch.tensor([1.0, -1.0]), check_labels=False, ignore_index=None
        ),
        torch.zeros(2),
    )
    assert value.isnan()


# ---------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_pos": -1}, r"`gamma_pos` must be in \[0, inf\); got -1"),
        ({"gamma_neg": float("nan")}, r"`gamma_neg` must be in"),
        ({"gamma_neg": [1.0, -2.0]}, r"`gamma_neg` must be in"),
        ({"gamma_neg": [1.0, 2.0, 3.0]}, r"one per Action Unit, \(2,\); got shape \(3,\)"),
        ({"margin": 1.0}, r"`margin` must be in \[0, 1\); got 1.0"),
        ({"pos_weight": 0.0}, r"`pos_weight` must be in \(0, inf\); got 0.0"),
        ({"class_weight": [1.0, -1.0]}, r"`class_weight` must be in \[0, inf\); got -1.0"),
        ({"reduction": "avg"}, "`reduction` must be one of 'mean', 'sum', 'none'; got 'avg'"),
        ({"ignore_index": 0}, "`ignore_index` must not be a label"),
        ({"normalizer": 3, "reduction": "sum"}, '`normalizer` is for reduction="mean"'),
        ({"normalizer": -1}, r"`normalizer` must be in \[0, inf\)"),
        ({"normalizer": torch.ones(2)}, "`normalizer` must be one number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        asymmetric_loss(torch.zeros(2), torch.zeros(2), **options)


@pytest.mark.parametrize("bad", [2, -2, 0.5, 999, float("inf")])
def test_other_labels_are_refused(bad):
    with pytest.raises(
        ValueError, match=r"must be 0 or 1, or -1 or NaN .* 1 other values, such as"
    ):
        asymmetric_loss(torch.zeros(2), torch.tensor([1.0, bad]))


def test_a_soft_label_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="between 0 and 1 need `soft_labels=True`"):
        asymmetric_loss(torch.zeros(2), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_missing_labels_are_refused_when_there_must_be_none(bad):
    with pytest.raises(ValueError, match=r"`target` must be 0 or 1; got 1 other values"):
        asymmetric_loss(torch.zeros(2), torch.tensor([1.0, bad]), ignore_index=None)


def test_bad_tensors_are_refused():
    with pytest.raises(ValueError, match="axis `c` is 3 in `logits` but 2 in `target`"):
        asymmetric_loss(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="must have the same shape"):
        asymmetric_loss(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"`logits` must be floating point; got torch\.int64"):
        asymmetric_loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(ValueError, match="`alpha` must be in"):
        focal_loss(torch.zeros(2), torch.zeros(2), alpha=1.0)
