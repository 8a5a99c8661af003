"""Spectra and comparisons: closed forms first, then numpy on what the kernel and the Jacobian give."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ticketlab import masks as mk
from ticketlab import ntk
from ticketlab.seeds import initialise
from ticketlab.state import select, stack, state

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=F64))[0]


def with_eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    kernel = q @ torch.diag(torch.tensor(values, dtype=F64)) @ q.T
    return (kernel + kernel.T) / 2


class Small(nn.Module):
    """A convolution, a norm whose parameters have no fast path, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4)
        self.out = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().flatten(1))


def small(density: float = 0.3) -> tuple[nn.Module, dict, dict, Tensor]:
    model = initialise(Small, 0).to(F64)
    masks = {n: torch.rand(m.shape, generator=generator(1)) < density for n, m in mk.ones(model).items()}
    return model, state(model)[0], masks, torch.randn(5, 2, 4, 4, generator=generator(2), dtype=F64)


def test_closed_forms() -> None:
    flat = ntk.spectrum(with_eigenvalues([3.0] * 4))
    assert flat.eigenvalues.tolist() == pytest.approx([3.0] * 4)
    for name, value in {"trace": 12, "effective_rank": 4, "participation_ratio": 4, "condition_number": 1}.items():
        assert float(getattr(flat, name)) == pytest.approx(value)
    found = ntk.spectrum(with_eigenvalues([1.0, 4.0, 2.0, 1.0]))
    assert found.eigenvalues.tolist() == pytest.approx([4, 2, 1, 1])
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert float(found.effective_rank) == pytest.approx(math.exp(entropy))
    assert float(found.participation_ratio) == pytest.approx(64 / 22)
    assert float(found.condition_number) == pytest.approx(4)
    deficient = ntk.spectrum(with_eigenvalues([4.0, 2.0, 0.0]))
    assert int(deficient.rank) == 2
    assert math.isinf(deficient.condition_number)
    assert float(deficient.effective_rank) == pytest.approx(3 / 4 ** (1 / 3))


def test_a_stack_is_separate_spectra() -> None:
    kernels = torch.stack([with_eigenvalues([4.0, 2.0, 1.0], 0), with_eigenvalues([3.0, 1.0, 0.0], 1)])
    together = ntk.spectrum(kernels)
    for r, kernel in enumerate(kernels):
        alone = ntk.spectrum(kernel)
        for name in ("eigenvalues", "trace", "rank", "effective_rank", "participation_ratio", "condition_number"):
            torch.testing.assert_close(getattr(together, name)[r], getattr(alone, name))


def test_the_jacobian_factors_the_kernel() -> None:
    model, params, masks, x = small()
    for coordinates in (
        "live",
        "all",
        {"conv.bias": torch.tensor([True, False, True, True]), "norm.weight": torch.ones(4).bool()},
    ):
        kernel = ntk.kernel(model, params, x, masks=masks, coordinates=coordinates, method="generic")
        j = ntk.jacobian(model, params, x, masks=masks, coordinates=coordinates).values
        torch.testing.assert_close(torch.einsum("nok,mpk->nomp", j, j), kernel, rtol=0, atol=1e-11)


