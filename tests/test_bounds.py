"""Bounds against closed forms, mpmath, scipy's exact distributions, one another, and coverage by simulation."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from ticketlab import bounds
from ticketlab.bounds import binomial
from ticketlab.errors import Refused

RATES = st.floats(0, 1)
NATS = st.floats(0, 1e4)
CERTIFICATES = (bounds.occam_hoeffding, bounds.occam_kl, bounds.binomial_tail)


def exact_kl(q: float, p: float) -> mpmath.mpf:
    """With 60 digits, at least."""
    first, second = mpmath.mpf(q), mpmath.mpf(p)
    terms = [(a * mpmath.log(a / b) if a else 0) for a, b in ((first, second), (1 - first, 1 - second))]
    return mpmath.fsum(terms)


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.01, 0.3, 0.5, 0.97, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("p", [1e-12, 0.01, 0.0100000001, 0.3, 0.30001, 0.6, 0.99])
def test_kl_agrees_with_mpmath_where_its_arguments_nearly_agree_too(q, p):
    with mpmath.workdps(60):
        assert bounds.binary_kl(q, p) == pytest.approx(float(exact_kl(q, p)), rel=1e-12, abs=0)


def test_kl_at_the_ends():
    assert bounds.binary_kl(0, 0) == bounds.binary_kl(1, 1) == 0
    assert bounds.binary_kl(0.5, 0) == bounds.binary_kl(0.5, 1) == bounds.binary_kl(0, 1) == math.inf
    assert bounds.binary_kl(0, 0.3) == pytest.approx(-math.log(0.7), rel=1e-14)


@pytest.mark.parametrize("q", [0.0, 1e-6, 0.02, 0.4, 0.9, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("c", [0.0, 1e-15, 1e-6, 0.05, 0.9, 3.0, 30.0])
def test_kl_inverse_agrees_with_mpmath_to_1e_12(q, c):
    found = bounds.kl_inverse(q, c)
    with mpmath.workdps(60):
        low, high = mpmath.mpf(q), mpmath.mpf(1)
        for _ in range(150):  # bisection with 45 digits
            middle = (low + high) / 2
            low, high = (middle, high) if middle < 1 and exact_kl(q, middle) <= c else (low, middle)
        assert abs(found - float(low)) <= 1e-12


def test_kl_inverse_closed_forms_and_arrays():
    c = np.array([0.0, 1e-12, 0.1, 2.0])
    np.testing.assert_allclose(bounds.kl_inverse(0.0, c), -np.expm1(-c), rtol=1e-9, atol=1e-16)
    assert bounds.kl_inverse(1.0, 0.3) == 1.0 and isinstance(bounds.kl_inverse(0.2, 0.1), float)
    q = np.array([[0.0], [0.3], [1.0]])
    table = bounds.kl_inverse(q, c)
    assert table.shape == (3, 4) and table[1, 2] == bounds.kl_inverse(0.3, 0.1)


@settings(deadline=None)
@given(RATES, st.floats(0, 20))
@example(0.5, 1e-20)  # p - q far below p
def test_kl_inverse_inverts(q, c):
    p = bounds.kl_inverse(q, c)
    assert q <= p <= 1
    assert bounds.binary_kl(q, p) >= c * (1 - 1e-9) or p == 1  # rounded up
    slope = (p - q) / (p * (1 - p)) if 0 < p < 1 else math.inf
    assert p == 1 or bounds.binary_kl(q, p) <= c + 1e-15 * slope + 1e-12 * c + 1e-18


@pytest.mark.parametrize(("n", "p"), [(50, 0.3), (1000, 0.02), (60_000, 0.02)])
def test_the_binomial_tail_is_scipys_where_that_does_not_underflow(n, p):
    for errors in (round(0.7 * n * p), round(n * p), round(1.2 * n * p), n - 1, n):
        assert binomial.log_cdf(errors, n, p) == pytest.approx(binom.logcdf(errors, n, p), rel=1e-9, abs=1e-9)
    assert binomial.log_cdf(0, n, p) == pytest.approx(n * math.log1p(-p), rel=1e-12)


def test_the_binomial_tail_is_right_at_thousands_of_nats():
    assert binom.cdf(1000, 60_000, 0.1) == 0  # where doubles end
    with mpmath.workdps(40):
        p, term, total = mpmath.mpf(0.1), mpmath.mpf(1), mpmath.mpf(0)
        for i in range(1000, -1, -1):  # ratios to the largest term
            total += term
            term *= i / mpmath.mpf(60_000 - i + 1) * (1 - p) / p
        top = mpmath.binomial(60_000, 1000) * p**1000 * (1 - p) ** 59_000
        expected = float(mpmath.log(top * total))
    assert expected < -3000
    assert binomial.log_cdf(1000, 60_000, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 200, 60_000])
@pytest.mark.parametrize("delta", [0.5, 0.05, 1e-9, 1e-12])
def test_the_inverted_tail_is_clopper_and_pearsons(n, delta):
    for errors in sorted({0, n // 50, n // 3, n - 1}):
        found = binomial.upper_inverse(errors, n, math.log(delta))
        assert found == pytest.approx(beta.isf(delta, errors + 1, n - errors), rel=1e-9)
    assert binomial.upper_inverse(n, n, math.log(delta)) == 1
    assert binomial.upper_inverse(0, n, math.log(delta)) == pytest.approx(-math.expm1(math.log(delta) / n), rel=1e-13)


def test_the_inverted_tail_solves_its_equation_where_delta_underflows():
    value = bounds.binomial_tail(1000 / 60_000, 3000, 60_000).value
    assert binomial.log_cdf(1000, 60_000, value) == pytest.approx(-3000 + math.log(0.05), rel=1e-12)
    assert math.exp(-3000) == 0


def test_mdl_is_the_formula_as_stated():
    k, d, n, delta = 1000, 266_200, 55_000, 0.05
    expected = 0.02 + math.sqrt((k * math.log(d) + math.log(1 / delta)) / (2 * n))
    found = bounds.mdl(0.02, k, d, n, delta)
    assert float(found) == pytest.approx(expected, rel=1e-14)
    assert found.empirical == 0.02 and found.complexity == pytest.approx(expected - 0.02, rel=1e-13)
    same = bounds.occam_hoeffding(0.02, k * math.log(d), n, delta)
    assert same.value == pytest.approx(found.value, rel=1e-14) and same.certificate


def test_mdl_is_charged_for_choices():
    nats = 50 * math.log(1000)
    paid = bounds.mdl(0.1, 50, 1000, 60_000, weights="seed", choice_nats=math.log(36))
    assert paid.value == pytest.approx(bounds.occam_hoeffding(0.1, nats + math.log(36), 60_000).value, rel=1e-14)
    assert paid.certificate and paid.value > bounds.mdl(0.1, 50, 1000, 60_000, weights="seed").value
    with pytest.raises(ValueError, match="choice_nats must be at least 0"):
        bounds.mdl(0.1, 50, 1000, 60_000, choice_nats=math.nan)


def test_mdl_certifies_masks_on_seed_fixed_weights_alone():
    trained = bounds.mdl(0.1, 50, 1000, 60_000)
    assert not trained.certificate and "left out" in trained.covers
    assert bounds.mdl(0.1, 50, 1000, 60_000, weights="seed").certificate
    assert not bounds.mdl(0.1, 1, 1000, 60_000, weights="seed").certificate
    # the prior d^-k: from k = 2 on its sum over masks is below e - 2, with k = 0 it would exceed 1
    for d in (2, 3, 10, 100):
        total = sum(math.comb(d, k) * float(d) ** -k for k in range(2, d + 1))
        assert total < math.e - 2 and total + 1 + 1 > 1


def test_vacuous_is_no_better_than_chance():
    assert bounds.held_out(0.85, 100, n_classes=10).vacuous
    assert not bounds.held_out(0.85, 100).vacuous and not bounds.held_out(0.02, 100, n_classes=10).vacuous
    found = bounds.occam_hoeffding(np.array([0.1, 0.8]), 10, 1000, n_classes=10)
    assert found.value.shape == found.complexity.shape == (2,) and found.vacuous.tolist() == [False, False]
    assert bounds.occam_hoeffding(0.5, 1e4, 100, n_classes=10).value > 1  # as the formula gives it
    with pytest.raises(ValueError, match="n_classes must be at least 2"):
        bounds.held_out(0.1, 10, n_classes=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), RATES, NATS, st.floats(1e-9, 0.5))
def test_the_tighter_theorem_is_the_tighter_bound(n, rate, description, delta):
    error = round(rate * n) / n
    hoeffding, chernoff, tail = (float(bound(error, description, n, delta)) for bound in CERTIFICATES)
    assert tail <= chernoff + 1e-9
    assert chernoff <= hoeffding + 1e-12
    assert error <= chernoff <= 1
    maurer = float(bounds.pac_bayes_kl(error, description, n, delta))
    assert chernoff <= maurer + 1e-12
    assert maurer <= float(bounds.pac_bayes_mcallester(error, description, n, delta)) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 10**6), RATES, st.floats(0, 1e3), st.floats(0.01, 8))
def test_catoni_at_any_beta_is_above_kl_with_its_own_budget(n, error, kl, beta_):
    """Phi_beta(p) <= the p of equal relative entropy: Catoni's form is kl relaxed at one beta (Germain et al. 2009)."""
    found = float(bounds.pac_bayes_catoni(error, kl, n, 0.05, betas=(beta_,)))
    assert found >= bounds.kl_inverse(error, (kl - math.log(0.05)) / n) - 1e-9


