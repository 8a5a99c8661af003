"""Presets: the papers' numbers, small variants that run, and the command line that begins with one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import ticketlab as tl
from analyses import imp, presets, transfer, width_sweep
from analyses.command import main
from ticketlab import models
from ticketlab.console import questions
from ticketlab.seeds import initialise

PRESETS = tl.presets.PRESETS
SHAPES = {"mnist": (1, 28, 28), "digits": (1, 8, 8), "cifar10": (3, 32, 32)}


def work(config):
    """Steps of all trainings."""
    rest = config.recipe.steps - config.rewind_step
    return len(config.init_seeds) * (config.recipe.steps + config.levels * len(config.treatments) * rest)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_study_and_a_small_one(name):
    one = PRESETS[name]
    assert tl.preset(name) is one.config and tl.preset(name, small=True) is one.small
    for config in (one.config, one.small):
        assert callable(models.maker(config.model))
    assert 20 * work(one.small) < work(one.config)
    assert work(one.small) < 100_000
    assert len(one.small.init_seeds) >= 2
    assert one.paper and "Differs" in one.source + " Differs" and one.shortened


def test_numbers_of_the_papers():
    lenet, conv, resnet, vgg, large, bert = (
        PRESETS[n].config
        for n in ("mnist_lenet_300_100", "cifar_conv_6", "cifar_resnet_20", "cifar_vgg_16", "imagenet_resnet_50",
                  "bert_finetune")
    )  # fmt: skip
    assert (lenet.recipe.steps, lenet.recipe.learning_rate, lenet.recipe.batch_size) == (50_000, 1.2e-3, 60)
    assert (conv.recipe.steps, conv.recipe.learning_rate, conv.conv_fraction) == (30_000, 3e-4, 0.15)
    rates = [resnet.recipe.learning_rate_at(step) for step in (0, 31_999, 32_000, 47_999, 48_000, 62_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert vgg.recipe == resnet.recipe
    assert large.recipe.steps / 90 == 1252 == -(-1_281_167 // 1024)
    assert large.recipe.learning_rate_at(6_259) == pytest.approx(0.4)
    assert large.recipe.learning_rate_at(80 * 1252) == pytest.approx(4e-4)
    assert bert.recipe.steps == 3 * (392_702 // 32)
    assert bert.recipe.learning_rate_at(0) == 2e-5 and bert.recipe.learning_rate_at(36_812) < 1e-9
    assert [config.rewind_step for config in (lenet, conv, resnet, vgg, bert)] == [0, 0, 500, 1_000, 0]


@pytest.mark.parametrize(("name", "parameters"), [("resnet_8_w8", 19_954), ("vgg_16_w8", 231_746)])
def test_small_networks_have_as_many_parameters_as_they_say(name, parameters):
    model = initialise(partial(models.build, name, (3, 32, 32), 10), 0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert any(f"({parameters:,} parameters)" in one.shortened for one in PRESETS.values() if one.small.model == name)


def test_bert_is_pruned_below_its_head():
    pytest.importorskip("transformers")
    model = initialise(partial(models.build, "bert_tiny_w8_h2_v11", (5,), 3), 0)
    assert tl.masks.prunable(model, PRESETS["bert_finetune"].config.prunable) == models.bert.prunable(model)


def noise(config):
    """Random examples in the shape of the config's task."""
    n, generator = 24, torch.Generator().manual_seed(0)
    shape = SHAPES.get(config.task, (128,))
    x = torch.randn(n, *shape, generator=generator) if len(shape) == 3 else torch.randint(256, (n, *shape))
    return tl.Task.from_tensors(x, torch.arange(n) % 8, name=config.task, validation_size=4, test_size=4)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("cifar_conv_4", "cifar_conv_6")])
def test_small_variants_run(name):
    config = PRESETS[name].small
    schedule = {"milestones": (2,)} if config.recipe.milestones else {}
    recipe = replace(
        config.recipe, steps=4, batch_size=8, eval_every=2, warmup_steps=min(1, config.recipe.warmup_steps), **schedule
    )
    rewind = min(1, config.rewind_step)
    tiny = replace(
        config,
        recipe=recipe,
        levels=1,
        init_seeds=(0,),
        treatments=("ticket",),
        rewind_step=rewind,
        validation_size=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = noise(tiny)
    levels = list(tl.imp(tiny, task=task, store=None, device="cpu", progress=False))
    assert len(levels) == 2
    assert levels[1].metrics["diverged_step"].isna().all()
    assert levels[1].density < 1


def test_an_unknown_preset_comes_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'resnet_20'. Did you mean 'cifar_resnet_20'\?"):
        tl.preset("resnet_20")


# The command line.


def test_flags_change_what_a_preset_says():
    default, rest = presets.taken_off(imp.Config, ["--preset", "cifar_conv_2", "--steps", "9", "--small"])
    assert default.study == tl.preset("cifar_conv_2", small=True)
    assert rest == ["--steps", "9"]
    study = imp.Config().study
    assert study.snapshot_steps == (25, 50, 100, 200, 400)
    for steps, kept in ((99, (25, 50)), (9, ())):  # no snapshot lies beyond the end
        default, rest = presets.taken_off(imp.Config, ["--steps", str(steps)])
        assert default.study == replace(study, snapshot_steps=kept) and rest == ["--steps", str(steps)]


def test_an_analysis_keeps_the_treatments_that_it_compares():
    study = presets.taken_off(transfer.Config, ["--preset=cifar_vgg_16"])[0].study
    assert study == replace(tl.preset("cifar_vgg_16"), treatments=("ticket",))


def test_a_preset_runs_from_the_command_line(tmp_path, capsys):
    argv = ["--preset", "mnist_lenet_300_100", "--small", "--task", "digits", "--validation-size", "100"]
    argv += ["--steps", "4", "--levels", "1", "--init-seeds", "0", "--treatments", "ticket"]
    argv += ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "runs"), "--device", "cpu"]
    assert main("imp", imp.Config, imp.run, imp.draw, imp.summary, argv) == 0
    (run,) = (tmp_path / "runs").iterdir()
    stored = tl.load_run(run).config
    assert stored == replace(
        tl.preset("mnist_lenet_300_100", small=True),
        task="digits",
        validation_size=100,
        levels=1,
        init_seeds=(0,),
        treatments=("ticket",),
        recipe=replace(tl.preset("mnist_lenet_300_100").recipe, steps=4),
    )
    assert "digits-lenet_300_100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "argv", "match"),
    [
        (imp.Config, ["--preset", "lenet"], "unknown preset 'lenet'. Did you mean"),
        (imp.Config, ["--small"], "--small belongs to --preset"),
        (imp.Config, ["--preset"], "--preset must be followed by one of mnist_lenet_300_100"),
        (width_sweep.Config, ["--preset", "vit_cifar"], "this analysis has none"),
    ],
)
def test_presets_that_cannot_be_are_refused(config, argv, match):
    with pytest.raises(ValueError, match=match):
        presets.taken_off(config, argv)


def test_presets_list_themselves():
    lines = presets.described().splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[4].endswith("resnet_20 on cifar10: Frankle et al. (2020)")
    assert "presets" not in questions()
