"""Tickets of transformers, end to end: a pretrained text model, a ViT, one that nobody here wrote."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch

import ticketlab as tl
from analyses import transformer_tickets as analysis
from analyses.command import main
from analyses.transformer_tickets import CARRIED, STUDY, Config, run
from ticketlab.errors import Refused

pytest.importorskip("transformers", reason="the models extra is not installed")

RECIPE = tl.Recipe(steps=6, eval_every=3, batch_size=10, learning_rate=1e-3)
TEXT = replace(
    STUDY,
    task="own_network:passages",
    model="decoder_tiny_pooled_d1_w16_h2",
    levels=1,
    treatments=("ticket", "sibling", "reinit"),
    recipe=RECIPE,
)
SHOWN = {"n_alphas": 3, "n_shown": 20, "n_kernel": 1, "device": "cpu", "pretrain_steps": 8}
PRETRAINED = {"pretrain_task": "own_network:next_bytes", "pretrain_model": "decoder_tiny_d1_w16_h2"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    config = Config(store=folder, out=folder / "out", study=TEXT, **SHOWN, **PRETRAINED)
    return config, run(config)


def stored(config, model):
    """The runs of a model in the store, the one of fewest levels first."""
    folders = [f for f in config.store.iterdir() if f"-{model}-" in f.name]
    return sorted((tl.load_run(folder) for folder in folders), key=len)


def test_a_pretrained_text_model_goes_through(text):
    _, tables = text
    assert tables["networks"].groupby("arm").size().to_dict() == {"random": 8, "pretrained": 8, "source": 4}
    heads = tables["heads"].set_index(["arm", "level", "treatment", "init_seed", "head"])
    assert len(heads) == 2 * (6 + 6 + 4)  # 2 heads; siblings start as their tickets
    parts = tables["projections"].groupby(list(heads.index.names))[["kept", "prunable"]].sum()
    assert heads["density"].to_dict() == pytest.approx((parts["kept"] / parts["prunable"]).to_dict())
    measures = tables["measures"].groupby(["arm", "level"]).size().to_dict()
    assert measures == {("random", 0): 2, ("random", 1): 4, ("pretrained", 0): 2, ("pretrained", 1): 4}
    assert tables["measures"][["ntk_trace", "jacobian_mean_squared"]].gt(0).all(axis=None)
    found = tables["barriers"].groupby(["arm", "question"]).size().to_dict()
    lines = {("random", "init seeds"): 2, ("random", "init seeds, matched"): 2}
    assert found == lines | {("random", "siblings"): 2, ("pretrained", "siblings"): 2}
    transfer = tables["transfer"]
    assert transfer.groupby(["target", "mask"]).size().to_dict() == dict.fromkeys(
        product(transfer["target"].unique(), CARRIED), 2
    )
    assert transfer["kept"].nunique() == 1 and transfer["target"].nunique() == 2
    assert {"dead_heads_%", "blind_heads_%", "ticket"} <= set(analysis.summary(tables))
    assert len(analysis.draw(tables).axes) == 4


def test_pretrained_arms_start_from_the_pretrained_body(text):
    config, _ = text
    learned, source = stored(config, "decoder_tiny_d1_w16_h2")
    end = learned[0].select(init_seed=0).end.params
    random, pretrained = stored(config, "decoder_tiny_pooled_d1_w16_h2")
    if torch.equal(random[0].start.params["norm.weight"][0], end["norm.weight"]):
        random, pretrained = pretrained, random
    for name, value in end.items():
        for seed in (0, 1):
            own = pretrained[0].select(init_seed=seed).start.params[name]
            fresh = random[0].select(init_seed=seed).start.params[name]
            if name.startswith("output"):  # fresh, of another shape
                assert own.shape != value.shape and torch.equal(own, random[0].select(init_seed=0).start.params[name])
            else:
                assert torch.equal(own, value)
                assert value.std() == 0 or not torch.equal(fresh, value)
            assert torch.equal(source[0].select(init_seed=seed).start.params[name], value)
    assert not any("output" in name or "norm" in name or "embedding" in name for name in pretrained[1].masks)


def test_a_second_run_reads_the_first(text, monkeypatch):
    config, tables = text
    counted = []
    monkeypatch.setattr(tl, "train", lambda *a, train=tl.train, **k: (counted.append(len(a[1])), train(*a, **k))[1])
    again = run(config)
    assert counted == [10] * 2  # masks on either task; nothing of the arms
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again[name], table)


def test_masks_on_pretrained_weights_by_plain_pytorch():
    model = tl.initialise(lambda: tl.models.build("decoder_tiny_pooled_d1_w16_h2", (8,), 3), 0)
    names = tl.masks.prunable(model, ("blocks.*",))
    generator = torch.Generator().manual_seed(0)
    own, carried = (
        {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.3 for n in names} for _ in range(2)
    )
    found = analysis._masks(tl.state(model), own, carried, 3, 1)
    assert tuple(found) == CARRIED and found["ticket"] is own and found["other_task"] is carried
    shuffled = found["layerwise_shuffle"]
    assert all(shuffled[n].sum() == m.sum() and not torch.equal(shuffled[n], m) for n, m in carried.items())
    kept = int(sum(m.sum() for m in own.values()))
    flat = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in names])
    threshold = flat.sort(descending=True).values[kept - 1]
    for n in names:
        assert torch.equal(found["one_shot"][n], model.get_parameter(n).abs() >= threshold)
    assert int(sum(m.sum() for m in found["random_erk"].values())) == kept


def test_a_vit_that_nobody_here_wrote_without_pretraining(tmp_path, capsys):
    argv = ["--pretrain-task", "None", "--task", "own_network:task", "--model", "own_network:attentive"]
    argv += ["--prunable", "*attention*", "*mlp*", "--levels", "1", "--steps", "4"]
    argv += ["--eval-every", "2", "--warmup-steps", "0", "--batch-size", "30", "--n-alphas", "3", "--n-kernel", "2"]
    argv += ["--n-shown", "20", "--device", "cpu", "--out", str(tmp_path / "out"), "--store", str(tmp_path / "runs")]
    code = main("transformer_tickets", Config, run, analysis.draw, analysis.summary, argv)
    assert code == 0, capsys.readouterr().err
    (out,) = (tmp_path / "out" / "transformer_tickets").iterdir()
    assert not (out / "transfer.csv").exists() and (out / "transformer_tickets.png").exists()
    heads = pd.read_csv(out / "heads.csv")
    assert heads["layer"].nunique() == 2 and heads["head"].nunique() == 2


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    for flags, match in (
        ({"study": replace(TEXT, task="digits", model="mlp_100_50", prunable=())}, "attention of two heads or more"),
        (
            {"study": TEXT, **PRETRAINED, "pretrain_model": "decoder_tiny_d2_w16_h2"},
            "weights must be one network's state",
        ),
        ({"study": TEXT, **PRETRAINED, "at_levels": (5,)}, r"levels must lie in 1\.\.1"),
        ({"study": TEXT, "pretrain_task": "digits:0-99"}, "class"),
    ):
        with pytest.raises(Refused, match=match):
            run(Config(store=tmp_path, out=tmp_path, **SHOWN, **flags))
    assert list(tmp_path.iterdir()) == []
