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
    params = kw.pop("params", None) or state(net)[0]
    with pytest.raises(ValueError, match=match):
        ntk.kernel(net, params, x1, x2, **kw)


def test_batch_norm_that_uses_the_batch() -> None:
    net = normalised()
    refuse(r"batch norm '1' is in training mode.*model\.eval\(\)", net)
    net.eval()
    assert ntk.kernel(net, state(net)[0], X).shape == (3, 2, 3, 2)
    refuse(r"batch norm '1' keeps no running statistics", normalised(track_running_stats=False).eval())


def test_training_mode_without_batch_norm_is_evaluated() -> None:
    net = initialise(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)), 0).train()
    params = state(net)[0]
    assert torch.equal(ntk.kernel(net, params, X), ntk.kernel(net, params, X))
    assert net.training


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
    match = "each input must pass through the network by itself"
    refuse(match, net, method=method)
    refuse(match, net, X[:1], X[1:], method=method)
    for other in (ntk.jacobian, ntk.operator):
        with pytest.raises(ValueError, match=match):
            other(net, state(net)[0], X)


def test_masks_that_do_not_fit() -> None:
    masks = mk.ones(model())
    refuse("masks must cover every prunable parameter.*'2.weight'", masks={"0.weight": masks["0.weight"]})
    refuse(r"masks\['0.weight'\] must have shape", masks={**masks, "0.weight": masks["0.weight"].T})
    refuse("must be bool", masks={n: m.float() for n, m in masks.items()})
    two = stack([masks, masks])
    refuse(r"one replica axis.*\[2, 3\]", params=stack([state(model())[0]] * 3), masks=two)


def test_coordinates_that_do_not_fit() -> None:
    refuse("'live', 'all' or a dict", coordinates="dead")
    refuse("must name trainable parameters: 'x'", coordinates={"x": torch.ones(2).bool()})
    refuse(r"coordinates\['0.bias'\] must be bool of shape \(5,\)", coordinates={"0.bias": torch.ones(2).bool()})
    refuse("coordinates must name at least one trainable parameter.*'0.bias'", coordinates={})
    refuse("requires_grad_", model().requires_grad_(False))


def test_names_and_numbers() -> None:
    refuse("unknown outputs 'traces'. Did you mean 'trace'", outputs="traces")
    refuse("unknown method 'row'. Did you mean 'rows'", method="row")
    refuse("block_size must be at least 1", block_size=0)
    masks = {n: torch.zeros_like(m) for n, m in mk.ones(model()).items()}
    refuse("'0.weight' has 5 of 25. Use method='rows'", masks=masks, method="structured")


def test_inputs_that_do_not_fit() -> None:
    refuse(r"one shape and dtype: got \(3, 4\).*\(3, 5\)", x2=torch.zeros(3, 5))
    refuse("one shape and dtype", x2=X.double())
    refuse(r"x1 must have the dtype of params, torch.float32: got torch.float64. Cast", x1=X.double())
    refuse("at least one input", x1=X[:0])


def test_kernels_that_are_not_finite() -> None:
    refuse(r"the kernel must be finite: \d+ of its 36 entries", x1=X * float("inf"))
    params = {n: p * 1e30 for n, p in state(model())[0].items()}
    refuse("wider dtype than torch.float32", params=params)


def test_factors_that_are_not_finite() -> None:
    net = model()
    params = state(net)[0]
    params["0.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the Jacobian must be finite: \d+ of its \d+ entries"):
        ntk.jacobian(net, params, X)
    operator = ntk.operator(net, params, X)
    with pytest.raises(ValueError, match="the product with the kernel must be finite: 6 of its 6 entries"):
        operator.product(torch.ones(6))
    with pytest.raises(ValueError, match="the trace must be finite"):
        operator.trace()
    with pytest.raises(ValueError, match=r"vector must have shape \(6,\), \[n \* out\]: got \(3,\)"):
        operator.product(torch.ones(3))


def test_a_model_that_returns_something_else() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple:
            return self.layer(x), x

    refuse("must return one tensor whose first axis is the 2 inputs: got tuple", initialise(Pair, 0))


def test_buffers_that_do_not_fit() -> None:
    net = normalised().eval()
    refuse(r"buffers\['mean'\] must have a name among", net, buffers={"mean": torch.zeros(5)})
    refuse(r"buffers\['1.running_mean'\] must have shape \(5,\)", net, buffers={"1.running_mean": torch.zeros(4)})
    params, buffers = state(net)
    for replicas in (1, 3):
        match = rf"buffers must share one replica axis: got lengths \[{min(2, replicas)}, {max(2, replicas)}\]"
        refuse(match, net, params=stack([params] * 2), buffers=stack([buffers] * replicas))


def test_stacks_that_share_no_jacobian() -> None:
    net = model()
    masks = stack([mk.ones(net), {n: torch.zeros_like(m) for n, m in mk.ones(net).items()}])
    with pytest.raises(ValueError, match=r"equal numbers of live coordinates.*\[37, 7\]"):
        ntk.jacobian(net, state(net)[0], X, masks=masks)
    with pytest.raises(ValueError, match="an operator is one network: got a stack of 2"):
        ntk.operator(net, state(net)[0], X, masks=masks)
