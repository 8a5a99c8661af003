"""Dropout, stochastic depth and other draws: the plain loop's bits, whatever else trains, however often resumed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import blobs, build, images, small_mlp
from reference import train_alone
from torch import backends, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ticketlab as tl
from ticketlab.batches import noise_seed
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.masks import ones
from ticketlab.seeds import kept_generators
from ticketlab.state import state

ADAM = Recipe(steps=12, batch_size=16, optimizer="adam", learning_rate=3e-3, eval_every=5)
PLAIN_SGD = Recipe(steps=12, batch_size=16, optimizer="sgd", learning_rate=0.05, momentum=0.0, eval_every=5)


class Tokens(nn.Module):
    """Six numbers as six tokens of width 8, mixed by a module that may drop something."""

    def __init__(self, mixer) -> None:
        super().__init__()
        self.embed, self.mixer, self.output = nn.Linear(1, 8), mixer, nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x[..., None])
        if isinstance(self.mixer, nn.MultiheadAttention):
            h = self.mixer(h, h, h, need_weights=False)[0]
        elif isinstance(self.mixer, nn.LSTM):
            h = self.mixer(h)[0]
        else:
            h = self.mixer(h)
        return self.output(h.mean(1))


class Block(nn.Module):
    """A hidden layer in front of which, or beside which, something is drawn."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.a, self.b, self.output, self.draw = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), draw

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.output(self.draw(self, h))


def functional(net, h):
    return net.b(F.dropout(h, 0.4, training=net.training))


def stochastic_depth(net, h):
    """A residual branch that each example keeps with probability 0.7 (Huang et al. 2016), rescaled."""
    branch = net.b(h)
    if not net.training:
        return h + branch
    return h + branch * (torch.rand(len(h), 1, device=h.device) < 0.7).to(h.dtype) / 0.7


def numpys(net, h):
    return net.b(h) + (torch.from_numpy(np.random.randn(*h.shape)).to(h) if net.training else 0)


def pythons(net, h):
    return net.b(h) if not net.training or random.random() < 0.5 else h


def checkpointed(net, h):
    return checkpoint(lambda z: net.b(F.dropout(torch.tanh(z), 0.4, net.training)), h, use_reentrant=False)


def conv():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


NOISY = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)),
    "alpha_dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.SELU(), nn.AlphaDropout(0.4), nn.Linear(8, 3)),
    "rrelu": lambda: nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 3)),
    "dropout_2d": conv,
    "attention": lambda: Tokens(nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)),
    "encoder": lambda: Tokens(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)),
    "lstm": lambda: Tokens(nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)),
    **{f.__name__: (lambda f=f: Block(f)) for f in (functional, stochastic_depth, numpys, pythons, checkpointed)},
}


def task_of(kind):
    return images() if kind == "dropout_2d" else blobs()


def thinned(model):
    masks = {n: m.clone() for n, m in ones(model).items()}
    for mask in masks.values():
        mask.view(-1)[::3] = False
    return masks


@pytest.mark.parametrize("kind", NOISY)
def test_training_is_a_plain_loop_that_seeds_each_step_to_the_bit(kind):
    task, seeds = task_of(kind), (3, 4)
    models = [build(NOISY[kind], seed) for seed in seeds]
    masks = thinned(models[0])
    outcome = train(models[0], [Start(state(m), masks, s) for m, s in zip(models, seeds, strict=True)], task, ADAM)
    with kept_generators():
        alone = [
            train_alone(m, masks, task, ADAM, s, noise=True, fused=True) for m, s in zip(models, seeds, strict=True)
        ]
        other = train_alone(models[0], masks, task, ADAM, 3, fused=True)
    for r, net in enumerate(alone):
        for name, p in state(net).params.items():
            assert torch.equal(outcome.end.params[name][r], p), name
    assert any(not torch.equal(outcome.end.params[n][0], p) for n, p in state(other).params.items())  # it does draw


