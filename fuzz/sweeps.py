"""Every flag of every analysis and every argument of public functions: one wrong value at a time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ticketlab as tl
from ticketlab import console

WORDS = ("", "x", "-1", "0", "nan", "1e999", "1000000000000", "0.5", "\n", "none")
"""What is put in the place of a flag's value."""
PLACES = ("out", "store", "run")
TINY = {
    "levels": "1",
    "steps": "4",
    "learned-steps": "4",
    "eval-every": "2",
    "init-seeds": "0 1",
    "snapshot-steps": "2",
}
PATIENT = {(flag, WORDS[6]) for flag in ("n-spectrum", "n-regression", "n-kernel")}
"""Right, and longer than a fuzzer waits: all examples that there are."""
Case = tuple[str, Callable[[], object]]
"""Words for an input, and what to do with it: an exit code of 2 is a refusal."""


def flags(folder: Path) -> Iterator[Case]:
    """Of an analysis its own flags, and those of the study once, for imp: all analyses share them."""
    for name in console.questions():
        config = importlib.import_module(f"analyses.{name}").Config()
        every = [flag.replace("_", "-") for flag in _names(config, whole=True)]
        own = every if name == "imp" else [flag.replace("_", "-") for flag in _names(config, whole=False)]
        tiny = {flag: value for flag, value in TINY.items() if flag in every}
        for flag in own:
            for word in WORDS if flag not in PLACES else ():
                given = {**tiny, "out": str(folder / "out"), "store": str(folder / "store"), "device": "cpu"}
                given = {k: v.split() for k, v in given.items() if k in every} | {flag: [word]}
                argv = [name, *(part for k, values in given.items() for part in (f"--{k}", *values))]
                if (flag, word) not in PATIENT:
                    yield f"ticketlab {name} --{flag} {word!r}", lambda argv=argv: console.main(argv)


def _names(config: Any, whole: bool) -> Iterator[str]:
    for f in fields(config):
        value = getattr(config, f.name)
        if not is_dataclass(value):
            yield f.name
        elif whole:
            yield from _names(value, whole)


@cache
def _world() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=draw), torch.arange(12) % 3
    model = tl.initialise(lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)), 0)
    task = tl.Task.from_tensors(x, y, validation_size=2, test_size=2)
    masks, state = tl.masks.ones(model), tl.state(model)
    k = tl.ntk.kernel(model, state, x, outputs="trace")
    return {"x": x, "y": y, "model": model, "task": task, "masks": masks, "state": state, "k": k}