def test_columns_are_in_the_order_of_the_parameters() -> None:
    """For a linear model the gradient is known: inputs for the live weights, then ones for the bias."""
    model = initialise(lambda: nn.Linear(3, 2), 0).to(F64)
    mask = {"weight": torch.tensor([[True, False, True], [False, True, False]])}
    x = torch.arange(6.0, dtype=F64).view(2, 3)
    j = ntk.jacobian(model, state(model)[0], x, masks=mask).values
    assert j[0].tolist() == [[0, 2, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert j[1].tolist() == [[3, 5, 0, 1, 0], [0, 0, 4, 0, 1]]


@pytest.mark.parametrize("density", [0.3, 0.04])
def test_three_forms_of_one_kernel_have_one_spectrum(density: float) -> None:
    """At density 0.04, and without the biases, there are fewer coordinates than outputs: the spectrum is padded."""
    model, params, masks, x = small(density)
    coordinates = "live" if density > 0.1 else masks
    kernel = ntk.kernel(model, params, x, masks=masks, coordinates=coordinates)
    whole = ntk.spectrum(kernel)
    factor = ntk.spectrum(ntk.jacobian(model, params, x, masks=masks, coordinates=coordinates))
    atol = 1e-12 * float(whole.trace)
    torch.testing.assert_close(factor.eigenvalues, whole.eigenvalues, rtol=0, atol=atol)
    torch.testing.assert_close(factor.trace, whole.trace)
    assert torch.equal(factor.rank, whole.rank)
    operator = ntk.operator(model, params, x, masks=masks, coordinates=coordinates)
    vector = torch.randn(15, generator=generator(3), dtype=F64)
    expected = kernel.flatten(2).flatten(0, 1) @ vector
    torch.testing.assert_close(operator.product(vector), expected, rtol=0, atol=atol)
    largest = ntk.spectrum(operator, top=2)
    torch.testing.assert_close(largest.eigenvalues, whole.eigenvalues[:2], rtol=1e-9, atol=atol)
    torch.testing.assert_close(largest.trace, whole.trace)
    torch.testing.assert_close(largest.eigenvectors.abs(), whole.eigenvectors[:, :2].abs(), rtol=0, atol=1e-6)
    assert largest.effective_rank.isnan()


def test_an_operator_of_attention_has_products() -> None:
    """Fused encoder layers have no forward-mode rule: the product does not need one."""
    model = initialise(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 0).to(F64)
    x = torch.randn(2, 3, 4, generator=generator(), dtype=F64)
    operator = ntk.operator(model, state(model)[0], x)
    vector = torch.randn(24, generator=generator(1), dtype=F64)
    expected = ntk.kernel(model, state(model)[0], x).flatten(2).flatten(0, 1) @ vector
    torch.testing.assert_close(operator.product(vector), expected, rtol=0, atol=1e-10)


def test_small_eigenvalues_survive_in_the_jacobian_alone() -> None:
    """A linear model of one example, its double but for 1e-6: the second eigenvalue is near 1e-12."""
    model = initialise(lambda: nn.Linear(3, 1, bias=False), 0)
    x = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0 + 1e-4]])
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2
    params = state(model)[0]
    factor = ntk.spectrum(ntk.jacobian(model, params, x))
    assert float(factor.eigenvalues[-1]) == pytest.approx(exact[-1], rel=0.05)
    assert float(factor.condition_number) == pytest.approx(exact[0] / exact[-1], rel=0.05)
    assert math.isinf(ntk.spectrum(ntk.kernel(model, params, x)).condition_number)


def test_replicas_of_a_jacobian() -> None:
    model, params, masks, x = small()
    stacked = stack([params, {n: 2 * p for n, p in params.items()}])
    together = ntk.spectrum(ntk.jacobian(model, stacked, x, masks=masks))
    alone = ntk.spectrum(ntk.jacobian(model, select(stacked, 1), x, masks=masks))
    torch.testing.assert_close(together.eigenvalues[1], alone.eigenvalues)


def test_preservation_of_known_spectra() -> None:
    dense = ntk.spectrum(with_eigenvalues([8.0, 4.0, 2.0, 2.0]), top=2)
    same = ntk.preservation(dense, ntk.spectrum(3 * with_eigenvalues([8.0, 4.0, 2.0, 2.0]), top=2))
    assert same.eigenvalue_ratio.tolist() == pytest.approx([3] * 4)
    assert float(same.log_spectral_distance) == pytest.approx(0, abs=1e-12)
    assert float(same.subspace_overlap) == pytest.approx(1)
    assert int(same.n_compared) == 4
    # Half of the trace each: ln(1/2) - ln(1/2), ln(1/2) - ln(1/4), and two ranks that are gone.
    halved = ntk.preservation(dense, ntk.spectrum(with_eigenvalues([1.0, 1.0, 0.0, 0.0], 5), top=2))
    assert int(halved.n_compared) == 2
    assert float(halved.log_spectral_distance) == pytest.approx(math.log(2) / math.sqrt(2))
    assert halved.eigenvalue_ratio.tolist() == pytest.approx([1 / 8, 1 / 4, 0, 0])
    va, vb = rotation(4)[:, :2], rotation(4, 5)[:, :2]
    assert float(halved.subspace_overlap) == pytest.approx(float((va.T @ vb).square().sum()) / 2)


