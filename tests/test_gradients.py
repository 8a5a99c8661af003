"""First gradients: closed forms, finite differences, slow references, and identities between the measures."""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict

import pytest
import torch
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loss_and_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from ticketlab import gradients
from ticketlab import masks as mask_ops
from ticketlab.losses import SQUARED_ERROR
from ticketlab.masks import masked
from ticketlab.state import stack, stack_states, state

TOLERANCE = FLOAT_TOLERANCE[torch.float64]


class Attention(nn.Module):
    """Three tokens of two entries through one head: what fused kernels have no second derivative for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(2, 1, dim_feedforward=4, dropout=0.0, batch_first=True)
        self.output, self.gain = nn.Linear(6, 3), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * self.output(self.encoder(x.view(-1, 3, 2)).flatten(1))


PROBLEMS = {"mlp": (small_mlp, blobs), "conv_bn": (small_conv_bn, images), "attention": (Attention, blobs)}


def problem(kind="mlp", seed=0, n=30):
    """A network away from the kinks that zero biases make, half of its weights pruned, and data."""
    factory, task = PROBLEMS[kind]
    model = build(factory, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    covered = mask_ops.ones(model)
    masks = {name: mask for name, mask in half_masks(model, seed).items() if name in covered}
    train = task().train
    return model, state(model).params, masks, train.x[:n], train.y[:n]


def network(model, params, masks):
    """A copy of the model with these weights, pruned ones zero."""
    net = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, param in net.named_parameters():
            param.copy_(params[name])
            if name in masks:
                param[~masks[name]] = 0.0
    return net


def gradient_alone(model, params, masks, x, y):
    """Summed one example at a time by plain backward, then the pruned entries set to zero; flat."""
    net = network(model, params, masks)
    for one, label in zip(x, y, strict=True):
        (nn.functional.cross_entropy(net(one[None]), label[None]) / len(y)).backward()
    for name, param in net.named_parameters():
        if name in masks:
            param.grad[~masks[name]] = 0.0
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def close(a, b, tolerance=TOLERANCE):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The gradient itself.


def test_softmax_regression_has_its_closed_form():
    model, train = build(lambda: nn.Linear(6, 3)), blobs().train
    x, y = train.x, train.y
    mask = half_masks(model, 1)["weight"]
    params = state(model).params
    p = (x @ (params["weight"] * mask).T + params["bias"]).softmax(1)
    error = (p - nn.functional.one_hot(y)) / len(y)
    found = gradients.gradient(model, params, x, y, masks={"weight": mask})
    close(found["weight"], (error.T @ x) * mask)
    close(found["bias"], error.sum(0))
    close(gradients.gradient(model, params, x, y, masks={"weight": mask}, coordinates="all")["weight"], error.T @ x)

    g = found["weight"], found["bias"]
    moved = x @ g[0].T + g[1]  # change of the logits along g
    curvature = ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean()
    step = gradients.one_step(model, params, x, y, learning_rate=0.3, masks={"weight": mask})
    square = g[0].square().sum() + g[1].square().sum()
    close(step.first_order_nats, 0.3 * square)
    close(step.second_order_nats, 0.3 * square - 0.045 * curvature)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_it_is_what_backward_gives_and_what_finite_differences_give(kind):
    model, params, masks, x, y = problem(kind)
    found = gradients.gradient(model, params, x, y, masks=masks, batch_size=7)
    close(flat(found), gradient_alone(model, params, masks, x, y))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        ends = ({n: p + s * 1e-5 * direction[n] for n, p in params.items()} for s in (1, -1))
        ahead, behind = (loss_and_error(network(model, end, masks), x, y)[0] for end in ends)
        slope = float(flat(found) @ flat(direction))
        assert (ahead - behind) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_tickets_gradient_is_the_mask_times_the_whole_one_and_not_the_dense_one(kind):
    model, params, masks, x, y = problem(kind)
    live = gradients.gradient(model, params, x, y, masks=masks)
    everywhere = gradients.gradient(model, params, x, y, masks=masks, coordinates="all")
    close(flat(live), flat(masked(everywhere, masks)))
    assert any(bool((everywhere[name][~mask] != 0).any()) for name, mask in masks.items())
    dense = masked(gradients.gradient(model, params, x, y), masks)
    assert float((flat(dense) - flat(live)).norm()) > 0.1 * float(flat(live).norm())


@given(seed=st.integers(0, 2**16), batch_size=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_batch_size_and_the_order_of_examples_do_not_matter(seed, batch_size):
    model, params, masks, x, y = problem(seed=seed % 7)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    expected = gradients.gradient(model, params, x, y, masks=masks)
    close(
        flat(gradients.gradient(model, params, x[order], y[order], masks=masks, batch_size=batch_size)), flat(expected)
    )


def test_frozen_parameters_are_no_coordinates():
    model, params, masks, x, y = problem()
    whole = gradients.gradient(model, params, x, y, masks=masks)
    last = next(reversed(params))
    model.get_parameter(last).requires_grad_(False)
    found = gradients.gradient(model, params, x, y, masks=masks)
    assert set(found) == set(params) - {last}
    close(flat(found), flat({name: whole[name] for name in found}))
    n_live = sum(int(m.sum()) for m in masks.values()) + sum(p.numel() for n, p in params.items() if n not in masks)
    assert int(gradients.alignment(model, params, x, y, masks=masks).n_live) == n_live - params[last].numel()


# Alignment.


@pytest.mark.parametrize("kind", PROBLEMS)
def test_alignment_is_that_of_flat_vectors(kind):
    model, params, masks, x, y = problem(kind)
    end = {name: p + 0.3 * torch.cos(torch.arange(p.numel()).double()).view_as(p) for name, p in params.items()}
    found = gradients.alignment(model, params, x, y, masks=masks, dense_params=params, params_end=end)
    g, dense = gradient_alone(model, params, masks, x, y), gradient_alone(model, params, {}, x, y)
    live = flat({name: masks.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in params.items()})
    moved = (flat(end) - flat(params))[live]
    assert int(found.n_live) == int(live.sum())
    close(found.norm, g.norm())
    close(found.norm_per_live_weight, g[live].square().mean().sqrt())
    close(found.cosine_with_dense, torch.cosine_similarity(g[live], dense[live], dim=0))
    close(found.cosine_with_displacement, -torch.cosine_similarity(g[live], moved, dim=0))


def test_a_full_mask_aligns_with_itself_and_a_step_down_with_minus_the_gradient():
    model, params, _, x, y = problem()
    g = gradients.gradient(model, params, x, y)
    down = {name: p - 0.1 * g[name] for name, p in params.items()}
    full = mask_ops.ones(model)
    found = gradients.alignment(model, params, x, y, masks=full, dense_params=params, params_end=down)
    close(found.cosine_with_dense, torch.ones((), dtype=torch.float64))
    close(found.cosine_with_displacement, torch.ones((), dtype=torch.float64))
    alone = gradients.alignment(model, params, x, y)
    assert bool(alone.cosine_with_dense.isnan()) and bool(alone.cosine_with_displacement.isnan())


# Mini-batches.


def test_batch_statistics_are_those_of_all_pairs_of_batches():
    model, params, masks, x, y = problem(n=46)
    found = gradients.batch_statistics(model, params, x, y, masks=masks, batch_size=9)  # one example is left over
    g = torch.stack([gradient_alone(model, params, masks, x[i : i + 9], y[i : i + 9]) for i in range(0, 45, 9)])
    pairs = list(itertools.combinations(range(5), 2))
    assert (found.n_batches, found.batch_size) == (5, 9)
    close(found.signal, torch.stack([g[a] @ g[b] for a, b in pairs]).mean())
    close(found.noise, torch.stack([(g[a] - g[b]).square().sum() / 2 for a, b in pairs]).mean())
    close(found.pairwise_cosine, torch.stack([torch.cosine_similarity(g[a], g[b], dim=0) for a, b in pairs]).mean())
    close(found.signal_to_noise, found.signal / found.noise)
    # McCandlish et al. 2018, appendix A.1, from batches of b and of B b examples
    small, large, b, whole = g.square().sum(1).mean(), g.mean(0).square().sum(), 9, 45
    signal = (whole * large - b * small) / (whole - b)
    per_example = (small - large) / (1 / b - 1 / whole)
    close(found.signal, signal)
    close(found.noise_scale, per_example / signal)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_signal_and_noise_are_unbiased(q):
    """Over every sequence of labels that 3 batches of 2 coin tosses can bring, weighted by its probability.

    Of a model that is a bias alone, at zero, the gradient of an example is (1/2, 1/2) - onehot(y): the mean is
    (1/2 - q, q - 1/2), and the trace of the covariance of a batch of b is 2 q (1 - q) / b.
    """
    model = build(lambda: nn.Linear(1, 2))
    params = {name: torch.zeros_like(p) for name, p in state(model).params.items()}
    x = torch.zeros(6, 1, dtype=torch.float64)
    signal = noise = 0.0
    for labels in itertools.product((0, 1), repeat=6):
        found = gradients.batch_statistics(model, params, x, torch.tensor(labels), batch_size=2)
        probability = q ** labels.count(0) * (1 - q) ** labels.count(1)
        signal += probability * float(found.signal)
        noise += probability * float(found.noise)
    assert signal == pytest.approx(2 * (q - 0.5) ** 2, abs=1e-12)
    assert noise == pytest.approx(2 * q * (1 - q) / 2, abs=1e-12)


def test_equal_batches_have_no_noise():
    model, params, masks, x, y = problem(n=10)
    found = gradients.batch_statistics(
        model, params, torch.cat([x] * 3), torch.cat([y] * 3), masks=masks, batch_size=10
    )
    assert 0 <= float(found.noise) < 1e-25
    close(found.pairwise_cosine, torch.ones((), dtype=torch.float64))
    close(found.signal, gradients.alignment(model, params, x, y, masks=masks).norm ** 2)


# One step.


@pytest.mark.parametrize("kind", PROBLEMS)
def test_one_step_is_what_a_loop_gains_and_its_orders_are_limits(kind):
    model, params, masks, x, y = problem(kind)
    g = gradients.gradient(model, params, x, y, masks=masks)
    steps = [gradients.one_step(model, params, x, y, learning_rate=lr, masks=masks) for lr in (2e-4, 1e-4)]
    for lr, step in zip((2e-4, 1e-4), steps, strict=True):
        before, _ = loss_and_error(network(model, params, masks), x, y)
        after, _ = loss_and_error(network(model, {n: p - lr * g[n] for n, p in params.items()}, masks), x, y)
        assert float(step.loss_nats) == pytest.approx(before, abs=1e-12)
        assert float(step.realised_nats) == pytest.approx(before - after, abs=1e-12)
        close(step.first_order_nats, lr * flat(g) @ flat(g))
    first = [float(s.realised_nats / s.first_order_nats) - 1 for s in steps]
    second = [float(s.realised_nats - s.second_order_nats) for s in steps]
    assert first[0] == pytest.approx(2 * first[1], rel=0.05) and abs(first[1]) < 0.01  # vanishes as lr
    assert abs(second[1]) < 0.05 * abs(first[1] * float(steps[1].first_order_nats))  # what curvature leaves


def test_the_curvature_is_that_of_the_whole_hessian():
    model, params, masks, x, y = problem()
    g = gradients.gradient(model, params, x, y, masks=masks)
    names = list(params)
    point = tuple(masked(params, masks)[name] for name in names)

    def loss(*weights):
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))
        return nn.functional.cross_entropy(logits, y)

    blocks = torch.autograd.functional.hessian(loss, point)
    sizes = [p.numel() for p in point]
    rows = [[b.reshape(s, t) for b, t in zip(row, sizes, strict=True)] for row, s in zip(blocks, sizes, strict=True)]
    hessian = torch.cat([torch.cat(row, 1) for row in rows])
    v = flat(g)
    step = gradients.one_step(model, params, x, y, learning_rate=0.5, masks=masks, batch_size=11)
    close(step.second_order_nats, 0.5 * v @ v - 0.125 * v @ hessian @ v)


# The NTK.


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_squared_norm_is_the_residual_in_the_metric_of_the_ntk(kind):
    model, params, masks, x, y = problem(kind, n=12)
    found = gradients.ntk_overlap(model, params, x, y, masks=masks, top=36)
    close(found.squared_norm, gradients.alignment(model, params, x, y, masks=masks).norm ** 2)
    close(found.residual_share.sum(), torch.ones((), dtype=torch.float64))
    close(found.gradient_share.sum(), torch.ones((), dtype=torch.float64))


def test_shares_of_the_gradient_are_its_squares_along_singular_vectors_of_the_jacobian():
    model, params, masks, x, y = problem(n=8)
    net = network(model, params, masks)
    logits = net(x).flatten()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, list(net.parameters()), retain_graph=True)])
        for f in logits
    ]
    live = flat({name: masks.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in params.items()})
    left, singular, right = torch.linalg.svd(torch.stack(rows) * live, full_matrices=False)
    g = gradient_alone(model, params, masks, x, y)
    residual = (net(x).softmax(1) - nn.functional.one_hot(y, 3)).detach().flatten()
    found = gradients.ntk_overlap(model, params, x, y, masks=masks, top=5)
    close(found.eigenvalues, singular[:5].detach() ** 2, 1e-8)
    close(found.gradient_share, ((right[:5].detach() @ g) / g.norm()) ** 2, 1e-8)
    close(found.residual_share, (left[:, :5].detach().T @ residual) ** 2 / residual.square().sum(), 1e-8)


# Stacks, modes, refusals.


MEASURES = {
    "alignment": lambda m, p, x, y, **k: gradients.alignment(
        m, p, x, y, params_end={n: 0.9 * t for n, t in p.items()}, dense_params=p, **k
    ),
    "batch_statistics": lambda m, p, x, y, **k: gradients.batch_statistics(m, p, x, y, batch_size=5, **k),
    "one_step": lambda m, p, x, y, **k: gradients.one_step(m, p, x, y, learning_rate=0.1, **k),
    "ntk_overlap": lambda m, p, x, y, **k: gradients.ntk_overlap(m, p, x, y, top=4, **k),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_stack_gives_what_its_replicas_give_alone(measure, kind):
    several = [problem(kind, seed) for seed in range(3)]
    model, _, _, x, y = several[0]
    x, y = x[:15], y[:15]
    states = [state(one[0]) for one in several]
    whole, masks = stack_states(states), stack([one[2] for one in several])
    found = asdict(MEASURES[measure](model, whole.params, x, y, masks=masks, buffers=whole.buffers))
    for r, (one, own) in enumerate(zip(several, states, strict=True)):
        alone = asdict(MEASURES[measure](model, own.params, x, y, masks=one[2], buffers=own.buffers))
        for field, value in alone.items():
            close(found[field][r], value) if isinstance(value, torch.Tensor) else None
            assert isinstance(value, torch.Tensor) or found[field] == value
    stacked = gradients.gradient(model, whole.params, x, y, masks=masks, buffers=whole.buffers)
    last = gradients.gradient(model, states[2].params, x, y, masks=several[2][2], buffers=states[2].buffers)
    close(flat({name: g[2] for name, g in stacked.items()}), flat(last))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_module_in_training_mode_is_evaluated_and_left_as_it_was(measure):
    model, params, masks, x, y = problem("attention")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = MEASURES[measure](model.eval(), params, x, y, masks=masks)
    before = state(model)
    found = MEASURES[measure](model.train(), params, x, y, masks=masks)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(b, before.buffers[n]) for n, b in model.named_buffers())
    assert all(p.grad is None and torch.equal(p, before.params[n]) for n, p in model.named_parameters())
    for name, value in asdict(expected).items():
        assert torch.equal(getattr(found, name), value) if isinstance(value, torch.Tensor) else True


class BatchStatistics(nn.Module):
    """Batch norm that no module type tells."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