@pytest.mark.parametrize("kind", ["dropout", "attention", "stochastic_depth"])
def test_replicas_are_separate_runs_and_a_rest_is_the_uninterrupted_one(kind):
    task, seeds = blobs(), (3, 4, 5)
    models = [build(NOISY[kind], seed) for seed in seeds]
    begun = [Start(state(m), thinned(m), s) for m, s in zip(models, seeds, strict=True)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # one replica after another all the same
        whole = train(models[0], begun, task, PLAIN_SGD, snapshot_steps=(7,))
    finally:
        torch.set_num_threads(threads)
    for r, start in enumerate(begun):
        alone = train(models[0], [start], task, PLAIN_SGD)
        at_7 = Start(whole.snapshots[7].select(r), start.masks, start.order_seed)
        rest = train(models[0], [at_7], task, PLAIN_SGD, first_step=7)
        for name, p in whole.end.params.items():
            assert torch.equal(alone.end.params[name][0], p[r])
            assert torch.equal(rest.end.params[name][0], p[r])


def test_draws_are_of_the_order_seed_and_the_step():
    assert noise_seed(3, 5) == noise_seed(3, 5)
    assert len({noise_seed(a, b) for a in range(4) for b in range(50)}) == 200
    model, task = build(NOISY["dropout"]), blobs()
    # One batch, all examples: what order seeds change is the order of its rows, but for the noise.
    recipe = Recipe(steps=1, batch_size=len(task.train), optimizer="sgd", learning_rate=0.1, eval_every=1)
    ends = train(model, [Start(state(model), {}, s) for s in (0, 0, 1)], task, recipe).end.params["0.weight"]
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], rtol=1e-6)
    quiet = build(small_mlp)
    ends = train(quiet, [Start(state(quiet), {}, s) for s in (0, 1)], task, recipe).end.params["fc1.weight"]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_the_callers_generators_are_left_where_they_were_and_do_not_matter():
    model, task = build(NOISY["functional"]), blobs()
    with kept_generators():
        ends, after = [], []
        for seed in (1, 2):
            for one in (torch.manual_seed, np.random.seed, random.seed):
                one(seed)
            ends.append(train(model, [Start(state(model), {}, 0)], task, ADAM).end.params["a.weight"])
            after.append((torch.rand(1).item(), np.random.rand(), random.random()))
            for one in (torch.manual_seed, np.random.seed, random.seed):
                one(seed)
            assert after[-1] == (torch.rand(1).item(), np.random.rand(), random.random())
    assert torch.equal(*ends)


def test_evaluation_does_not_draw():
    model, task = build(NOISY["dropout"]), blobs()
    outcome = train(model, [Start(state(model), {}, 0)], task, ADAM)
    loss, error = tl.evaluate(model, outcome.end, task.test.x, task.test.y)
    assert outcome.metrics["test_loss_nats"][0] == float(loss)
    assert outcome.metrics["test_error"][0] == float(error)
    always = build(lambda: Block(lambda net, h: net.b(F.dropout(h, 0.4))))
    with pytest.raises(ValueError, match="or on chance, in evaluation mode"):
        train(always, [Start(state(always), {}, 0)], task, ADAM)


def test_vmap_is_refused_where_it_would_draw_other_numbers():
    model = build(NOISY["dropout"])
    begun = [Start(state(model), {}, seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="vmap draws other numbers than each network by itself"):
        train(model, begun, blobs(), ADAM, execution="vmap")


class Late(nn.Module):
    """Draws from its third training pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.output = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            self.passes += 1
            h = F.dropout(h, 0.5, self.passes.item() > 2)
        return self.output(h)


def test_noise_that_sets_in_later_is_refused_rather_than_left_to_chance():
    model = build(Late)
    with pytest.raises(ValueError, match="between steps 0 and 5 something began to draw"):
        train(model, [Start(state(model), {}, 0)], blobs(), ADAM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("kind", NOISY)
def test_on_a_cuda_device_too(kind):
    task, model = task_of(kind).to("cuda"), build(NOISY[kind], 3).cuda()
    before = torch.cuda.get_rng_state()
    once, again = (train(model, [Start(state(model), {}, 3)], task, ADAM).end.select(0).params for _ in range(2))
    assert torch.equal(before, torch.cuda.get_rng_state())
    with kept_generators("cuda"), backends.cudnn.flags(enabled=kind != "lstm"):  # whose fused form no seed reaches
        alone = state(train_alone(model, {}, task, ADAM, 3, noise=True, fused=True)).params
    for name, p in once.items():
        torch.testing.assert_close(again[name], p, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone[name], p, rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_has_one_name_on_every_device():
    config = tl.ImpConfig(levels=1, init_seeds=(0,), recipe=ADAM)
    for kind in ("dropout", "attention"):
        names = {
            tl.Study(config, model=NOISY[kind], task=blobs(dtype=torch.float32), device=device).identity
            for device in ("cpu", "cuda")
        }
        assert len(names) == 1


def test_a_study_with_dropout_goes_on_to_the_same_bits(tmp_path):
    config = tl.ImpConfig(levels=2, init_seeds=(0,), treatments=("ticket", "sibling"), recipe=ADAM)

    def study():
        task = blobs(dtype=torch.float32)
        return tl.Study(config, model=NOISY["dropout"], task=task, device="cpu", progress=False)

    assert study().identity == study().identity  # one seed for the draws of what names it
    whole = list(study().levels(None))
    begun = study().levels(tmp_path)
    next(begun), next(begun)
    begun.close()
    for level, resumed in zip(whole, study().levels(tmp_path), strict=True):
        assert all(torch.equal(p, resumed.end.params[n]) for n, p in level.end.params.items())
    less = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))  # noqa: E731
    other = tl.Study(config, model=less, task=blobs(dtype=torch.float32), device="cpu")
    assert study().identity != other.identity


def test_masks_are_learned_on_networks_that_drop():
    model, task = build(NOISY["dropout"], 0, torch.float32), blobs(dtype=torch.float32)
    frozen = tl.state(model)
    stacked = tl.State({n: p[None] for n, p in frozen.params.items()}, {})
    once, again = (
        tl.supermask.learn_masks(model, stacked, task, ADAM, (0,), density=0.7, progress=False) for _ in range(2)
    )
    assert all(torch.equal(score, again.scores[n]) for n, score in once.scores.items())