def test_preservation_compares_one_dense_spectrum_with_a_stack() -> None:
    dense = ntk.spectrum(with_eigenvalues([8.0, 4.0, 2.0, 2.0]))
    levels = [with_eigenvalues([4.0, 2.0, 1.0, v], 7) for v in (1.0, 0.5)]
    together = ntk.preservation(dense, ntk.spectrum(torch.stack(levels)))
    assert together.eigenvalue_ratio.shape == (2, 4)
    for r, level in enumerate(levels):
        alone = ntk.preservation(dense, ntk.spectrum(level))
        torch.testing.assert_close(together.log_spectral_distance[r], alone.log_spectral_distance)
        torch.testing.assert_close(together.subspace_overlap[r], alone.subspace_overlap)


def test_alignment_against_numpy() -> None:
    a, b = (torch.randn(6, 6, generator=generator(s), dtype=F64) for s in (0, 1))
    a, b = a @ a.T, b @ b.T + 5
    h = np.eye(6) - 1 / 6
    ca, cb = h @ a.numpy() @ h, h @ b.numpy() @ h
    expected = (ca * cb).sum() / np.linalg.norm(ca) / np.linalg.norm(cb)
    assert float(ntk.alignment(a, b)) == pytest.approx(expected)
    assert float(ntk.alignment(a, 3 * a)) == pytest.approx(1)
    plain = float((a * b).sum() / a.norm() / b.norm())
    assert float(ntk.alignment(a, b, centered=False)) == pytest.approx(plain)


def test_alignment_of_a_full_kernel_centres_each_output() -> None:
    """Shifting every feature of one output by a constant changes nothing."""
    phi, other = (torch.randn(5, 2, 9, generator=generator(s), dtype=F64) for s in (0, 1))
    shift = torch.zeros(1, 2, 9, dtype=F64)
    shift[0, 1] = 7
    k, moved, k_other = (torch.einsum("nok,mpk->nomp", f, f) for f in (phi, phi + shift, other))
    assert float(ntk.alignment(k, moved)) == pytest.approx(1)
    assert float(ntk.alignment(k, k_other)) == pytest.approx(float(ntk.alignment(moved, k_other)))
    assert ntk.alignment(torch.stack([k, moved]), k_other).shape == (2,)


def test_target_alignment() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    one_hot = torch.eye(3, dtype=F64)[labels]
    assert float(ntk.target_alignment(one_hot @ one_hot.T, labels)) == pytest.approx(1)
    k = torch.randn(6, 6, generator=generator(), dtype=F64)
    k = k @ k.T
    assert float(ntk.target_alignment(k, labels)) == pytest.approx(float(ntk.alignment(k, one_hot @ one_hot.T)))
    full = torch.einsum("nm,op->nomp", k, torch.eye(3, dtype=F64))
    for centered in (True, False):
        alone = float(ntk.target_alignment(k, labels, centered))
        assert float(ntk.target_alignment(full, labels, centered)) == pytest.approx(alone)
    with pytest.raises(ValueError, match="needs a full kernel"):
        ntk.rank_one_target_alignment(k, labels)
    with pytest.raises(ValueError, match="y must hold integer labels"):
        ntk.target_alignment(k, labels[:4])
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2: got -?\d\.\.\d"):
            ntk.target_alignment(full, wrong)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.n_classes - 1: got -1"):
        ntk.target_alignment(k, labels - 1)