def test_catoni_pays_for_its_grid_and_its_best_beta_is_the_inverse_kl():
    error, kl, n = 0.05, 200.0, 10_000
    one = float(bounds.pac_bayes_catoni(error, kl, n, betas=(1.0,)))
    twice = float(bounds.pac_bayes_catoni(error, kl, n, betas=(1.0, 1.0)))
    assert twice == pytest.approx(float(bounds.pac_bayes_catoni(error, kl + math.log(2), n, betas=(1.0,))), rel=1e-12)
    assert one < twice
    c = (kl - math.log(0.05)) / n
    p = bounds.kl_inverse(error, c)
    best = math.log(p * (1 - error) / (error * (1 - p)))  # where the relaxation is exact
    assert float(bounds.pac_bayes_catoni(error, kl, n, betas=(best,))) == pytest.approx(p, abs=1e-12)


def test_maurers_constant_covers_small_samples():
    """E exp(n kl(S/n || p)) is at most sum_k C(n,k) (k/n)^k (1-k/n)^(n-k) <= 2 sqrt n (Maurer 2004)."""
    for n in range(1, 60):
        k = np.arange(n + 1)
        assert binom.pmf(k, n, k / n).sum() <= 2 * math.sqrt(n)


def test_the_held_out_bound_in_both_forms():
    found = bounds.held_out(0.02, 10_000)
    assert found.value == bounds.kl_inverse(0.02, math.log(20) / 10_000)
    exact = bounds.held_out(0.02, 10_000, method="binomial")
    assert exact.value == pytest.approx(beta.isf(0.05, 201, 9800), rel=1e-9) and exact.value < found.value
    assert found.certificate and found.n == 10_000 and "test" in found.assumptions
    with pytest.raises(ValueError, match="method must be"):
        bounds.held_out(0.02, 100, method="normal")


