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
    assert zeros.keys() == {"0.weight"} and torch.equal(zeros["0.weight"], found["0.weight"])
    for function in (tl.exchange.from_prune, tl.exchange.from_zeros):
        with pytest.raises(Refused, match="module must"):
            function(net())


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, bool])
def test_masks_of_other_frameworks(dtype):
    array = (np.arange(12).reshape(3, 4) % 3 == 0).astype(dtype)
    for name in ("0.weight", "0.weight_mask", "0.weight.mask"):
        masks = tl.exchange.from_arrays(net(), {name: array})
        assert masks["0.weight"].dtype == torch.bool and masks["0.weight"].tolist() == (array == 1).tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"0.weight": np.full((3, 4), 0.5)}, "zeros and ones"),
        ({"0.weight": np.ones((4, 3))}, r"\(4, 3\) is \(3, 4\)"),
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
