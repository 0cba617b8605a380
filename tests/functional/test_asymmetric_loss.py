import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmau.functional.asymmetric_loss import asymmetric_loss, asymmetric_posterior, focal_loss

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
    """Loss and derivative from the paper's formula, with 1000 digits where the logit needs them."""
    with mpmath.workdps(1000):
        x, margin = mpmath.mpf(x), mpmath.mpf(margin)
        p = 1 / (1 + mpmath.exp(-x))
        q = 1 - p
        if positive:
            loss = -(q**gamma) * mpmath.log(p)
            slope = (gamma * q ** (gamma - 1) * mpmath.log(p) - q**gamma / p) * p * q
        elif p <= margin:
            loss = slope = mpmath.mpf(0)
        else:
            pm = p - margin
            loss = -(pm**gamma) * mpmath.log(1 - pm)
            slope = (pm**gamma / (1 - pm) - gamma * pm ** (gamma - 1) * mpmath.log(1 - pm)) * p * q
        return float(loss), float(slope)


@given(values=logits_lists, data=st.data())
def test_without_gamma_and_margin_it_is_binary_cross_entropy(values, data):
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(x), max_size=len(x))))
    ours = value_and_gradient(
        lambda z: asymmetric_loss(z, y, gamma_pos=0, gamma_neg=0, margin=0), x
    )
    torchs = value_and_gradient(lambda z: F.binary_cross_entropy_with_logits(z, y.double()), x)
    assert_close(ours, torchs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("margin", MARGINS)
def test_values_and_gradients_match_exact_arithmetic(dtype, gamma, margin):
    x = torch.tensor(LOGITS).to(dtype)
    for positive in (True, False):
        y = torch.full(x.shape, int(positive))
        value, gradient = value_and_gradient(
            lambda z, y=y: asymmetric_loss(
                z, y, gamma_pos=gamma, gamma_neg=gamma, margin=margin, reduction="none"
            ),
            x,
        )
        # float() in the reference: the margin that the loss sees is a float32 unless float64.
        seen = margin if dtype == torch.float64 else torch.tensor(margin).item()
        expected = [exact(v, positive, gamma, seen) for v in x.double().tolist()]
        values = torch.tensor([e[0] for e in expected], dtype=torch.float64)
        slopes = torch.tensor([e[1] for e in expected], dtype=torch.float64)
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        tight = 1e-13 if dtype == torch.float64 else 1e-6
        assert_close(value.double(), values, rtol=tight, atol=tight)
        # Gradients of half precision logits are rounded to that precision, nothing more is lost.
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        assert_close(gradient.double(), slopes, rtol=tight + rounding, atol=tight)


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
@pytest.mark.parametrize("gamma_neg", [4.0, torch.linspace(0, 4, 5)], ids=["scalar", "per AU"])
def test_compiles_in_one_graph(gamma_neg):
    def loss(x, y):
        return asymmetric_loss(x, y, gamma_neg=gamma_neg)

    x, y = torch.randn(7, 5), torch.randint(-1, 2, (7, 5))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in (7, 3):
        ours = value_and_gradient(lambda z, n=size: compiled(z, y[:n]), x[:size])
        assert_close(ours, value_and_gradient(lambda z, n=size: loss(z, y[:n]), x[:size]))
    # A graph cannot raise on values, so a bad label must show in the loss.
    assert compiled(x, torch.full((7, 5), 3)).isnan()


def test_it_leaves_the_callers_gradient_mode_alone():
    with torch.no_grad():
        asymmetric_loss(torch.zeros(1), torch.zeros(1))
        assert not torch.is_grad_enabled()


def test_second_derivatives_are_refused_rather_than_wrong():
    x = torch.randn(3, requires_grad=True)
    loss = asymmetric_loss(x, torch.ones(3))
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        torch.autograd.grad(loss, x, create_graph=True)


# ------------------------------------------------------------------------------------- posterior
SYSTEMS = [(1.0, 4.0, 0.05), (1.0, 4.0, 0.0), (2.0, 2.0, 0.0), (0.0, 2.0, 0.2), (0.5, 0.5, 0.05)]


@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "margin"), SYSTEMS)
def test_minimising_the_expected_loss_gives_the_posterior_back(gamma_pos, gamma_neg, margin):
    options = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    ones = torch.ones_like(x)
    positive = asymmetric_loss(x, ones, reduction="none", **options)
    negative = asymmetric_loss(x, ones * 0, reduction="none", **options)
    for truth in (0.02, 0.147, 0.3, 0.5, 0.8):
        best = x[(truth * positive + (1 - truth) * negative).argmin()]
        assert_close(asymmetric_posterior(best[None], **options).item(), truth, atol=1e-3, rtol=0)


def test_asl_at_one_half_is_a_posterior_of_147_thousandths():
    assert asymmetric_posterior(torch.zeros(1)).item() == pytest.approx(0.147, abs=5e-4)


@given(gamma_pos=exponents, gamma_neg=exponents, margin=margins)
def test_posterior_is_a_probability_that_rises_with_the_logit(gamma_pos, gamma_neg, margin):
    x = torch.cat([torch.tensor([-1e4]), torch.linspace(-40, 40, 400), torch.tensor([1e4])])
    for dtype in (torch.float32, torch.float64):
        prob = asymmetric_posterior(
            x.to(dtype), gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin
        )
        assert prob.dtype == dtype
        assert ((prob >= 0) & (prob <= 1)).all()
        assert (prob.diff() > -1e-5).all()


def test_posterior_without_gamma_and_margin_is_the_sigmoid():
    x = torch.linspace(-100, 100, 50)
    prob = asymmetric_posterior(x.half(), gamma_pos=0, gamma_neg=0, margin=0)
    assert_close(prob, torch.sigmoid(x.half().float()))


# ---------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_pos": -1}, r"`gamma_pos` must be in \[0, inf\); got -1"),
        ({"gamma_neg": float("nan")}, r"`gamma_neg` must be in"),
        ({"gamma_neg": [1.0, -2.0]}, r"`gamma_neg` must be in"),
        ({"gamma_neg": [1.0, 2.0, 3.0]}, r"one per Action Unit, \(2,\); got shape \(3,\)"),
        ({"margin": 1.0}, r"`margin` must be in \[0, 1\); got 1.0"),
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
    with pytest.raises(TypeError, match="`logits` must be floating point"):
        asymmetric_posterior(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`alpha` must be in"):
        focal_loss(torch.zeros(2), torch.zeros(2), alpha=1.0)