def test_coverage_on_finite_classes_of_known_risk():
    """The hypothesis of the least bound, chosen after the sample, from a class with a prior that is not uniform.

    A hypothesis of risk r errs on Binomial(n, r) of the examples. All bounds hold for all hypotheses at once.
    """
    generator = np.random.default_rng(0)
    problems, hypotheses, n, delta = 1000, 12, 60, 0.2
    weights = 2.0 ** -np.arange(1, hypotheses + 1)
    description = -np.log(weights / weights.sum())
    risks = generator.uniform(0, 0.6, (problems, hypotheses))
    errors = generator.binomial(n, risks)
    rates = np.arange(n + 1)[:, None] / n
    misses = []
    for bound in CERTIFICATES:
        table = bound(rates, description, n, delta).value  # [errors, hypothesis]
        misses.append(int((table[errors, np.arange(hypotheses)] < risks).any(1).sum()))
    assert misses[0] <= misses[1] <= misses[2] <= binom.isf(1e-6, problems, delta)
    assert misses[2] > 0.25 * delta * problems  # and the tightest is not slack


def test_coverage_of_one_network_is_nearly_exact():
    generator = np.random.default_rng(1)
    n, delta, risk = 2000, 0.1, 0.07
    errors = generator.binomial(n, risk, 4000)
    unique, counts = np.unique(errors, return_counts=True)
    missed = sum(counts[bounds.held_out(unique / n, n, delta, method="binomial").value < risk])
    assert binom.ppf(1e-4, 4000, 0.07) <= missed <= binom.isf(1e-6, 4000, delta)


