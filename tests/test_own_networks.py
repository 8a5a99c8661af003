"""A model that nobody here wrote, and a task, by their names on the command line: through every analysis."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import ticketlab as tl
from analyses.command import main
from ticketlab.console import questions
from ticketlab.errors import Refused

pytest.importorskip("transformers", reason="the models extra is not installed")

STUDY = ["--levels", "1", "--prune-fraction", "0.5", "--steps", "12", "--eval-every", "6", "--batch-size", "30"]
STUDY += ["--init-seeds", "0", "1", "--model", "own_network:net", "--task", "own_network:task", "--device", "cpu"]
FLAGS = {
    "dynamic_sparsity": ["--update-every", "4"],
    "generalization_bounds": ["--n-values", "3"],
    "gradient_alignment": ["--n-examples", "60", "--n-batches", "6", "--n-kernel", "8", "--top", "3"],
    "imp": [],
    "instability": ["--rewind-steps", "0", "4", "--n-alphas", "3", "--curvature-examples", "20"],
    "mask_overlap": [],
    "mode_connectivity": ["--n-alphas", "3", "--snapshot-steps", "4"],
    "ntk_spectrum": ["--n-spectrum", "8", "--n-regression", "16"],
    "pruning_criteria": ["--methods", "random", "magnitude", "snip", "--replicas", "2", "--snapshot-steps", "4"],
    "sign_and_value": [],
    "signal_propagation": ["--n-inputs", "6"],
    "supermasks": ["--criteria", "random", "--densities", "0.5", "--learned-densities", "0.4", "--learned-steps", "10"],
    "transfer": [
        "--sources",
        "digits",
        "--targets",
        "digits",
        "--theta-k",
        "0",
        "--at-levels",
        "1",
        "--snapshot-steps",
        "4",
    ],
}


def test_every_analysis_of_runs_is_here():
    others = {"width_sweep", "transformer_tickets"}  # one has networks of its own, one is of networks with attention
    assert set(FLAGS) == set(questions()) - others


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.mark.parametrize("name", FLAGS)
def test_a_network_of_ones_own_goes_through(name, store, capsys):
    module = importlib.import_module(f"analyses.{name}")
    argv = [*STUDY, *FLAGS[name], "--out", str(store / "results"), "--store", str(store / "runs")]
    if name == "transfer":  # its words name sets
        argv[argv.index("own_network:task")] = "digits"
    draw = getattr(module, "draw", None) or importlib.import_module(f"figures.{name}").draw
    assert main(name, module.Config, module.run, draw, module.summary, argv) == 0, capsys.readouterr().err
    (out,) = (store / "results" / name).iterdir()
    assert (out / f"{name}.png").exists() and list(out.glob("*.csv"))
    assert json.loads((out / "config.json").read_text())["study"]["model"] == "own_network:net"


def test_a_run_of_ones_own_is_opened_again(store):
    config = tl.ImpConfig(
        model="own_network:net", task="own_network:task", levels=1, init_seeds=(0,), treatments=("ticket",),
        recipe=tl.Recipe(steps=4, eval_every=4, batch_size=30),
    )  # fmt: skip
    *_, last = tl.imp(config, store=store / "again", device="cpu", progress=False)
    (folder,) = (store / "again").iterdir()
    assert folder.name.startswith("own_network.task-own_network.net-")
    run = tl.load_run(folder)
    model, task = tl.model_and_task(run.config, device="cpu")
    found = tl.evaluate(model, run[1].end, task.test.x, task.test.y, masks=run[1].masks)
    assert float(found[1]) == pytest.approx(last.metrics["test_error"][0])
    assert torch.equal(run[1].end.params["inner.classifier.1.weight"], last.end.params["inner.classifier.1.weight"])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("own_network:nothing", "has no function 'nothing'"),
        ("own_network:not_callable", "has no function 'not_callable'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("own_network:wrong", "returns int"),
        ("own network:f", "must be package.module:function"),
        (":f", "must be package.module:function"),
    ],
)
def test_what_is_not_there_is_named(name, match):
    for make in (lambda: tl.models.build(name, (1, 8, 8), 10), lambda: tl.load_task(name)):
        with pytest.raises(Refused, match=match):
            make()


def test_a_task_of_ones_own_is_split_by_its_function():
    with pytest.raises(Refused, match="leave out validation_size and split_seed"):
        tl.load_task("own_network:task", validation_size=5)
