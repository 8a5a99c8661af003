"""Tickets in and out, against torch.nn.utils.prune and plain files; pictures from Python."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import ticketlab as tl
from tests.cases import blobs
from ticketlab.errors import Refused

CONFIG = tl.ImpConfig(
    levels=2, init_seeds=(0, 1), treatments=("ticket", "reinit"), recipe=tl.Recipe(steps=20, eval_every=10)
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    return folder, list(tl.imp(CONFIG, store=folder, device="cpu", progress=False))


@pytest.fixture
def one(store):
    return store[1][-1].select(treatment="ticket", init_seed=1)


X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return tl.initialise(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 0)


def test_masks_go_to_torch_prune_and_come_back(one):
    module = one.module(0)
    before = module(X)
    assert tl.exchange.to_prune(module, one.masks) is module
    torch.testing.assert_close(module(X), before)
    assert prune.is_pruned(module) and "fc1.weight_mask" in dict(module.named_buffers())
    found = tl.exchange.from_prune(module)
    assert found.keys() == one.masks.keys() and all(torch.equal(found[n], m) for n, m in one.masks.items())


def test_masks_of_a_module_that_torch_has_pruned():
    module = net()
    prune.l1_unstructured(module[0], "weight", amount=5)
    (name,) = (found := tl.exchange.from_prune(module))
    assert name == "0.weight" and int(found[name].sum()) == 7
    prune.remove(module[0], "weight")
    zeros = tl.exchange.from_zeros(module)
    assert torch.equal(zeros["0.weight"], found["0.weight"]) and bool(zeros["2.weight"].all())
    assert float(tl.masks.density(zeros)) == 13 / 18  # of all that is prunable, dense layers too
    for function in (tl.exchange.from_prune, tl.exchange.from_zeros):
        with pytest.raises(Refused, match="module must"):
            function(net())


def test_zeros_of_an_embedding_are_no_mask():
    module = tl.initialise(lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 8)), 0)
    module[1].weight.data[:, 0] = 0
    masks = tl.exchange.from_zeros(module)
    assert masks.keys() == {"1.weight"} and float(tl.masks.density(masks)) == 0.75
    assert tl.exchange.from_zeros(module, ["0.*"])["0.weight"].sum(1).tolist() == [0, 4, 4, 4, 4]


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, bool])
def test_masks_of_other_frameworks(dtype):
    array = (np.arange(12).reshape(3, 4) % 3 == 0).astype(dtype)
    for name in ("0.weight", "0.weight_mask", "0.weight.mask"):
        masks = tl.exchange.from_arrays(net(), {name: array})
        assert masks.keys() == {"0.weight"} and masks["0.weight"].dtype == torch.bool
        assert masks["0.weight"].tolist() == (array == 1).tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"0.weight": np.full((3, 4), 0.5)}, "zeros and ones"),
        ({"0.weight": np.ones((4, 3))}, r"\(4, 3\) is \(3, 4\). Transpose it"),
        ({"0.weight": np.ones((2, 3, 4))}, r"\(2, 3, 4\) is \(3, 4\).$"),
        ({}, "at least"),
        ({"first": np.ones((3, 4))}, "is not there: 0.weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arrays, words):
    with pytest.raises(Refused, match=words):
        tl.exchange.from_arrays(net(), arrays)


def test_a_folder_holds_the_ticket_and_says_what_it_is(one, tmp_path):
    folder = tl.exchange.save_folder(one, tmp_path / "hub", about={"task": "digits", "model": "mlp_100_50"})
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "masks.safetensors", "config.json", "README.md"}
    module, masks = tl.exchange.load_folder(folder, one.factory)
    assert torch.equal(module(X), one.module(0)(X)) and all(torch.equal(masks[n], m) for n, m in one.masks.items())
    plain = load_file(folder / "model.safetensors")
    assert bool((plain["fc1.weight"][~one.masks["fc1.weight"]] == 0).all())
    numbers = json.loads((folder / "config.json").read_text())
    assert numbers["density"] == pytest.approx(0.64, abs=1e-3) and numbers["init_seed"] == 1
    card = (folder / "README.md").read_text()
    assert "mlp_100_50 on digits" in card and f"{100 * numbers['test_error']:.2f} %" in card
    assert "Pruned weights are zero" in card


def test_a_folder_of_a_stored_study_says_how_it_was_made(store, tmp_path):
    (path,) = store[0].iterdir()
    run = tl.load_run(path)
    level = run[2].select(treatment="ticket", init_seed=0)
    with pytest.raises(Refused, match="architecture"):
        tl.exchange.save_folder(level, tmp_path / "hub", about=run.config)
    assert not (tmp_path / "hub").exists()
    model, _ = tl.model_and_task(run.config, device="cpu")
    folder = tl.exchange.save_folder(level, tmp_path / "hub", about=run.config, model=lambda: model)
    card = (folder / "README.md").read_text()
    for words in ("mlp_100_50 on digits", "64 %, level 2, ticket", "20 steps of adam at 0.0012", "rewind, k = 0"):
        assert words in card
    assert json.loads((folder / "config.json").read_text())["study"]["recipe"]["steps"] == 20


def test_a_folder_keeps_the_dtype_tied_weights_and_weights_that_pruning_froze(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.second(self.first(x).tanh()))

    task = blobs(n_classes=6)
    recipe = tl.Recipe(steps=4, eval_every=2, batch_size=30)
    config = tl.ImpConfig(
        levels=1, init_seeds=(0,), treatments=("ticket", "frozen_init"), recipe=recipe, dtype="float64"
    )
    level = list(tl.imp(config, model=Tied, task=task, store=None, device="cpu", progress=False))[-1]
    for treatment, words in (("ticket", "are zero"), ("frozen_init", "keep their values")):
        one = level.select(treatment=treatment)
        folder = tl.exchange.save_folder(one, tmp_path / treatment, about=config)
        module, _ = tl.exchange.load_folder(folder, Tied)
        assert torch.equal(module(task.test.x), one.module(0)(task.test.x))
        assert words in (folder / "README.md").read_text()
    (folder / "masks.safetensors").write_bytes(b"not whole")
    with pytest.raises(Refused, match="must hold model"):
        tl.exchange.load_folder(folder, Tied)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own export
def test_onnx_gives_the_same_outputs_for_any_batch(one, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx and onnxscript are not installed")
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    file = tl.exchange.to_onnx(one.module(0), X, tmp_path / "ticket.onnx")
    net = onnx.load(file)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in net.graph.initializer}
    assert np.array_equal(weights["fc1.weight"] != 0, one.masks["fc1.weight"].numpy())
    for x in (X, X[:1]):
        (y,) = ReferenceEvaluator(net).run(None, {net.graph.input[0].name: x.numpy()})
        np.testing.assert_allclose(y, one.module(0)(x).detach().numpy(), atol=1e-5)


def test_onnx_names_the_packages_that_it_lacks(one, tmp_path, monkeypatch):
    monkeypatch.setattr("ticketlab.engine.exchange.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install onnx onnxscript"):
        tl.exchange.to_onnx(one.module(0), X, tmp_path / "ticket.onnx")


def test_folders_refuse_a_stack_and_what_is_not_theirs(store, one, tmp_path):
    with pytest.raises(Refused, match="one network: got 4"):
        tl.exchange.save_folder(store[1][-1], tmp_path / "stack")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(Refused, match="new or empty"):
        tl.exchange.save_folder(one, tmp_path / "full")
    with pytest.raises(Refused, match="must hold model"):
        tl.exchange.load_folder(tmp_path / "full", one.factory)
    folder = tl.exchange.save_folder(one, tmp_path / "hub")
    with pytest.raises(Refused, match="of the architecture"):
        tl.exchange.load_folder(folder, net)


def test_pictures_of_a_run_a_line_and_spectra(store, one):
    folder, levels = store
    (run,) = (tl.load_run(path) for path in folder.iterdir())
    figure = tl.plot.imp(run)
    assert "MLP-100-50 on digits" in figure.get_suptitle() and len(figure.axes) == 2
    assert "own network on own data" in tl.plot.imp(levels).get_suptitle()
    (axes,) = tl.plot.masks(run).axes
    last = 100 * float(levels[-1].subset(treatment="ticket").masks["fc1.weight"].double().mean())
    (line,) = (line for line in axes.lines if line.get_label() == "fc1")
    assert line.get_ydata()[0] == pytest.approx(last) and line.get_ydata()[-1] == 100
    model, task = tl.model_and_task(CONFIG, device="cpu")
    both = levels[-1].subset(treatment="ticket")
    line = tl.connectivity.linear_path(model, both.start, both.end, task, masks=both.masks, n_alphas=3)
    shown = tl.plot.path(line).axes[1].lines
    means = 100 * line.table.query("split == 'train'").groupby("alpha")["error"].mean()
    assert any(np.allclose(drawn.get_ydata(), means) for drawn in shown)
    x = task.train.x[:6]
    kernel = tl.ntk.kernel(model, both.start, x, masks=both.masks)
    spectra = {"ticket": tl.ntk.spectrum(kernel)}
    (axes,) = tl.plot.spectrum(spectra).axes
    assert axes.get_legend().get_texts()[0].get_text() == "ticket" and len(axes.lines[0].get_xdata()) == 60
    (axes,) = tl.plot.spectrum(spectra["ticket"]).axes
    share = spectra["ticket"].eigenvalues[:, 0] / spectra["ticket"].trace
    assert axes.lines[0].get_ydata()[0] == pytest.approx(float(share.log().mean().exp()))


def test_matplotlib_is_imported_for_pictures_alone():
    code = "import sys, ticketlab as tl; assert 'matplotlib' not in sys.modules; assert tl.plot.imp"
    subprocess.run([sys.executable, "-c", code], check=True)
