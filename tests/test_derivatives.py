"""Derivatives of one network in its parameters, against plain autograd on a module that holds the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from test_network import Checkpointed, Recurrent, Tied, grouped, spectral
from torch import nn

from ticketlab import derivatives
from ticketlab.derivatives import gauss_newton_product, gradient, hessian_product, pullback, rows
from ticketlab.losses import CROSS_ENTROPY, SQUARED_ERROR
from ticketlab.network import network
from ticketlab.state import state

CLOSE = {"rtol": FLOAT_TOLERANCE[torch.float64], "atol": FLOAT_TOLERANCE[torch.float64]}


def prelu():
    return nn.Sequential(nn.Linear(6, 3), nn.PReLU(3), nn.Linear(3, 3))


PROBLEMS = {
    "mlp": (small_mlp, blobs),
    "conv_bn": (small_conv_bn, images),
    "tied": (Tied, blobs),
    "checkpointed": (Checkpointed, blobs),
    "recurrent": (Recurrent, blobs),
    "grouped": (grouped, images),
    "spectral": (spectral, blobs),
    "prelu": (prelu, blobs),
}


def problem(kind, n=6):
    """A network whose weights another module holds, half of them pruned, and some examples."""
    factory, task = PROBLEMS[kind]
    model, other, train = build(factory, 0), build(factory, 1).eval(), task().train
    masks = half_masks(model, 0)
    net = network(model, state(other), train.x[:n], masks=masks)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in masks:
                p[~masks[name]] = 0.0
    return net, other, train.x[:n], train.y[:n]


@pytest.mark.parametrize("batch_size", [2, 4, 100])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_gradient_is_that_of_one_batch(kind, batch_size):
    net, other, x, y = problem(kind)
    truth = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
    found = gradient(net, x, y, CROSS_ENTROPY, batch_size=batch_size)
    assert list(found) == [n for n, _ in other.named_parameters()]
    for one, expected in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(one, expected, **CLOSE)


def test_of_some_parameters_and_of_what_a_loss_does_not_reach():
    net, other, x, _ = problem("mlp")
    y = other(x).detach() + 1
    found = gradient(net, x, y, SQUARED_ERROR, names=["output.bias"])
    torch.testing.assert_close(found["output.bias"], torch.full((3,), -2 / 3, dtype=torch.float64), **CLOSE)
    stopped = build(Stopped)
    net = network(stopped, state(stopped), x)
    assert not gradient(net, x, y, SQUARED_ERROR)["first.weight"].any()
    vector = dict(net.params)
    assert not hessian_product(net, x, y, SQUARED_ERROR, vector)["first.weight"].any()
    assert not gauss_newton_product(net, x, y, SQUARED_ERROR, vector)["first.weight"].any()


class Stopped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.output = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.first(x).detach())


@pytest.mark.parametrize("kind", PROBLEMS)
def test_hessian_products_are_those_of_double_backward(kind):
    net, other, x, y = problem(kind)
    generator = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in net.params.items()}
    weights = list(other.parameters())
    slope = torch.autograd.grad(F.cross_entropy(other(x), y), weights, create_graph=True)
    truth = torch.autograd.grad(sum((g * v).sum() for g, v in zip(slope, vector.values(), strict=True)), weights)
    found = hessian_product(net, x, y, CROSS_ENTROPY, vector, batch_size=4)
    for one, expected in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(one, expected, **CLOSE)


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, SQUARED_ERROR], ids=lambda loss: loss.name)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_gauss_newton_products_are_those_of_the_dense_jacobian(kind, loss):
    net, other, x, y = problem(kind)
    generator = torch.Generator().manual_seed(0)
    names = list(net.params)[:3]
    vector = {n: torch.randn(net.params[n].shape, generator=generator, dtype=net.dtype) for n in names}
    inner, z = [other.get_parameter(n) for n in names], other(x)
    target = y if loss is CROSS_ENTROPY else z.detach() + 1
    dense = [torch.autograd.grad(one, inner, retain_graph=True) for one in z.flatten()]  # a row per output
    along = torch.stack([sum((g * v).sum() for g, v in zip(row, vector.values(), strict=True)) for row in dense])
    whole = torch.autograd.functional.hessian(lambda z: loss.mean(z, target), z.detach()).reshape(z.numel(), -1)
    bent = whole @ along
    found = gauss_newton_product(net, x, target, loss, vector, batch_size=4)
    assert list(found) == names
    for i, one in enumerate(found.values()):
        expected = sum(b * row[i] for b, row in zip(bent, dense, strict=True))
        torch.testing.assert_close(one, expected, **CLOSE)


@pytest.mark.parametrize("elements", [1, 2**24])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_rows_are_those_of_every_output_of_every_example(kind, elements, monkeypatch):
    monkeypatch.setattr(derivatives, "_ROW_ELEMENTS", elements)  # one example in a block, or all
    net, other, x, _ = problem(kind, n=3)  # as many examples as outputs
    names = list(net.params)[:3]
    inner = [other.get_parameter(n) for n in names]
    whole = {n: [] for n in names}
    for _, block in rows(net, x, lambda f: torch.eye(3, dtype=f.dtype), names):
        for name in names:
            whole[name].append(block[name])
    for i, one in enumerate(x):
        for c in range(3):
            truth = torch.autograd.grad(other(one[None])[0, c], inner)
            for name, expected in zip(names, truth, strict=True):
                torch.testing.assert_close(torch.cat(whole[name])[i, c], expected, **CLOSE)


def test_rows_may_depend_on_a_target():
    net, _, x, y = problem("mlp")
    pieces = list(rows(net, x, lambda f, label: F.one_hot(label, 3).to(f)[None], ["output.bias"], y))
    found = torch.cat([piece["output.bias"] for _, piece in pieces])
    assert torch.equal(found[:, 0], F.one_hot(y, 3).double())


def test_what_autograd_cannot_do_is_refused_by_name():
    x = torch.ones(3, requires_grad=True)
    y = F.hardsigmoid(x)
    (slope,) = pullback(y.sum(), [x], create_graph=True)
    with pytest.raises(ValueError, match="hardsigmoid_backward is not implemented"):
        pullback(slope.sum(), [x])
    z = x.exp()
    total = (z * z).sum()
    z.add_(1)
    with pytest.raises(ValueError, match="modified by an inplace operation"):
        pullback(total, [x])
    with pytest.raises(RuntimeError, match="Mismatch in shape"):  # a fault of ours stays what it is
        pullback(y, [x], torch.ones(2))
    assert torch.equal(pullback(x.detach().sum(), [x])[0], torch.zeros(3))
