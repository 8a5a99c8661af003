"""What the kernel refuses, and that it says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ticketlab import masks as mk
from ticketlab import ntk
from ticketlab.seeds import initialise
from ticketlab.state import stack, state

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return initialise(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 0)


def normalised(**kwargs: bool) -> nn.Module:
    return initialise(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **kwargs), nn.Linear(5, 2)), 0)


def refuse(
    match: str, net: nn.Module | None = None, x1: torch.Tensor = X, x2: torch.Tensor | None = None, **kw
) -> None:
    net = net or model()
    given = kw.pop("given", None) or state(net)
    with pytest.raises(ValueError, match=match):
        ntk.kernel(net, given, x1, x2, **kw)


def test_batch_norm_without_running_statistics() -> None:
    refuse(r"batch norm '1' keeps no running statistics", normalised(track_running_stats=False).eval())


@pytest.mark.parametrize("middle", [lambda: nn.BatchNorm1d(5), lambda: nn.Dropout(0.5)])
def test_training_mode_is_evaluated(middle: Callable[[], nn.Module]) -> None:
    net = initialise(lambda: nn.Sequential(nn.Linear(4, 5), middle(), nn.Linear(5, 2)), 0).train()
    found = ntk.kernel(net, state(net), X)
    assert net.training
    assert net[1].training
    assert torch.equal(found, ntk.kernel(net.eval(), state(net), X))


class Coupled(nn.Module):
    """Examples that see one another through a function of the hidden layer."""

    def __init__(self, couple: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.couple = nn.Linear(4, 5), nn.Linear(5, 2), couple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.couple(self.first(x)).tanh())


CHANCE = torch.Generator().manual_seed(0)
COUPLINGS = {
    "mean": lambda h: h - h.mean(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "those before": lambda h: h.cumsum(0),
    "size": lambda h: h / len(h),
    "chance": lambda h: h + torch.randn(h.shape, generator=CHANCE),
}


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("method", ["auto", "generic"])
def test_examples_that_act_on_one_another(name: str, method: str) -> None:
    net = initialise(lambda: Coupled(COUPLINGS[name]), 0).eval()
    match = "each example must pass through the network by itself|Expected more than 1 value per channel"
    refuse(match, net, method=method)
    refuse(match, net, X[:1], X[1:], method=method)
    for other in (ntk.jacobian, ntk.operator):
        with pytest.raises(ValueError, match=match):
            other(net, state(net), X)


def test_masks_that_do_not_fit() -> None:
    masks = mk.ones(model())
    refuse(r"masks must name parameters of the model.* unknown \['x'\]", masks={**masks, "x": masks["0.weight"]})
    refuse(r"masks\['0.weight'\] must have shape", masks={**masks, "0.weight": masks["0.weight"].T})
    refuse("must be bool", masks={n: m.float() for n, m in masks.items()})
    two = stack([masks, masks])
    refuse(
        r"one replica axis: got lengths \{'params': \{3\}, 'masks': \{2\}\}",
        given=stack([state(model()).params] * 3),
        masks=two,
    )


def test_coordinates_that_do_not_fit() -> None:
    refuse("'live', 'all' or a dict", coordinates="dead")
    refuse("must name trainable parameters: 'x'", coordinates={"x": torch.ones(2).bool()})
    refuse(r"coordinates\['0.bias'\] must be bool of shape \(5,\)", coordinates={"0.bias": torch.ones(2).bool()})
    refuse("coordinates must name at least one trainable parameter.*'0.bias'", coordinates={})
    refuse("requires_grad_", model().requires_grad_(False))
    coordinates = {"0.bias": torch.ones(2, 5).bool()}
    refuse(
        r"share one replica axis: got lengths \[2, 3\]",
        given=stack([state(model()).params] * 3),
        coordinates=coordinates,
    )


def test_names_and_numbers() -> None:
    refuse("unknown outputs 'traces'. Did you mean 'trace'", outputs="traces")
    refuse("unknown method 'row'. Did you mean 'rows'", method="row")
    refuse("block_size must be at least 1", block_size=0)
    masks = {n: torch.zeros_like(m) for n, m in mk.ones(model()).items()}
    refuse("'0.weight' has 5 of 25. Use method='rows'", masks=masks, method="structured")


def test_inputs_that_do_not_fit() -> None:
    refuse(r"one shape and dtype on one device: got \(3, 4\).*\(3, 5\)", x2=torch.zeros(3, 5))
    refuse("one shape and dtype", x2=X.double())
    refuse(r"x must have the dtype of params, torch.float32: got torch.float64. Cast", x1=X.double())
    refuse("x must hold at least one example", x1=X[:0])
    refuse("x must hold at least one example", x2=X[:0])
    refuse("x must hold at least one example.*list", x1=X.tolist())
    refuse("Sequential fails on examples of shape", x1=X[:, :3])
    with torch.inference_mode():
        within = X.clone()
        refuse("outside of torch.inference_mode alone")
    refuse(r"made outside of torch.inference_mode.*x\.clone\(\)", x2=within)


@pytest.mark.parametrize("call", [ntk.kernel, ntk.jacobian, ntk.operator])
@pytest.mark.parametrize("place", ["params", "x"])
def test_what_is_not_finite_goes_no_further(call: Callable, place: str) -> None:
    params, x = state(model()).params, X.clone()
    (params["0.weight"] if place == "params" else x)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{place}.* must be finite: 1 of \d+ entries are NaN"):
        call(model(), params, x)


def test_the_second_inputs_are_finite_too() -> None:
    refuse("x must be finite: 12 of 24", x2=X * float("inf"))


def test_results_that_overflow() -> None:
    params = state(model()).params
    params["2.weight"] *= 1e20
    refuse("the kernel must be finite: .*wider dtype", given=params)
    operator = ntk.operator(model(), params, X)
    with pytest.raises(ValueError, match="the product with the kernel must be finite"):
        operator.product(torch.ones(6))
    with pytest.raises(ValueError, match=r"vector must have shape \(6,\), \[n \* out\]: got \(3,\)"):
        operator.product(torch.ones(3))


class Complex(nn.Module):
    """A Fourier layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.weight, n=4)