class Total(nn.Module):
    """Each input's outputs and those of all before it."""

    def forward(self, x):
        return x.cumsum(0)


@pytest.mark.parametrize("measure", [*MEASURES, "gradient"])
def test_what_depends_on_the_batch_is_refused(measure):
    call = MEASURES.get(measure, gradients.gradient)
    model, _, _, x, y = problem("conv_bn")
    batchwise = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), model)
    with pytest.raises(
        ValueError, match=r"depend on the rest of the batch: batch norm '0' keeps no running statistics"
    ):
        call(batchwise, state(batchwise).params, x, y)
    for last in (BatchStatistics(), Total()):
        coupled = build(lambda last=last: nn.Sequential(small_mlp(), last)).eval()
        with pytest.raises(ValueError, match=r"each example must pass through the network by itself|more than 1 value"):
            call(coupled, state(coupled).params, blobs().train.x[:30], blobs().train.y[:30])


@pytest.mark.parametrize("measure", MEASURES)
def test_masks_alone_may_be_stacked_as_the_levels_of_one_network(measure):
    model, params, _, x, y = problem("conv_bn", n=12)
    levels = [half_masks(model, seed) for seed in range(2)]
    buffers = state(model).buffers
    call = gradients.alignment if measure == "alignment" else MEASURES[measure]
    found = asdict(call(model, params, x, y, masks=stack(levels), buffers=buffers))
    for r, masks in enumerate(levels):
        alone = asdict(call(model, params, x, y, masks=masks, buffers=buffers))
        for name, value in alone.items():
            torch.testing.assert_close(found[name][r], value, equal_nan=True) if torch.is_tensor(value) else None
    stacked = gradients.gradient(model, params, x, y, masks=stack(levels))
    close(flat({n: g[1] for n, g in stacked.items()}), flat(gradients.gradient(model, params, x, y, masks=levels[1])))