def test_coverage_of_pac_bayes_on_gibbs_posteriors():
    """Q proportional to exp(-lambda errors), which depends on the sample, over a uniform prior."""
    generator = np.random.default_rng(2)
    problems, hypotheses, n, delta = 300, 25, 100, 0.1
    risks = generator.uniform(0, 0.5, (problems, hypotheses))
    errors = generator.binomial(n, risks) / n
    q = np.exp(-0.3 * n * errors)
    q /= q.sum(1, keepdims=True)
    kl = (q * np.log(q * hypotheses)).sum(1)
    truth, seen = (q * risks).sum(1), (q * errors).sum(1)
    for bound in (bounds.pac_bayes_kl, bounds.pac_bayes_mcallester, bounds.pac_bayes_catoni):
        assert (bound(seen, kl, n, delta).value < truth).sum() <= binom.isf(1e-6, problems, delta)


@pytest.mark.parametrize("bound", CERTIFICATES)
def test_losses_outside_0_1_are_refused_with_what_to_do(bound):
    for loss in (2.3, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"the loss must lie in \[0, 1\].*bounded_cross_entropy"):
            bound(loss, 10, 100)
    for delta in (0, 1, -0.1, 1.5, math.nan, np.array([0.1, 0.2])):
        with pytest.raises(ValueError, match=r"delta must lie in \(0, 1\)"):
            bound(0.1, 10, 100, delta)
    for n in (0, -3, 2.5, np.array([10, 20])):
        with pytest.raises(ValueError, match="n must be a number of examples"):
            bound(0.1, 10, n)
        with pytest.raises(ValueError, match="n must be a number of examples"):
            bounds.pac_bayes_kl(0.1, 10, n)
    for description in (-1, math.nan):
        with pytest.raises(ValueError, match="description_nats must be at least 0"):
            bound(0.1, description, 100)


def test_other_numbers_out_of_range_are_refused():
    for kept, total in ((-1, 10), (11, 10), (1, 0), (2.5, 10)):
        with pytest.raises(ValueError, match=r"kept must be a count in 0..total"):
            bounds.mdl(0.1, kept, total, 100)
    with pytest.raises(ValueError, match="weights must be"):
        bounds.mdl(0.1, 2, 10, 100, weights="sparse")
    with pytest.raises(ValueError, match="must be a number of errors"):
        bounds.binomial_tail(0.0123, 10, 100)
    with pytest.raises(ValueError, match="must be a number of errors"):
        bounds.binomial_tail(500_000.4 / 10**6, 10, 10**6)
    assert bounds.binomial_tail(473 / 55_000, 10, 55_000).value > 0.0086  # a quotient of counts is one
    for errors in range(49_000, 49_010):  # in float32 too
        assert bounds.binomial_tail(np.float32(errors / 55_000), 10, 55_000).value > errors / 55_000
    with pytest.raises(ValueError, match="betas must be"):
        bounds.pac_bayes_catoni(0.1, 1, 100, betas=())
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]"):
        bounds.binary_kl(1.2, 0.5)
    with pytest.raises(ValueError, match="c must be at least 0"):
        bounds.kl_inverse(0.2, -1)