@pytest.mark.parametrize("centered", [True, False])
def test_an_ideal_kernel_of_every_output_scores_one(centered: bool) -> None:
    """And the rank-one ideal, y y', scores 1 with itself, and 1 / sqrt(outputs) at most with the other."""
    y = torch.randn(5, 3, generator=generator(), dtype=F64)
    each = torch.einsum("nm,op->nomp", y @ y.mT, torch.eye(3, dtype=F64))
    one = torch.einsum("no,mp->nomp", y, y)
    assert float(ntk.target_alignment(each, y, centered)) == pytest.approx(1)
    assert float(ntk.rank_one_target_alignment(one, y, centered)) == pytest.approx(1)
    # <YY' x I, yy'> = tr(Y'YY'Y) = ||YY'||^2, with Y centred or not
    c = y - y.mean(0) if centered else y
    shared = float((c @ c.mT).norm() / 3**0.5 / c.square().sum())
    assert shared < 3**-0.5
    assert float(ntk.target_alignment(one, y, centered)) == pytest.approx(shared)
    assert float(ntk.rank_one_target_alignment(each, y, centered)) == pytest.approx(shared)
    stacked = ntk.target_alignment(torch.stack([each, one]), y, centered)
    assert stacked.tolist() == pytest.approx([1, shared])


@pytest.mark.parametrize("align", [ntk.target_alignment, ntk.rank_one_target_alignment])
def test_the_target_alignment_of_a_full_kernel_is_the_cosine_with_an_explicit_matrix(align) -> None:
    phi, y = (torch.randn(4, n, generator=generator(n), dtype=F64) for n in (2 * 7, 2))
    k = torch.einsum("nok,mpk->nomp", phi.view(4, 2, 7), phi.view(4, 2, 7))
    ideal = np.kron(y.numpy() @ y.numpy().T, np.eye(2)) if align is ntk.target_alignment else np.outer(y, y)
    h = np.kron(np.eye(4) - 1 / 4, np.eye(2))
    a, b = h @ k.reshape(8, 8).numpy() @ h, h @ ideal @ h
    assert float(align(k, y)) == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_drift() -> None:
    a, b = with_eigenvalues([3.0, 1.0]), with_eigenvalues([1.0, 3.0])
    scaled = ntk.drift(a, 1.5 * a)
    assert float(scaled.relative_change) == pytest.approx(0.5)
    assert float(scaled.distance) == pytest.approx(0, abs=1e-12)
    assert float(ntk.drift(a, b).distance) == pytest.approx(1 - 6 / 10)


def test_regression_against_numpy() -> None:
    k = with_eigenvalues([5.0, 3.0, 2.0, 1.0])
    across = torch.randn(2, 4, generator=generator(), dtype=F64)
    y = torch.randn(4, 3, generator=generator(1), dtype=F64)
    ridged = across.numpy() @ np.linalg.solve(k.numpy() + 0.5 * np.eye(4), y.numpy())
    np.testing.assert_allclose(ntk.kernel_regression(k, y, across, 0.5), ridged, rtol=1e-10)
    full, full_across = (torch.einsum("nm,op->nomp", z, torch.eye(3, dtype=F64)) for z in (k, across))
    np.testing.assert_allclose(ntk.kernel_regression(full, y, full_across, 0.5), ridged, rtol=1e-10)
    stacked = ntk.kernel_regression(torch.stack([k, 2 * k]), y, torch.stack([across, 2 * across]), 0.5)
    np.testing.assert_allclose(stacked[0], ridged, rtol=1e-10)
    assert ntk.kernel_regression(k.float(), y.float(), across.float()).dtype == torch.float32