@pytest.mark.parametrize("measure", [*MEASURES, "gradient"])
def test_weights_that_are_not_finite_are_refused(measure):
    model, params, _, x, y = problem()
    for value in (float("nan"), float("inf")):
        broken = {**params, "fc1.weight": torch.full_like(params["fc1.weight"], value)}
        with pytest.raises(ValueError, match=r"params\['fc1.weight'\] must be finite: 48 of 48 entries"):
            MEASURES.get(measure, gradients.gradient)(model, broken, x, y)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="x must be finite: 1 of 180 entries"):
        MEASURES.get(measure, gradients.gradient)(model, params, x, y)


@pytest.mark.parametrize("measure", [*MEASURES, "gradient"])
def test_bad_data_is_refused(measure):
    call = MEASURES.get(measure, gradients.gradient)
    model, params, masks, x, y = problem()

    def refused(message, *data, **options):
        with pytest.raises(ValueError, match=message):
            call(model, params, *data, **{"masks": masks, **options})

    refused(r"labels must have shape \(30,\) .* got shape \(29,\)", x, y[:-1])
    refused("x must hold at least one example", x[:0], y[:0])
    refused(r"got shape \(30, 3\)\. Pass y\.argmax", x, nn.functional.one_hot(y))
    refused(r"labels must be in 0\.\.2 for 3 classes: got ..\.3", x, y + 1)
    refused(r"labels must be in 0\.\.2 for 3 classes: got -1", x, y - 1)
    refused(r"labels must be integer class labels, .*: got torch\.float64", x, y.double())
    refused(r"x must have the dtype of params, torch\.float64: got torch\.float32", x.float(), y)
    refused("x must be what the model takes: Sequential fails on examples of shape", x[:, :-1], y)
    refused("masks must name parameters of the model", x, y, masks={"fc9.weight": masks["fc1.weight"]})
    refused("must be bool", x, y, masks={n: m.double() for n, m in masks.items()})
    refused("must have shape", x, y, masks={n: m[:-1] for n, m in masks.items()})
    uneven = {n: torch.stack([m] * (2 + i)) for i, (n, m) in enumerate(masks.items())}
    refused("share one replica axis", x, y, masks=uneven)