def test_bounded_cross_entropy_maps_into_0_1_and_back():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 2])
    loss = bounds.bounded_cross_entropy(logits, y, mixing=0.1)
    mixed = 0.9 * logits.softmax(1) + 0.1 / 3
    expected = float(-(mixed[0, 1].log() + mixed[1, 2].log()) / 2)
    assert loss.nats(loss.value) == pytest.approx(expected, rel=1e-12)
    bound = bounds.occam_kl(loss.value, 20, 1000)
    assert expected < loss.nats(bound.value) < loss.high_nats == pytest.approx(math.log(30))
    sure = 1e3 * torch.eye(3, dtype=torch.float64)
    assert bounds.bounded_cross_entropy(sure, torch.arange(3)).value == pytest.approx(0, abs=1e-12)
    assert bounds.bounded_cross_entropy(sure, torch.tensor([1, 2, 0])).value == pytest.approx(1)
    assert bounds.bounded_cross_entropy(sure, torch.arange(3), mixing=1).value == 0  # a constant loss
    with pytest.raises(ValueError, match=r"mixing must lie in \(0, 1\]"):
        bounds.bounded_cross_entropy(logits, y, mixing=0)
    with pytest.raises(ValueError, match="logits must be finite"):
        bounds.bounded_cross_entropy(logits * math.inf, y)
    for labels in ([1, 3], [-1, 2]):
        with pytest.raises(ValueError, match=r"labels must be in 0..2 for 3 classes"):
            bounds.bounded_cross_entropy(logits, torch.tensor(labels))
    few = bounds.bounded_cross_entropy(logits, y.to(torch.uint8), mixing=0.1)
    assert few == loss
    for wrong, complaint in ((y[:1], "labels must have shape"), (y.float(), "labels must be integer class labels")):
        with pytest.raises(Refused, match=complaint):
            bounds.bounded_cross_entropy(logits, wrong)
    for wrong in (logits.numpy(), logits[None], logits[:0]):
        with pytest.raises(Refused, match="logits must be finite"):
            bounds.bounded_cross_entropy(wrong, y)


NUMBERS = [
    (lambda v: bounds.occam_kl(v, 10, 100), "the loss"),
    (lambda v: bounds.binomial_tail(0.1, v, 100), "description_nats"),
    (lambda v: bounds.occam_hoeffding(0.1, 10, v), "n "),
    (lambda v: bounds.held_out(0.1, 100, v), "delta"),
    (lambda v: bounds.held_out(0.1, 100, n_classes=v), "n_classes"),
    (lambda v: bounds.pac_bayes_kl(0.1, v, 100), "kl_nats"),
    (lambda v: bounds.pac_bayes_catoni(0.1, 1, 100, betas=v), "betas"),
    (lambda v: bounds.mdl(0.1, v, 100, 100), "kept"),
    (lambda v: bounds.mdl(0.1, 5, v, 100), "(total|kept)"),
    (lambda v: bounds.kl_inverse(v, 1), "q"),
    (lambda v: bounds.binary_kl(0.1, v), "p"),
    (lambda v: bounds.subset_nats(v, 10), "kept"),
    (lambda v: bounds.bounded_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), v), "mixing"),
]


@pytest.mark.parametrize(("call", "name"), NUMBERS, ids=[f"{i}" for i in range(len(NUMBERS))])
@pytest.mark.parametrize("value", ["0.1", [None, 0.1], [[0.1], [0.1, 0.2]], 0.1j, torch.tensor(0.1j), math.nan])
def test_what_is_no_number_is_refused_by_name(call, name, value):
    with pytest.raises(Refused, match=rf"^{name}"):
        call(value)


def test_tensors_are_taken_as_arrays_are_and_shapes_must_fit():
    errors, nats = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True), np.array([10.0, 20.0])
    for bound in CERTIFICATES:
        expected = bound(np.array([0.1, 0.2]), nats, 1000).value
        np.testing.assert_array_equal(bound(errors, torch.from_numpy(nats), torch.tensor(1000)).value, expected)
        np.testing.assert_array_equal(bound(errors, nats[:, None], 1000).value.diagonal(), expected)
        with pytest.raises(Refused, match="train_error, description_nats must be numbers or have shapes"):
            bound(errors, np.ones(3), 1000)
    with pytest.raises(Refused, match="q, p must be numbers or have shapes that broadcast"):
        bounds.binary_kl([0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(Refused, match="kept, total, train_error, choice_nats must be"):
        bounds.mdl([0.1, 0.2], [1, 2, 3], 10, 100)


def test_sums_that_have_no_end_are_refused():
    assert bounds.binomial_tail(1e-9, 1.0, 10**9).value < 1e-7
    for error, n in ((0.1, 10**9), (0.0, 10**12)):
        with pytest.raises(Refused, match=r"n must be at most 10\^9, with 10\^7 errors.* Use occam_kl"):
            bounds.binomial_tail(error, 1.0, n)
    with pytest.raises(Refused, match="n_classes must be at least 2: got inf"):
        bounds.mdl(0.1, 2, 10, 100, n_classes=math.inf)