def calls() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Public functions with arguments that they take."""
    w = _world()
    model, state, x, y, task, masks, k = (w[n] for n in ("model", "state", "x", "y", "task", "masks", "k"))
    net = {"model": model, "state": state, "masks": masks}
    weights = {name: state.params[name] for name in masks}
    b, paid = tl.bounds, {"train_error": 0.25, "n": 100, "delta": 0.05, "n_classes": 10}
    groups = tl.permutation.groups(model, x)
    curve = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).numpy()
    targets = torch.eye(3)[y]
    return {
        "apply": (tl.apply, {**net, "x": x}),
        "evaluate": (tl.evaluate, {**net, "x": x, "y": y, "batch_size": 5}),
        "preset": (tl.preset, {"name": "mnist_lenet_300_100", "small": True}),
        "load_task": (tl.load_task, {"name": "digits", "validation_size": 10, "split_seed": 0, "device": "cpu"}),
        "load_run": (tl.load_run, {"folder": "nowhere", "device": "cpu"}),
        "runs": (tl.runs, {"store": "nowhere"}),
        "verify": (tl.verify, {"folder": "nowhere"}),
        "load_shards": (tl.load_shards, {"folder": "nowhere", "validation_size": 0.1}),
        "models.build": (_built, {"name": "mlp_100_50", "input_shape": (1, 8, 8), "n_classes": 10}),
        "Task.from_tensors": (
            tl.Task.from_tensors,
            {"x": x, "y": y, "validation_size": 2, "test_size": 2, "split_seed": 0, "n_classes": 3, "name": "t"},
        ),
        "Recipe": (tl.Recipe, {f.name: f.default for f in fields(tl.Recipe)}),
        "ImpConfig": (tl.ImpConfig, {f.name: getattr(tl.ImpConfig(), f.name) for f in fields(tl.ImpConfig)}),
        "masks.prunable": (tl.masks.prunable, {"model": model, "names": ("0.weight",)}),
        "masks.kept": (tl.masks.kept, {"masks": masks}),
        "masks.density": (tl.masks.density, {"masks": masks}),
        "masks.n_removed": (tl.masks.n_removed, {"alive": 10, "fraction": 0.2}),
        "masks.prune": (tl.masks.prune, {"masks": masks, "scores": weights, "fractions": 0.5}),
        "masks.top": (tl.masks.top, {"scores": x[0], "among": x[0] > -9, "n": 3}),
        "masks.random_mask": (tl.masks.random_mask, {"masks": masks, "seed": 0}),
        "masks.layerwise_shuffle": (tl.masks.layerwise_shuffle, {"masks": masks, "seed": 0}),
        "masks.validate": (tl.masks.validate, {"model": model, "masks": masks}),
        "bounds.mdl": (b.mdl, {**paid, "kept": 5, "total": 10}),
        "bounds.occam_hoeffding": (b.occam_hoeffding, {**paid, "description_nats": 5.0}),
        "bounds.occam_kl": (b.occam_kl, {**paid, "description_nats": 5.0}),
        "bounds.binomial_tail": (b.binomial_tail, {**paid, "description_nats": 5.0}),
        "bounds.pac_bayes_kl": (b.pac_bayes_kl, {**paid, "kl_nats": 5.0}),
        "bounds.pac_bayes_catoni": (b.pac_bayes_catoni, {**paid, "kl_nats": 5.0, "betas": (1.0, 2.0)}),
        "bounds.held_out": (b.held_out, {"test_error": 0.1, "n_test": 100, "delta": 0.05, "method": "binomial"}),
        "bounds.pick_to_learn": (b.pick_to_learn, {"n_compressed": 5, "n": 100, "delta": 0.05}),
        "bounds.binary_kl": (b.binary_kl, {"q": 0.1, "p": 0.2}),
        "bounds.kl_inverse": (b.kl_inverse, {"q": 0.1, "c": 0.2}),
        "bounds.subset_nats": (b.subset_nats, {"kept": 5, "total": 10}),
        "bounds.bounded_cross_entropy": (b.bounded_cross_entropy, {"logits": targets, "y": y, "mixing": 0.1}),
        "bounds.description_length": (b.description_length, {"masks": masks, "params": weights, "values": "coded"}),
        "bounds.quantise": (b.quantise, {"params": weights, "masks": masks, "n_values": 4}),
        "connectivity.barrier": (tl.connectivity.barrier, {"curve": curve, "baseline": "mean"}),
        "connectivity.rise": (tl.connectivity.rise, {"curve": curve}),
        "connectivity.linear_path": (
            tl.connectivity.linear_path,
            {"model": model, "state_a": state, "state_b": state, "task": task, "masks": masks, "n_alphas": 3},
        ),
        "curvature.trace": (tl.curvature.trace, {**net, "task": task, "n_probes": 2, "batch_size": 5}),
        "curvature.top_eigenvalues": (tl.curvature.top_eigenvalues, {**net, "task": task, "k": 1}),
        "gradients.gradient": (tl.gradients.gradient, {**net, "x": x, "y": y, "batch_size": 5}),
        "gradients.alignment": (tl.gradients.alignment, {**net, "x": x, "y": y}),
        "gradients.one_step": (tl.gradients.one_step, {**net, "x": x, "y": y, "learning_rate": 0.1}),
        "gradients.batch_statistics": (tl.gradients.batch_statistics, {**net, "x": x, "y": y, "batch_size": 4}),
        "gradients.ntk_overlap": (tl.gradients.ntk_overlap, {**net, "x": x, "y": y, "top": 2}),
        "ntk.kernel": (tl.ntk.kernel, {"model": model, "state": state, "x1": x, "x2": x, "masks": masks}),
        "ntk.spectrum": (tl.ntk.spectrum, {"source": k, "top": 3}),
        "ntk.operator": (tl.ntk.operator, {**net, "x": x}),
        "ntk.alignment": (tl.ntk.alignment, {"k_a": k, "k_b": k, "centered": True}),
        "ntk.drift": (tl.ntk.drift, {"k_start": k, "k_end": k}),
        "ntk.target_alignment": (tl.ntk.target_alignment, {"k": k, "y": y}),
        "ntk.kernel_regression": (
            tl.ntk.kernel_regression,
            {"k_train": k, "y_train": targets, "k_test": k, "ridge": 0.1},
        ),
        "ntk.gradient_flow_prediction": (
            tl.ntk.gradient_flow_prediction,
            {"k_train": k, "y_train": targets, "k_test": k, "time": 1.0},
        ),
        "overlap.compare": (tl.overlap.compare, {"masks_a": masks, "masks_b": masks, "given": "layer"}),
        "overlap.survival": (tl.overlap.survival, {"levels": [masks, masks]}),
        "overlap.input_map": (tl.overlap.input_map, {"mask": masks["0.weight"], "input_shape": (1, 2, 2)}),
        "permutation.groups": (tl.permutation.groups, {"model": model, "x": x}),
        "permutation.align": (
            tl.permutation.align,
            {"model": model, "x": x, "params_a": state, "params_b": state, "restarts": 1, "seed": 0},
        ),
        "permutation.random": (tl.permutation.random, {"groups": groups, "seed": 0}),
        "signal.q_map": (tl.signal.q_map, {"activation": "tanh", "q": 1.0, "sigma_w2": 1.0, "sigma_b2": 0.1}),
        "signal.chi": (tl.signal.chi, {"activation": "tanh", "q": 1.0, "sigma_w2": 1.0, "c": 0.5}),
        "signal.mean_field": (tl.signal.mean_field, {"activation": "tanh", "sigma_w2": 1.0, "sigma_b2": 0.1}),
        "signal.fuss_catalan": (tl.signal.fuss_catalan, {"n_factors": 2, "order": 3}),
        "signal.layer_statistics": (tl.signal.layer_statistics, {**net, "x": x, "y": y}),
        "signal.jacobian_singular_values": (tl.signal.jacobian_singular_values, {**net, "x": x}),
        "signal.largest_singular_values": (tl.signal.largest_singular_values, {**net, "x": x, "n_values": 1}),
        "signal.jacobian_moments": (tl.signal.jacobian_moments, {**net, "x": x, "n_moments": 2, "n_probes": 2}),
    }


def _built(name: str, input_shape: Any, n_classes: Any) -> torch.nn.Module:
    return tl.initialise(lambda: tl.models.build(name, input_shape, n_classes), 0)


def arguments() -> Iterator[Case]:
    """Each argument of `calls` in turn, of every kind that it is not."""
    for name, (function, good) in calls().items():
        yield f"tl.{name}()", lambda f=function, g=good: f(**g)
        for argument, value in good.items():
            for what, wrong in _wrong(value).items():
                given = {**good, argument: wrong}
                yield f"tl.{name}({argument}={what})", lambda f=function, g=given: f(**g)


def _wrong(value: Any) -> dict[str, Any]:
    bad: dict[str, Any] = {"None": None, "''": "", "'x'": "x", "nan": math.nan, "-1": -1, "[]": [], "{}": {}}
    bad |= {"1e12": 10**12, "inf": math.inf, "object()": object(), "b'x'": b"x"}
    if isinstance(value, torch.Tensor):
        bad |= {"empty": value[:0], "meta": value.to("meta"), "complex": value.to(torch.complex64)}
        bad |= {"1d more": value[None, None], "nan inside": torch.full_like(value.double(), math.nan)}
    if isinstance(value, Mapping) and value:
        one = next(iter(value))
        bad |= {"one missing": {k: v for k, v in value.items() if k != one}, "one None": {**value, one: None}}
        bad |= {"one empty": {**value, one: torch.zeros(0)}, "one more": {**value, "more": torch.ones(2)}}
    return bad