def test_complex_numbers() -> None:
    net = initialise(Complex, 0)
    refuse(r"coordinates must be real: \['weight'\] are complex", net)
    net.weight.requires_grad_(False)
    assert ntk.kernel(net, state(net), X).dtype == torch.float32


class Counts(nn.Module):
    """A module that is another function at every call: by a buffer in place, a rebound one, or an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.how, self.calls = nn.Linear(4, 2), how, 0
        self.register_buffer("n", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "attribute":
            self.calls += 1
            return self.first(x) * self.calls
        if self.how == "in place":
            self.n += 1
        else:
            self.n = self.n + 1
        return self.first(x) * self.n


@pytest.mark.parametrize("how", ["in place", "rebound", "attribute"])
def test_a_model_that_changes_as_it_is_called(how: str) -> None:
    refuse(
        "each example must pass through the network by itself, the same each time", initialise(lambda: Counts(how), 0)
    )


class Squeezes(nn.Module):
    """One example alone loses its axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).squeeze()


def test_a_model_that_takes_no_single_example() -> None:
    refuse(r"first axis is the 1 examples: got shape \(2,\)", initialise(Squeezes, 0))


def test_a_model_that_returns_something_else() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple:
            return self.layer(x), x

    refuse("must return one floating tensor whose first axis is the 3 examples: got tuple", initialise(Pair, 0))


def test_buffers_that_do_not_fit() -> None:
    net = normalised().eval()
    params, buffers = state(net)
    refuse(r"buffers\['mean'\] must have a name among", net, buffers={**buffers, "mean": torch.zeros(5)})
    wrong = {**buffers, "1.running_mean": torch.zeros(4)}
    refuse(r"buffers\['1.running_mean'\] must have shape \(5,\)", net, buffers=wrong)
    other = {n: 2 * p for n, p in params.items()}
    refuse("forward pass reads buffers", net, given=other)
    assert ntk.kernel(net, other, X, buffers=buffers).shape == (3, 2, 3, 2)
    for replicas in (1, 3):
        match = rf"one replica axis: got lengths \{{'params': \{{2\}}, 'buffers': \{{{replicas}\}}\}}"
        refuse(match, net, given=stack([params] * 2), buffers=stack([buffers] * replicas))


def test_stacks_that_share_no_jacobian() -> None:
    net = model()
    masks = stack([mk.ones(net), {n: torch.zeros_like(m) for n, m in mk.ones(net).items()}])
    with pytest.raises(ValueError, match=r"equal numbers of live coordinates.*\[37, 7\]"):
        ntk.jacobian(net, state(net), X, masks=masks)
    with pytest.raises(ValueError, match="an operator is one network: got a stack of 2"):
        ntk.operator(net, state(net), X, masks=masks)