def test_regression_on_the_training_set_interpolates() -> None:
    model, params, masks, x = small()
    k = ntk.kernel(model, params, x, masks=masks)
    y = torch.randn(5, 3, generator=generator(), dtype=F64)
    torch.testing.assert_close(ntk.kernel_regression(k, y, k), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("predict", [ntk.kernel_regression, partial(ntk.gradient_flow_prediction, time=1.0)])
def test_outputs_of_another_shape_are_refused(full: bool, predict: Callable[..., Tensor]) -> None:
    k = with_eigenvalues([3.0, 2.0, 1.0])
    k = k[:, None, :, None] if full else k
    y, across = torch.zeros(3, 1, dtype=F64), k[:2]
    found = predict(k, y, across, f_train=torch.ones(3, 1), f_test=torch.ones(2, 1))
    assert found.shape == (2, 1)
    assert predict(k, y, across, f_train=torch.ones(4, 3, 1), f_test=torch.ones(4, 2, 1)).shape == (4, 2, 1)
    with pytest.raises(ValueError, match=r"f_train must hold the outputs \(3, 1\).*got \(3,\)"):
        predict(k, y, across, f_train=torch.ones(3))
    with pytest.raises(ValueError, match=r"f_test must hold the outputs \(2, 1\).*got \(2,\)"):
        predict(k, y, across, f_test=torch.ones(2))
    with pytest.raises(ValueError, match=r"f_test must hold the outputs \(2, 1\).*got \(3, 1\)"):
        predict(k, y, across, f_test=torch.ones(3, 1))


def test_what_is_refused() -> None:
    k = with_eigenvalues([3.0, 2.0, 1.0])
    y = torch.zeros(3, 1, dtype=F64)
    with pytest.raises(ValueError, match="one set of inputs with itself: got shape \\(2, 3\\)"):
        ntk.spectrum(k[:2])
    with pytest.raises(ValueError, match="must be symmetric"):
        ntk.spectrum(torch.arange(9.0).view(3, 3))
    with pytest.raises(ValueError, match="must be finite: 1 of 1 entries"):
        ntk.spectrum(k.index_fill(0, torch.tensor([0]), torch.nan)[:1, :1])
    with pytest.raises(ValueError, match=r"\[n, m\] or \[n, out, m, out\].*\(3,\)"):
        ntk.spectrum(k[0])
    with pytest.raises(ValueError, match="at least 0: got -1"):
        ntk.spectrum(k, top=-1)
    with pytest.raises(ValueError, match="kernels of one size"):
        ntk.preservation(ntk.spectrum(k), ntk.spectrum(k[:2, :2]))
    with pytest.raises(ValueError, match="same inputs and outputs"):
        ntk.alignment(k, k[:2, :2])
    with pytest.raises(ValueError, match="ridge must be at least 0"):
        ntk.kernel_regression(k, y, k, -1.0)
    with pytest.raises(ValueError, match="time must be at least 0"):
        ntk.gradient_flow_prediction(k, y, k, -1.0)
    with pytest.raises(ValueError, match="y_train must hold real targets"):
        ntk.kernel_regression(k, y[:, 0], k)
    with pytest.raises(ValueError, match="k_test must have the test inputs first"):
        ntk.kernel_regression(k, y, k[:, :2])
    broken = k.index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(ValueError, match="k_test must be finite: 3 of 9 entries"):
        ntk.kernel_regression(k, y, broken)
    for compare in (ntk.alignment, ntk.drift):
        with pytest.raises(ValueError, match="second kernel must be finite: 3 of 9 entries"):
            compare(k, broken)
    with pytest.raises(ValueError, match="first kernel must be finite"):
        ntk.target_alignment(broken, y)
    model, params, masks, x = small()
    operator = ntk.operator(model, params, x, masks=masks)
    with pytest.raises(ValueError, match="top must lie in 1 to 14"):
        ntk.spectrum(operator, top=15)
    partial = ntk.spectrum(operator, top=3)
    with pytest.raises(ValueError, match="whole spectra"):
        ntk.preservation(partial, partial)
