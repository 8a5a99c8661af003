"""Everything that computes, on a GPU: the numbers of the CPU in float64, and training as a CUDA graph.

Without a GPU the same bodies run on the CPU against the CPU, so that they cannot rot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ALL
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from torch import Tensor, nn

import ticketlab as tl
from ticketlab.batches import batch_indices, crop_flip_draws
from ticketlab.engine import graphed
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.errors import Refused

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Example = tuple[nn.Module, tl.State, dict[str, Tensor], tl.Task]
NETWORKS = {"mlp": (small_mlp, blobs), "conv_bn": (small_conv_bn, images)}


def example(name: str, device: torch.device) -> Example:
    factory, problem = NETWORKS[name]
    model = build(factory)
    with torch.no_grad():
        for buffer in model.buffers():  # running statistics that matter
            if buffer.is_floating_point():
                buffer.add_(0.3)
    model = model.to(device)
    masks = {n: m.to(device) for n, m in half_masks(model.cpu(), 1).items()}
    return model.to(device), tl.state(model.to(device)), masks, problem().to(device)


def end_of(one: Example, steps: int = 20) -> tl.State:
    model, state, masks, task = one
    recipe = tl.Recipe(steps=steps, batch_size=20, optimizer="sgd", learning_rate=0.05, eval_every=10)
    outcome = train(model, [Start(state, masks, 3)], task, recipe, progress=False)
    return outcome.end.select(0)


def first(one: Example, n: int = 12) -> tuple[Tensor, Tensor]:
    return one[3].train.x[:n], one[3].train.y[:n]


def ntk(method: str, outputs: str, one: Example) -> Any:
    model, state, masks, _ = one
    return tl.ntk.kernel(
        model, state, first(one)[0], masks=None if method == "structured" else masks, method=method, outputs=outputs
    )


def spectrum(one: Example) -> Any:
    model, state, masks, _ = one
    x, y = first(one)
    kernel = tl.ntk.kernel(model, state, x, masks=masks)
    target = torch.nn.functional.one_hot(y, 3).to(kernel)
    regression = tl.ntk.kernel_regression(kernel, target, kernel, ridge=1e-3)
    alignments = tl.ntk.alignment(kernel, ntk("auto", "full", one)), tl.ntk.target_alignment(kernel, target)
    operator = tl.ntk.operator(model, state, x, masks=masks)
    return tl.ntk.spectrum(kernel).eigenvalues, regression, alignments, tl.ntk.spectrum(operator, top=3).eigenvalues


def signal(one: Example) -> Any:
    model, state, masks, _ = one
    x, y = first(one)
    values = tl.signal.jacobian_singular_values(model, state, x, masks=masks)
    moments = tl.signal.jacobian_moments(model, state, x, masks=masks, n_moments=2, n_probes=4).mean
    largest = tl.signal.largest_singular_values(model, state, x, masks=masks)
    return values, moments, largest, tl.signal.layer_statistics(model, state, x, y, masks=masks)


def gradients(one: Example) -> Any:
    model, state, masks, _ = one
    x, y = first(one, 40)
    end = end_of(one)
    return (
        tl.gradients.gradient(model, state, x, y, masks=masks),
        tl.gradients.alignment(model, state, x, y, masks=masks, dense_params=state, params_end=end),
        tl.gradients.batch_statistics(model, state, x, y, masks=masks, batch_size=10),
        tl.gradients.one_step(model, state, x, y, masks=masks, learning_rate=0.1),
        tl.gradients.ntk_overlap(model, state, *first(one), masks=masks, top=3).squared_norm,
    )


def curvature(one: Example) -> Any:
    model, state, masks, task = one
    both = [
        tl.curvature.top_eigenvalues(model, state, task, k=3, matrix=matrix, masks=masks, limit=40)
        for matrix in ("hessian", "gauss_newton")
    ]
    return [found.values for found in both], tl.curvature.trace(model, state, task, masks=masks, limit=40, n_probes=4)


def path(one: Example) -> Any:
    model, state, masks, task = one
    found = tl.connectivity.linear_path(model, state, end_of(one), task, masks=masks, n_alphas=5)
    return {k: v for k, v in asdict(found).items() if not isinstance(v, str)}


def permutations(one: Example) -> Any:
    model, state, _, task = one
    groups = tl.permutation.groups(model, task.train.x[:2])
    drawn = tl.permutation.random(groups, 5)
    moved = tl.State(
        tl.permutation.permute(groups, state.params, drawn), tl.permutation.permute(groups, state.buffers, drawn)
    )
    tl.permutation.assert_same_function(model, state, moved, task.train.x[:5])
    return moved.params, tl.permutation.match(groups, state.params, moved.params).permutations


def overlaps(one: Example) -> Any:
    _, _, masks, _ = one
    other = tl.masks.random_mask(masks, 4)
    return tl.overlap.compare(masks, other)


def graphs(one: Example) -> Any:
    model, _, masks, task = one
    return tl.graph.effective_masks(model, masks, task.train.x)


def bounds(one: Example) -> Any:
    _, state, masks, _ = one
    params = {n: p.float() for n, p in (state.params | state.buffers).items() if p.is_floating_point()}
    coded = tl.bounds.encode(masks, params, "coded")
    return tl.bounds.description_length(masks).nats, list(coded)


MEASURES: dict[str, Callable[[Example], Any]] = {
    **{f"ntk {m} {o}": partial(ntk, m, o)
       for m in ("auto", "structured", "rows", "gather", "generic") for o in ("full", "trace")},
    "spectrum": spectrum, "signal": signal, "gradients": gradients, "curvature": curvature, "path": path,
    "permutations": permutations, "overlaps": overlaps, "bounds": bounds, "effective masks": graphs,
}  # fmt: skip


def leaves(value: Any) -> list[np.ndarray]:
    """Every number in what a measure returns."""
    if isinstance(value, Tensor):
        return [value.detach().cpu().double().numpy()]
    if isinstance(value, pd.DataFrame):
        return [value.select_dtypes("number").to_numpy(float)]
    if is_dataclass(value):
        return leaves({k: v for k, v in vars(value).items() if not isinstance(v, str)})
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    return [np.asarray(value, dtype=float)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("measure", MEASURES)
def test_measures_on_a_gpu_are_those_of_the_cpu(measure, name):
    here, there = (leaves(MEASURES[measure](example(name, d))) for d in (DEVICE, torch.device("cpu")))
    assert len(here) == len(there) and any(leaf.size for leaf in here)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * max(1.0, float(np.nanmax(np.abs(b), initial=0))))


SGD = tl.Recipe(
    steps=30, batch_size=16, optimizer="sgd", learning_rate=0.05, weight_decay=1e-3, nesterov=True, eval_every=10,
    schedule="cosine", warmup_steps=4,
)  # fmt: skip
ADAM = replace(SGD, optimizer="adam", nesterov=False, learning_rate=0.005)


def starts_of(factory: Callable[[], nn.Module], n: int, device: torch.device) -> tuple[nn.Module, list[Start]]:
    nets = [build(factory, seed, torch.float32).to(device) for seed in range(n)]
    masks = [{k: m.to(device) for k, m in half_masks(net.cpu(), 5).items()} for net in nets]
    return nets[0].to(device), [
        Start(tl.state(net.to(device)), mask, 10 + r) for r, (net, mask) in enumerate(zip(nets, masks, strict=True))
    ]


@needs_gpu
@pytest.mark.parametrize("recipe", [SGD, ADAM, replace(ADAM, optimizer="adamw")], ids=lambda r: r.optimizer)
@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_steps_are_those_of_the_loop(name, recipe, monkeypatch):
    factory, problem = NETWORKS[name]
    task = problem(dtype=torch.float32).to(DEVICE)
    task = replace(task, augmentation="crop_flip") if name == "conv_bn" else task
    model, starts = starts_of(factory, 3, DEVICE)
    starts[1] = replace(starts[1], learning_rate=0.01)
    starts[2] = replace(starts[2], frozen=True) if not recipe.weight_decay else starts[2]
    ran = []
    monkeypatch.setattr(graphed, "run", lambda *args, run=graphed.run: (ran.append(args[1]), run(*args))[1])
    by_graph = train(model, starts, task, recipe, first_step=3, snapshot_steps=(12,), progress=False)
    assert sum(map(len, ran)) == 27, "the steps were not recorded"
    by_loop = train(model, starts, task, recipe, first_step=3, snapshot_steps=(12,), progress=False, execution="loop")
    assert sum(map(len, ran)) == 27
    for one, two in ((by_graph.end, by_loop.end), (by_graph.snapshots[12], by_loop.snapshots[12])):
        for part, other in zip(one, two, strict=True):
            for n in part:
                torch.testing.assert_close(part[n], other[n], rtol=2e-4, atol=2e-4)
    for n, mask in starts[0].masks.items():
        assert not by_graph.end.params[n][0][~mask].any()


@needs_gpu
@pytest.mark.parametrize("recipe", [SGD, replace(SGD, clip_norm=0.3), ADAM], ids=["sgd", "clip", "adam"])
def test_a_stack_of_matrices_is_one_recording_and_its_steps_are_those_of_the_loop(recipe, monkeypatch):
    task = replace(images(dtype=torch.float32).to(DEVICE), augmentation="crop_flip")
    size = task.train.x[0].numel()

    def perceptron() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.ReLU(), nn.Linear(12, 3))

    model, starts = starts_of(perceptron, 3, DEVICE)
    graphs = []
    monkeypatch.setattr(graphed, "run", lambda *args, run=graphed.run: (graphs.append(args[0]), run(*args))[1])
    by_graph = train(model, starts, task, recipe, first_step=3, progress=False).end
    by_loop = train(model, starts, task, recipe, first_step=3, progress=False, execution="loop").end
    assert graphs and all(len(each) == 1 for each in graphs), "the stack was not recorded as one"
    for n, p in by_loop.params.items():
        torch.testing.assert_close(by_graph.params[n], p, rtol=2e-4, atol=2e-4)


@needs_gpu
def test_what_cannot_be_recorded_goes_through_the_loop():
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (1.0 if float(x.sum()) < 1e9 else 2.0)

    task = blobs(dtype=torch.float32).to(DEVICE)
    model, starts = starts_of(Waits, 2, DEVICE)
    ends = [train(model, starts, task, SGD, progress=False, execution=e).end for e in ("auto", "loop")]
    for n, p in ends[0].params.items():
        torch.testing.assert_close(p, ends[1].params[n], rtol=1e-4, atol=1e-4)
    with torch.random.fork_rng(devices=[DEVICE]):
        torch.rand(1, device=DEVICE)  # the generator is not left as in a recording


@needs_gpu
def test_a_diverged_replica_leaves_the_others_alone():
    task = blobs(dtype=torch.float32).to(DEVICE)
    model, starts = starts_of(small_mlp, 3, DEVICE)
    alone = train(model, [starts[0], starts[2]], task, SGD, progress=False)
    starts[1] = replace(starts[1], learning_rate=1e30)
    with pytest.warns(RuntimeWarning, match="replica 1 is not finite"):
        together = train(model, starts, task, SGD, progress=False)
    for n, p in alone.end.params.items():
        torch.testing.assert_close(p, together.end.params[n][[0, 2]], rtol=1e-4, atol=1e-4)


CONFIG = tl.ImpConfig(
    levels=2, prune_fraction=0.3, init_seeds=(5, 6), rewind_step=4, treatments=("ticket", "reinit", "sibling"),
    recipe=replace(SGD, weight_decay=0.0),
)  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_study_takes_the_gpu_and_a_stopped_one_goes_on(name, tmp_path):
    factory, problem = NETWORKS[name]
    task = problem(dtype=torch.float32)
    study = tl.Study(CONFIG, model=factory, task=task, progress=False)
    assert study.task.device.type == DEVICE.type
    first_levels = [level.level for level, _ in zip(study.levels(tmp_path), range(2), strict=False)]
    *_, last = tl.imp(CONFIG, model=factory, task=task, store=tmp_path, progress=False)
    run = tl.load_run(next(tmp_path.iterdir()))
    assert first_levels == [0, 1] and last.level == 2
    assert float(last.density) == last.metrics["density"].iloc[0]
    for n, p in run[2].end.params.items():
        assert torch.equal(p.cpu(), last.end.params[n].cpu())
    module = last.module(0)
    loss, error = tl.evaluate(module, tl.state(module), task.test.x.to(DEVICE), task.test.y.to(DEVICE))
    assert float(error) == pytest.approx(last.metrics["test_error"][0], abs=1e-6)
    assert float(loss) == pytest.approx(last.metrics["test_loss_nats"][0], rel=1e-3)


@needs_gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.filterwarnings("ignore:only .* are prunable")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ALL)
def test_networks_of_others_train_on_a_gpu_as_on_the_cpu(name):
    one = ALL[name]
    if one.missing:
        pytest.skip(one.missing)
    if name == "hf_levit":
        pytest.xfail("its mask on an H100 was not that of the CPU in float64: the cause is not known")
    config = replace(
        CONFIG, levels=1, init_seeds=(5,), rewind_step=1, dtype="float64", treatments=("ticket",),
        prunable=one.prunable, recipe=replace(CONFIG.recipe, steps=3, batch_size=4, warmup_steps=0, eval_every=2),
    )  # fmt: skip
    ends, refusals = [], []
    for device in (DEVICE, "cpu"):
        try:
            ends += [
                list(tl.imp(config, model=one.build, task=one.task(), device=device, store=None, progress=False))[-1]
            ]
        except Refused as refusal:
            refusals.append(str(refusal))
    assert len(set(refusals)) <= 1 and len(refusals) in (0, 2), refusals
    if refusals:
        return
    for n, mask in ends[0].masks.items():
        assert torch.equal(mask.cpu(), ends[1].masks[n])
    for n, p in ends[0].end.params.items():
        torch.testing.assert_close(p.cpu(), ends[1].end.params[n], rtol=1e-4, atol=1e-5)


def test_a_feed_is_that_of_the_loop():
    task = replace(images(dtype=torch.float32), augmentation="crop_flip")
    feed = graphed.Feed.of(task, SGD, [7, 8], None, range(5, 9))
    for i, step in enumerate(range(5, 9)):
        for r, seed in enumerate((7, 8)):
            assert torch.equal(feed.order[i, r], batch_indices(len(task.train), 16, seed, step))
            assert torch.equal(feed.draws[i, :, r], crop_flip_draws(16, seed, step))
        assert float(feed.rate[i]) == pytest.approx(SGD.learning_rate_at(step))
