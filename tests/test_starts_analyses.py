"""The analyses of starts and of supermasks at tiny configs, and their figures from fixture tables."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_figures import ABOUT, texts

import ticketlab as tl
from analyses import sign_and_value, supermasks
from analyses.command import main
from analyses.intervals import holm, interval
from figures.style import save
from ticketlab.engine import values
from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.treatments import TREATMENTS

RECIPE = tl.Recipe(steps=40, eval_every=20)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run of two seeds, on disk."""
    config = tl.ImpConfig(
        prune_fraction=0.4, levels=2, init_seeds=(0, 4), recipe=RECIPE, treatments=sign_and_value.STARTS
    )
    store = tmp_path_factory.mktemp("runs")
    list(tl.imp(config, store=store, progress=False))
    return tl.run_folder(config, store)


def test_sign_and_value_tables_every_start_and_its_gaps(study, tmp_path, capsys):
    module, argv = sign_and_value, ["--run", str(study), "--out", str(tmp_path)]
    assert main("sign_and_value", module.Config, module.run, module.draw, module.summary, argv) == 0
    out = tmp_path / "sign_and_value" / study.name
    starts, gaps = (pd.read_csv(out / f"{name}.csv") for name in ("starts", "gaps"))
    assert starts[starts["level"] > 0].groupby(["level", "treatment"]).size().tolist() == [2] * 2 * len(module.STARTS)
    assert len(gaps) == 2 * len(module.STARTS) and (gaps["n"] == 2).all()
    errors = starts[starts["level"] == 2].set_index(["treatment", "init_seed"])["test_error"]
    difference = errors["reshuffle"] - errors["ticket"]
    row = gaps[(gaps["level"] == 2) & (gaps["treatment"] == "reshuffle")].iloc[0]
    assert row["error_above_ticket"] == pytest.approx(difference.mean(), abs=1e-7)
    assert row["error_above_ticket_sd"] == pytest.approx(difference.std(), abs=1e-7)
    expected = interval(difference)
    assert row["error_above_ticket_high"] == pytest.approx(expected["high"], abs=1e-6)
    assert row["error_above_ticket_p_value"] == pytest.approx(expected["p_value"], abs=1e-6)
    np.testing.assert_allclose(gaps["error_above_ticket_p_holm"], holm(gaps["error_above_ticket_p_value"]), atol=1e-6)
    own = gaps[gaps["treatment"] == "ticket"]
    assert (own["error_above_ticket"] == 0).all() and (own["error_above_ticket_sd"] == 0).all()
    printed = capsys.readouterr().out
    assert "above_points" in printed and "p_unadjusted" in printed
    rows = [line for line in printed.splitlines() if line.startswith("reinit ") and " ticket " in line]
    assert any(line.endswith(f" of {gaps['error_above_ticket_p_value'].count()}") for line in rows)  # wide tables go on


def test_a_difference_counts_the_pairs_in_which_neither_diverged():
    errors = {("ticket", 0): np.nan, ("ticket", 1): 0.1, ("ticket", 2): 0.2, ("reinit", 2): np.nan}
    rows = [
        {"level": 1, "density": 0.5, "treatment": t, "init_seed": s, "test_error": errors.get((t, s), 0.3)}
        for t, s in itertools.product(("ticket", "reinit", "reshuffle"), range(3))
    ]
    gaps = sign_and_value.gaps(pd.DataFrame(rows)).set_index("treatment")
    assert gaps["n"].to_dict() == {"ticket": 2, "reinit": 2, "reshuffle": 3}
    assert gaps["error_above_ticket_n"].to_dict() == {"ticket": 2, "reinit": 1, "reshuffle": 2}
    assert gaps["error_above_reinit_n"].to_dict() == {"ticket": 1, "reinit": 2, "reshuffle": 2}
    assert gaps.loc["reshuffle", "error_above_ticket"] == pytest.approx(0.15)


def test_going_on_at_the_only_rate_there_is_is_fine_tuning():
    treatments = ("ticket", "lr_rewind", "fine_tune")
    config = replace(sign_and_value.STUDY, levels=1, init_seeds=(0,), recipe=RECIPE, treatments=treatments)
    _, level = tl.imp(config, store=None, progress=False)
    one, other = (level.select(treatment=t, init_seed=0).theta_end for t in treatments[1:])
    assert config.recipe.schedule == "constant" and all(torch.equal(p, other[n]) for n, p in one.items())
    assert not {"lr_rewind", "fine_tune"} & set(sign_and_value.STARTS)


def test_sign_and_value_needs_the_control_that_it_compares_with(tmp_path):
    config = replace(sign_and_value.STUDY, treatments=("ticket", "reshuffle"), levels=1, recipe=RECIPE)
    with pytest.raises(ValueError, match="treatments must contain 'reinit'"):
        sign_and_value.run(sign_and_value.Config(study=config, store=tmp_path))