def test_bad_options_are_refused():
    model, params, masks, x, y = problem()
    with pytest.raises(ValueError, match=r"unknown coordinates 'alive'\. Did you mean 'live'"):
        gradients.gradient(model, params, x, y, coordinates="alive")
    with pytest.raises(ValueError, match="batch_size must be at least 1: got 0"):
        gradients.gradient(model, params, x, y, batch_size=0)
    with pytest.raises(ValueError, match="at least two whole batches: got 30 examples for batches of 16"):
        gradients.batch_statistics(model, params, x, y, batch_size=16)
    for learning_rate in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="learning_rate must be positive and finite"):
            gradients.one_step(model, params, x, y, learning_rate=learning_rate)
    for top in (0, 91):
        with pytest.raises(ValueError, match=r"top must lie in 1..90"):
            gradients.ntk_overlap(model, params, x, y, top=top)
    twice = stack([params, params])
    with pytest.raises(ValueError, match="dense_params must have the replica axis of params and masks, None: got 2"):
        gradients.alignment(model, params, x, y, masks=masks, dense_params=twice)
    with pytest.raises(ValueError, match="params_end must have the replica axis of params and masks, 2: got None"):
        gradients.alignment(model, twice, x, y, masks=masks, params_end=params)
    with pytest.raises(ValueError, match=r"labels must have shape \(30, 1\) for logits \(30, 1, 3\)"):
        gradients.gradient(
            nn.Sequential(model, nn.Unflatten(1, (1, 3))), {f"0.{n}": p for n, p in params.items()}, x, y
        )
    norm = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), build(small_mlp))
    with pytest.raises(ValueError, match="batch norm '0' keeps no running statistics"):
        gradients.gradient(norm.eval(), state(norm).params, x, y)
    with pytest.raises(ValueError, match="a gradient needs a trainable parameter"):
        gradients.gradient(model.requires_grad_(False), params, x, y)


