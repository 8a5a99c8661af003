"""The bound against published numbers, 60 digits, and what follows from its definition."""

from __future__ import annotations

import mpmath
import pytest

import ticketlab as tl
from ticketlab.errors import Refused


@pytest.mark.parametrize(("k", "n", "delta", "value"), [(1180, 43200, 0.005, 0.0305782), (400, 60000, 0.05, 0.0077995)])
def test_published_numbers(k, n, delta, value):
    found = tl.bounds.pick_to_learn(k, n, delta)
    assert found.value == pytest.approx(value, abs=5e-8) and found.certificate and not found.vacuous


@pytest.mark.parametrize(
    ("k", "n", "delta"), [(0, 10, 0.05), (3, 10, 0.05), (9, 10, 0.5), (50, 1000, 1e-6), (1, 1, 0.1)]
)
def test_it_is_the_smallest_t_of_the_definition(k, n, delta):
    t = mpmath.mpf(float(tl.bounds.pick_to_learn(k, n, delta)))
    if k == n:
        assert t == 1
        return

    def excess(at):
        with mpmath.workdps(60):
            upper = mpmath.betainc(k + 1, n - k, 0, at, regularized=True)
            exactly = mpmath.binomial(n, k) * at**k * (1 - at) ** (n - k)
            return delta * upper - at * n * exactly

    assert excess(t * (1 - mpmath.mpf("1e-9"))) < 0 <= excess(t * (1 + mpmath.mpf("1e-9")))
    assert all(excess(t * mpmath.mpf(i) / 20) < 0 for i in range(1, 20))


def test_more_examples_confidence_and_compression_tighten_it():
    bound = tl.bounds.pick_to_learn
    assert float(bound(10, 1000)) < float(bound(10, 500)) < float(bound(20, 500)) < float(bound(20, 500, 1e-3))
    assert bound(450, 500, n_classes=10).vacuous and not bound(10, 500, n_classes=10).vacuous


@pytest.mark.parametrize("wrong", [(-1, 5), (6, 5), (0, 0), (1.5, 5), (1, 5, 0), (1, 5, 1.0), ([1, 2], 5)])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(Refused):
        tl.bounds.pick_to_learn(*wrong)