def supermask_config(study, **options):
    small = {"densities": (0.6, 0.3), "criteria": ("large_final_same_sign", "random"), "draws": 2, "learned_steps": 20}
    return supermasks.Config(
        run=(study,), out=study.parent / "out", **{**small, "learned_densities": (0.4,), "learned_seeds": 1, **options}
    )


def test_untrained_supermasks_are_the_networks_that_they_say(study):
    table = supermasks.run(supermask_config(study, learned_steps=0))["untrained"]
    assert len(table) == 2 * (2 * 2 + 2) * len(supermasks.VALUES)  # seeds, (criteria x densities + tickets), values
    run = tl.load_run(study)
    model, task = tl.model_and_task(run.config)
    # the article's: an IMP mask on randomly signed initial magnitudes
    ticket, dense = run[2].select(treatment="ticket", init_seed=4), run[0].select(init_seed=4)
    params = values.random_signs(dense.theta_start, ticket.masks, 4)
    loss, error = tl.evaluate(model, params, task.test.x, task.test.y, masks=ticket.masks)
    rows = table[(table["criterion"] == "imp") & (table["values"] == "random_sign") & (table["init_seed"] == 4)]
    row = rows[rows["target_density"] == run[2].density].iloc[0]
    assert row["loss_nats"] == pytest.approx(float(loss)) and row["error"] == pytest.approx(float(error))
    # large final, same sign, on signed constants, spelled out
    masks = {}
    for name, end in {n: dense.theta_end[n] for n in ticket.masks}.items():
        share = 0.3 if name != "output.weight" else 0.3 ** (np.log(0.9) / np.log(0.8))
        same = (dense.theta_start[name].sign() == end.sign()).flatten()
        order = torch.argsort(torch.where(same, end.abs().flatten(), -1.0), descending=True)
        masks[name] = torch.zeros(end.numel(), dtype=torch.bool)
        masks[name][order[: int(share * end.numel() + 0.5)]] = True
        masks[name] = masks[name].view_as(end)
    params = values.signed_constants(dense.theta_start, masks)
    _, error = tl.evaluate(model, params, task.test.x, task.test.y, masks=masks)
    keys = {"criterion": "large_final_same_sign", "values": "signed_constant", "init_seed": 4, "target_density": 0.3}
    row = table[(table[list(keys)] == pd.Series(keys)).all(axis=1)].iloc[0]
    assert row["error"] == pytest.approx(float(error)) and row["density"] == float(tl.masks.density(masks))


def test_supermasks_are_of_the_initialisation_where_tickets_rewind_to_a_later_step(tmp_path):
    config = tl.ImpConfig(
        prune_fraction=0.4, treatments=("ticket",), levels=1, init_seeds=(0,), recipe=RECIPE, rewind_step=30
    )
    flags = {"criteria": ("snip", "movement"), "densities": (0.3,), "values": ("init",), "learned_values": ("init",)}
    options = {**flags, "learned_densities": (), "learned_seeds": 1, "draws": 1, "learned_steps": 20}
    run_config = supermasks.Config(store=tmp_path, out=tmp_path, study=config, device="cpu", **options)
    tables = supermasks.run(run_config)
    dense = next(iter(tl.load_run(tl.run_folder(config, tmp_path)))).select(init_seed=0)
    model, task = tl.model_and_task(config, device="cpu")
    first = dense.snapshots[0]
    assert not torch.equal(first.params["fc1.weight"], dense.start.params["fc1.weight"])
    output = tl.masks.prunable(model)[-1]
    goal = {n: 0.3 ** (supermasks.OUTPUT_EXPONENT if n == output else 1) for n in dense.masks}
    x, y = tl.criteria.draw_examples(task, config.score_examples, 0)
    evidence = tl.criteria.Evidence(model, dense.masks, first, dense.end, x, y)
    for criterion in ("snip", "movement"):
        masks = tl.criteria.find(criterion, evidence, goal)
        _, error = tl.evaluate(model, first.params, task.test.x, task.test.y, masks=masks)
        assert tables["untrained"].query("criterion == @criterion")["error"].item() == pytest.approx(float(error))
    problem = supermasks.Problem(run_config, config, model, task, dense=tl.load_run(tl.run_folder(config, tmp_path))[0])
    assert torch.equal(problem.starts("init", (0,)).params["fc1.weight"][0], first.params["fc1.weight"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"criteria": ("magnitud",)}, r"unknown criterion 'magnitud'\. Did you mean 'magnitude'"),
        ({"values": ()}, "values must name at least one"),
        ({"densities": (0.0,)}, r"densities must lie in \(0, 1\]: got \(0\.0,\)"),
        ({"learned_densities": (2.0,)}, r"learned_densities must lie in \(0, 1\): got \(2\.0,\)"),
        ({"learned_seeds": 0}, "learned_seeds must be at least 1: got 0"),
        ({"learned_steps": -1}, "learned_steps must be at least 0: got -1"),
        ({"draws": 0}, "draws must be at least 1: got 0"),
        ({"draws": 10**12}, "draws must be at most 100,000"),
    ],
)
def test_supermask_flags_that_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        supermasks.Config(**change)


