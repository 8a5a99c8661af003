"""The largest eigenvalues by products alone, against dense matrices: repeated ones, zeros, rounding in the products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ticketlab as tl
from ticketlab.errors import Refused
from ticketlab.lanczos import largest
from ticketlab.seeds import stream

SPECTRA = {
    "distinct": np.geomspace(1, 1e-3, 60),
    "repeated": np.repeat([5.0, 3.0, 1.0], 20),
    "low rank": np.concatenate([[4.0, 4.0, 2.0], np.zeros(57)]),
    "negative": -np.linspace(1, 2, 60),
    "mixed": np.concatenate([np.full(5, 2.0), -np.full(55, 3.0)]),
    "zero": np.zeros(60),
}


def matrix(values):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_are_those_of_the_dense_matrix(name, k):
    whole = matrix(SPECTRA[name])
    found = largest(lambda v: whole @ v, 60, k, stream("test", 0), tolerance=1e-11)
    np.testing.assert_allclose(found.values, np.sort(SPECTRA[name])[::-1][:k], atol=1e-8)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-7)
    np.testing.assert_allclose(whole @ found.vectors, found.vectors * found.values, atol=1e-5)
    assert (found.residuals < 1e-5).all()


def test_a_small_matrix_has_all_its_eigenvalues():
    whole = matrix(np.arange(7.0))
    found = largest(lambda v: whole @ v, 7, 7, stream("test", 0), tolerance=1e-11)
    np.testing.assert_allclose(found.values, np.arange(7.0)[::-1], atol=1e-12)


def test_products_in_single_precision():
    whole = matrix(SPECTRA["repeated"]).astype(np.float32)
    found = largest(lambda v: (whole @ v.astype(np.float32)).astype(float), 60, 25, stream("test", 0), tolerance=2e-5)
    np.testing.assert_allclose(found.values, np.sort(SPECTRA["repeated"])[::-1][:25], rtol=1e-5)


def test_what_does_not_converge_is_refused():
    whole = matrix(np.linspace(1, 1 + 1e-9, 60))
    with pytest.raises(Refused, match="Lanczos must converge within max_products"):
        largest(lambda v: whole @ v, 60, 5, stream("test", 0), tolerance=1e-15, max_products=25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_and_jacobians_with_repeated_eigenvalues(dtype):
    """A linear layer's kernel has each eigenvalue once per output; of an orthogonal one all singular values are 1."""
    model = tl.initialise(lambda: nn.Linear(40, 10), 0).to(dtype)
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    kernel = tl.ntk.kernel(model, tl.state(model), x)
    expected = tl.ntk.spectrum(kernel).eigenvalues[:25]
    found = tl.ntk.spectrum(tl.ntk.operator(model, tl.state(model), x), top=25).eigenvalues
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wide = tl.initialise(lambda: nn.Linear(60, 50), 0).to(dtype)
    nn.init.orthogonal_(wide.weight, generator=torch.Generator().manual_seed(0))
    top = tl.signal.largest_singular_values(wide, tl.state(wide), torch.zeros(2, 60, dtype=dtype), n_values=4)
    torch.testing.assert_close(top, torch.ones(2, 4, dtype=dtype), rtol=1e-4, atol=0)