# What users bring: plain autograd is the truth.


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass, with whatever weights the module holds by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.output = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def body(self, h):
        return torch.tanh(self.second(torch.tanh(h)))

    def forward(self, x):
        return self.output(checkpoint(self.body, self.first(x), use_reentrant=False))


class ByClosure(nn.Module):
    """Reaches one module through a closure, as hooks do, and another under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(6, 6), nn.Linear(6, 3)
        self.same = self.inner
        self.reach = lambda x, held=[self.inner]: held[0](x).sin()

    def forward(self, x):
        return self.output(self.same(self.reach(x)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.output = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(torch.tanh(self.embed(x)))


def inputs(kind):
    generator = torch.Generator().manual_seed(5)
    if kind is Tokens:
        return torch.randint(0, 7, (10, 5), generator=generator), torch.randint(0, 3, (10, 5), generator=generator)
    return torch.randn(10, 6, generator=generator).double(), torch.randint(0, 3, (10,), generator=generator)


@pytest.mark.parametrize("kind", [Checkpointed, ByClosure, Tokens])
def test_gradients_are_those_of_plain_pytorch_at_weights_that_the_module_does_not_hold(kind):
    model, other = build(kind, 0), build(kind, 1).eval()
    x, y = inputs(kind)
    loss = nn.functional.cross_entropy(other(x).flatten(0, -2), y.flatten())
    expected = torch.autograd.grad(loss, list(other.parameters()), create_graph=True)
    g = torch.cat([part.flatten() for part in expected])
    found = gradients.gradient(model, state(other), x, y, batch_size=4)
    close(flat(found), g.detach())
    product = torch.autograd.grad(g @ g.detach(), list(other.parameters()))
    curvature = g.detach() @ torch.cat([part.flatten() for part in product])
    step = gradients.one_step(model, state(other), x, y, learning_rate=0.5)
    close(step.second_order_nats, (0.5 * g @ g - 0.125 * curvature).detach())


def test_any_loss_will_do():
    model, _, masks, x, _ = problem()
    y = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net = network(model, state(model).params, masks)
    live = flat({n: masks.get(n, torch.ones_like(p, dtype=torch.bool)) for n, p in net.named_parameters()})
    g = flat(dict(enumerate(torch.autograd.grad((net(x) - y).square().mean(), list(net.parameters()))))) * live
    options = {"masks": masks, "loss": SQUARED_ERROR}
    close(flat(gradients.gradient(model, state(model), x, y, **options)), g)
    close(gradients.alignment(model, state(model), x, y, **options).norm, g.norm())
    close(gradients.ntk_overlap(model, state(model), x, y, **options).squared_norm, g @ g)
    step = gradients.one_step(model, state(model), x, y, learning_rate=1e-5, **options)
    assert float(step.realised_nats / step.second_order_nats) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        gradients.gradient(model, state(model), x, y[:, 0], loss=SQUARED_ERROR)


def test_parameters_without_the_buffers_that_the_forward_pass_reads_are_refused():
    model, params, masks, x, y = problem("conv_bn")
    other = problem("conv_bn", 1)[0]
    found = gradients.gradient(other, state(model), x, y, masks=masks)
    close(flat(found), flat(gradients.gradient(model, params, x, y, masks=masks)))
    for measure in [*MEASURES.values(), gradients.gradient]:
        with pytest.raises(ValueError, match=r"reads buffers.* those of these params are not known: pass a State"):
            measure(other, params, x, y, masks=masks)
    with pytest.raises(ValueError, match="reads buffers"):
        gradients.alignment(model, params, x, y, params_end=params, dense_params=state(other).params, masks=masks)


def test_what_pytorch_cannot_differentiate_twice_is_refused_by_name():
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Hardsigmoid(), nn.Linear(5, 3)))
    x, y = inputs(None)
    assert float(gradients.alignment(model, state(model), x, y).norm) > 0
    with pytest.raises(ValueError, match="hardsigmoid_backward is not implemented"):
        gradients.one_step(model, state(model), x, y, learning_rate=0.1)