def test_supermasks_by_a_criterion_that_is_too_dear_are_refused_before_training(tmp_path):
    study = tl.ImpConfig(model="lenet_300_100")
    with pytest.raises(ValueError, match="'obd_exact' needs at most"):
        supermasks.run(supermasks.Config(store=tmp_path, out=tmp_path, study=study, criteria=("obd_exact",)))
    assert list(tmp_path.iterdir()) == []


def test_learned_supermasks_write_tables_and_a_figure(study, tmp_path, capsys):
    flags = ["--criteria", "random", "--densities", "0.5", "--learned-steps", "20", "--draws", "2"]
    argv = ["--run", str(study), "--out", str(tmp_path), *flags, "--learned-densities", "0.4", "0.2"]
    module = supermasks
    assert main("supermasks", module.Config, module.run, module.draw, module.summary, argv) == 0
    (out,) = (tmp_path / "supermasks").iterdir()
    learned = pd.read_csv(out / "learned.csv")
    sizes = learned.groupby(["method", "values", "evaluation"]).size().to_dict()
    assert set(sizes.values()) == {2, 4} and sizes["bernoulli", "init", "sampled"] == 2 * 2
    popup = learned[learned["method"] == "edge_popup"]
    np.testing.assert_allclose(popup["density"], popup["target_density"], atol=1e-3)
    assert (out / "supermasks.png").exists()
    assert "signed_constant" in capsys.readouterr().out


def test_unknown_values_are_refused():
    with pytest.raises(ValueError, match=r"unknown values 'signed'\. Did you mean 'signed_constant'"):
        supermasks.Config(values=("signed",))


def test_the_default_criteria_and_starts_exist():
    assert set(supermasks.Config().criteria) <= set(CRITERIA) and set(sign_and_value.STARTS) <= set(TREATMENTS)


# Figures


def starts_table():
    rows = [
        {
            **{"level": level, "treatment": treatment, "init_seed": seed, "density": 0.5**level},
            **{"test_error": 0.02 * (1 + level) + 0.001 * seed, "first_step": 0, "steps": 40},
        }
        for level, treatment, seed in itertools.product(range(3), sign_and_value.STARTS, range(2))
        if level > 0 or treatment == "ticket"
    ]
    return {"starts": pd.DataFrame(rows).assign(**ABOUT)}


def supermask_tables():
    about = {**ABOUT, "dense_error": 0.03}
    untrained = [
        {
            **{"init_seed": seed, "criterion": criterion, "values": kind, "target_density": target},
            **{"density": target, "error": 1 - target},
        }
        for seed, criterion, kind, target in itertools.product(
            range(2), ("large_final_same_sign", "random", "imp"), supermasks.VALUES, (0.5, 0.2)
        )
    ]
    ways = [("bernoulli", 0.5, w, d) for w in ("deterministic", "expected", "sampled") for d in range(2)]
    ways += [("edge_popup", density, "deterministic", 0) for density in (0.5, 0.2)]
    learned = [
        {
            **{"init_seed": seed, "values": kind, "method": method, "target_density": target, "evaluation": way},
            **{"draw": draw, "density": target, "error": 0.05},
        }
        for seed, kind, (method, target, way, draw) in itertools.product(range(2), ("init", "signed_constant"), ways)
    ]
    return {"untrained": pd.DataFrame(untrained).assign(**about), "learned": pd.DataFrame(learned).assign(**about)}


def test_sign_and_value_says_n_and_shows_every_network():
    tables = starts_table()
    figure = sign_and_value.draw(tables)
    found = texts(figure)
    for text in ("n = 2", "40 steps", "at 25 % of the weights", "signs kept", "weights kept (%)", "(%)"):
        assert text in found
    shown = np.concatenate([line.get_xdata() for line in figure.axes[2].lines if line.get_linestyle() == "None"])
    last = tables["starts"].query("level == 2")
    assert sorted(np.round(shown, 9)) == sorted(np.round(100 * last["test_error"], 9))


def test_supermasks_says_n_and_what_is_learned():
    tables = supermask_tables()
    found = texts(supermasks.draw(tables))
    for text in ("n = 2 initialisations (2 learned)", "IMP tickets", "Bernoulli, sampled", "dense, trained: 3"):
        assert text in found
    assert "learned" not in texts(supermasks.draw({"untrained": tables["untrained"]})).replace("(learned)", "")


@pytest.mark.parametrize(
    "draw", [lambda: sign_and_value.draw(starts_table()), lambda: supermasks.draw(supermask_tables())]
)
def test_the_same_bytes_each_time(draw, tmp_path):
    first, second = ([p.read_bytes() for p in save(draw(), tmp_path / name)] for name in ("first", "second"))
    assert first == second
