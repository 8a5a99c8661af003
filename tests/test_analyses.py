"""Every analysis at a tiny config, from the command line too: tables, files, and what bad input costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import ticketlab as tl
from analyses import command as command_module
from analyses import imp, mode_connectivity, ntk_spectrum, signal_propagation, transfer, width_sweep
from analyses.command import DIGITS, main, open_run, result_folder
from figures.__main__ import NAMES
from ticketlab.console import questions
from ticketlab.errors import Refused

ROOT = Path(__file__).parent.parent
TINY = ["--levels", "2", "--steps", "40", "--eval-every", "20", "--init-seeds", "0", "1"]


def command(module, tmp_path, *flags):
    names = {imp: "imp", mode_connectivity: "mode_connectivity", ntk_spectrum: "ntk_spectrum"}
    argv = [*TINY, "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results"), *flags]
    return main(names[module], module.Config, module.run, module.draw, module.summary, argv)


def test_imp_writes_its_table_config_and_figure(tmp_path, capsys):
    assert command(imp, tmp_path, "--treatments", "ticket", "reinit", "dense_restart") == 0
    (out,) = (tmp_path / "results" / "imp").iterdir()
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "imp.pdf", "imp.png", "levels.csv"]
    table = pd.read_csv(out / "levels.csv")
    assert len(table) == 2 + 2 * 6
    assert table["task"].unique().tolist() == ["digits"]
    assert json.loads((out / "config.json").read_text())["study"]["recipe"]["steps"] == 40
    printed = capsys.readouterr().out
    assert "Test error in percent" in printed and str(out / "imp.png") in printed


def test_mode_connectivity_makes_a_run_then_only_reads_it(tmp_path, capsys):
    flags = ("--snapshot-steps", "10", "--n-alphas", "5")
    assert command(mode_connectivity, tmp_path, *flags) == 0
    (out,) = (tmp_path / "results" / "mode_connectivity").iterdir()
    first = pd.read_csv(out / "barriers.csv")
    folder = next((tmp_path / "runs").iterdir())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    argv = ["--run", str(folder), "--out", str(tmp_path / "again"), "--n-alphas", "5"]
    module = mode_connectivity
    assert main("mode_connectivity", module.Config, module.run, module.draw, module.summary, argv) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    (again,) = (tmp_path / "again" / "mode_connectivity").iterdir()
    assert again.name.startswith(folder.name)
    pd.testing.assert_frame_equal(first, pd.read_csv(again / "barriers.csv"))
    described = json.loads((again / "config.json").read_text())
    assert described["study"]["recipe"]["steps"] == 40 and described["study"]["levels"] == 2
    # 2 questions at (level 0, k = 0), (level 0, k = 10), level 1 and level 2; 2 seeds, 2 splits, 2 metrics, 3 baselines
    assert len(first) == 2 * 4 * 2 * 2 * 2 * 3
    assert len(pd.read_csv(out / "paths.csv")) == 2 * 4 * 2 * 2 * 5
    assert "instability_%" in capsys.readouterr().out


def test_ends_of_the_lines_are_the_networks_of_the_run(tmp_path):
    study = tl.ImpConfig(treatments=("ticket", "sibling"), levels=1, recipe=tl.Recipe(steps=40, eval_every=20))
    config = mode_connectivity.Config(study=study, store=tmp_path, out=tmp_path, n_alphas=3)
    paths = mode_connectivity.run(config)["paths"]
    levels = list(tl.imp(study, store=tmp_path))
    ends = (
        ("theta_k to theta_T", 0, "ticket", 1.0),
        ("theta_k to theta_T", 1, "ticket", 1.0),
        ("siblings", 1, "ticket", 0.0),
        ("siblings", 1, "sibling", 1.0),
    )
    for question, level, treatment, alpha in ends:
        at_end = (paths["question"] == question) & (paths["level"] == level) & (paths["alpha"] == alpha)
        rows = paths[at_end & (paths["split"] == "test")]
        expected = levels[level].select(treatment=treatment).metrics
        np.testing.assert_allclose(rows["error"], expected["test_error"], atol=1e-12)
        np.testing.assert_allclose(rows["loss_nats"], expected["test_loss_nats"], rtol=1e-5)


def test_siblings_are_trained_where_the_run_has_none(tmp_path):
    recipe = tl.Recipe(steps=40, eval_every=20)
    with_siblings = tl.ImpConfig(treatments=("ticket", "sibling"), levels=1, snapshot_steps=(15,), recipe=recipe)
    without = replace(with_siblings, treatments=("ticket",))
    tables = [
        mode_connectivity.run(mode_connectivity.Config(study=study, store=tmp_path, out=tmp_path, n_alphas=3))["paths"]
        for study in (with_siblings, without)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)


def test_ntk_spectrum_measures_every_network_against_its_dense_kernel(tmp_path, capsys):
    flags = ("--n-spectrum", "6", "--n-regression", "30", "--treatments", "ticket", "reinit", "sibling")
    assert command(ntk_spectrum, tmp_path, *flags) == 0
    (out,) = (tmp_path / "results" / "ntk_spectrum").iterdir()
    kernels, spectra = pd.read_csv(out / "kernels.csv"), pd.read_csv(out / "spectra.csv")
    # levels 0 and 2; 2 seeds; a sibling starts as its ticket does
    assert kernels.groupby(["level", "treatment"]).size().to_dict() == {
        (0, "ticket"): 2,
        (2, "ticket"): 2,
        (2, "reinit"): 2,
    }
    dense = kernels[kernels["level"] == 0]
    np.testing.assert_allclose(dense["alignment_with_dense"], 1, atol=1e-12)
    np.testing.assert_allclose(dense["log_spectral_distance"], 0, atol=1e-9)
    assert (kernels[kernels["level"] == 2]["alignment_with_dense"] < 1).all()
    ranks = spectra.groupby(["level", "treatment", "init_seed"])["rank"].agg(["min", "max"])
    assert len(ranks) == 6 and (ranks["min"] == 1).all() and (ranks["max"] == 60).all()
    names = ["level", "treatment", "init_seed"]
    traces = spectra[names].merge(kernels[[*names, "trace"]], on=names)["trace"]
    np.testing.assert_allclose(spectra["eigenvalue"], spectra["share_of_trace"] * traces, rtol=1e-6, atol=1e-9)
    drift = pd.read_csv(out / "drift.csv")
    last = drift[(drift["from_step"] == 0) & (drift["to_step"] == drift["to_step"].max())]
    np.testing.assert_allclose(last["relative_change"], dense["relative_change"], rtol=1e-6)  # theta_0 to theta_T
    assert (kernels["regression_error"] != kernels["regression_error_from_start"]).any()
    (run,) = (tmp_path / "runs").iterdir()
    level = tl.load_run(run)[2].select(treatment="reinit", init_seed=0)
    model, task = tl.model_and_task(tl.load_run(run).config)
    test = task.limit(30, None, 30).test
    _, error = tl.evaluate(model, level.theta_start, test.x, test.y, masks=level.masks)
    found = kernels[(kernels["treatment"] == "reinit") & (kernels["init_seed"] == 0)]["start_error"]
    assert float(found.iloc[0]) == pytest.approx(float(error))
    assert "effective_rank" in capsys.readouterr().out
    pairs = pd.read_csv(out / "contrasts.csv").set_index(["measure", "control"])
    assert len(pairs) == len(ntk_spectrum.COMPARED) and set(pairs["n"]) == {2}
    rank = kernels[kernels["level"] == 2].pivot(index="init_seed", columns="treatment", values="effective_rank")
    gap, row = rank["ticket"] - rank["reinit"], pairs.loc[("effective_rank", "reinit")]
    assert row["ticket_minus_control"] == pytest.approx(gap.mean(), rel=1e-5)
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(gap, 0).pvalue, rel=1e-4)


def test_width_sweep_measures_every_network_and_fits_their_slopes(tmp_path):
    config = width_sweep.Config(widths=(4, 8, 16), n_examples=10, steps=20, seeds=(0,))
    tables = width_sweep.run(config)
    widths, slopes = tables["widths"], tables["slopes"]
    assert widths["width"].tolist() == [4, 8, 16] and slopes["measure"].tolist() == list(width_sweep.SLOPES)
    assert (widths["lambda_min"] > 0).all() and (widths["relative_movement"] > 0).all()
    x = np.log2([4, 8, 16])
    y = np.log2(widths["relative_movement"])
    assert slopes["slope"][1] == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-12)
    save_to = ["--widths", "4", "8", "16", "--n-examples", "10", "--steps", "5", "--seeds", "0", "--out", str(tmp_path)]
    module = width_sweep
    assert main("width_sweep", module.Config, module.run, module.draw, module.summary, save_to) == 0
    with pytest.raises(ValueError, match="widths must be at least three"):
        width_sweep.Config(widths=(4, 8))


def test_slopes_over_widths_have_intervals_over_seeds():
    """Seeds of unlike slopes: 8 widths each are no 32 independent networks."""
    generator = np.random.default_rng(0)
    true = -0.5 + 0.1 * generator.normal(size=4)
    rows = [
        {"width": w, "seed": s, **{m: 3 * w ** true[s] for m in width_sweep.SLOPES}}
        for w in 2 ** np.arange(2, 10)
        for s in range(4)
    ]
    found, expected = width_sweep.slopes(pd.DataFrame(rows)), stats.ttest_1samp(true, 0).confidence_interval()
    assert (found["n"] == 4).all()
    np.testing.assert_allclose(found["slope"], true.mean())
    np.testing.assert_allclose(found["intercept"], np.log2(3))
    np.testing.assert_allclose(found[["low", "high"]], [list(expected)] * 3)


def test_an_ntk_scaled_network_has_the_closed_form_kernel_when_wide():
    x = torch.eye(3, dtype=torch.float64)[:2] * 3**0.5  # orthogonal, unit mean square
    model = tl.initialise(lambda: width_sweep.network(3, 20_000, 1), 0).double()
    kernel = tl.ntk.kernel(model, tl.state(model).params, x, outputs="sum_logits")
    # Cho & Saul: kappa_1(c) + c kappa_0(c), which is 1 + 1 on the diagonal and 1 / pi for orthogonal inputs
    expected = torch.tensor([[2.0, 1 / np.pi], [1 / np.pi, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(kernel, expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "mnits"], "error: unknown task 'mnits'. Did you mean 'mnist'?"),
        (["--model", "lenet_300"], "error: unknown model 'lenet_300'. Did you mean 'lenet_300_100'?"),
        (["--treatments", "tickets"], "error: unknown treatment 'tickets'. Did you mean 'ticket'?"),
        (["--prune-fraction", "1.5"], "error: prune_fraction must lie in (0, 1): got 1.5."),
        (["--rewind-step", "40"], "error: rewind_step must lie in [0, 40), before training ends: got 40."),
        (
            ["--levels", "90"],
            "lose all at level 14 of 90. Use at most 13 levels, or another prune_fraction.",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys):
    assert command(imp, tmp_path, *flags) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in printed if line.startswith("error:")]) == 1
    assert message in printed[-1]
    assert not (tmp_path / "results").exists()


def test_unknown_flags_and_missing_runs_exit_with_2(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)

    unknown = run("analyses.imp", "--levelss", "3")
    assert unknown.returncode == 2 and "--levels" in unknown.stderr and "Traceback" not in unknown.stderr
    missing = run("analyses.mode_connectivity", "--run", str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    helped = run("analyses.mode_connectivity", "--help")
    assert helped.returncode == 0 and "--n-alphas" in helped.stdout


def test_no_two_studies_or_choices_share_a_folder_of_results(tmp_path):
    def folder(module, **flags):
        return result_folder(module.__name__, module.Config(out=tmp_path, **flags))

    study, run = replace(DIGITS, levels=3), tmp_path / "runs" / "digits-mlp-0123456789"
    configs = [
        {},
        {"study": study},
        {"run": (run,)},
        {"run": (run, run.with_name("other"))},
        {"n_alphas": 5},
        {"n_alphas": 5, "study": study},
    ]
    found = [folder(mode_connectivity, **flags) for flags in configs]
    found += [folder(transfer), folder(transfer, study=study), folder(width_sweep), folder(width_sweep, steps=9)]
    assert len(set(found)) == len(found) and folder(mode_connectivity, run=(run,)).name == run.name
    assert folder(imp, device="cpu") == folder(imp) and list(tmp_path.iterdir()) == []  # tried, and taken away again
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="--out must be a place to write to"):
        result_folder("imp", imp.Config(out=tmp_path / "file"))


def test_results_that_cannot_be_written_are_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command_module, "save", full)
    assert command(imp, tmp_path, "--treatments", "ticket", "--levels", "0") == 2
    assert "No space left on device. Choose another, or make room." in capsys.readouterr().err


def test_flags_that_a_run_would_not_heed_are_refused(tmp_path):
    for flags, name in (({"study": replace(DIGITS, levels=3)}, "levels"), ({"store": tmp_path}, "store")):
        with pytest.raises(Refused, match=rf"do nothing beside --run.*'{name}'"):
            open_run(ntk_spectrum.Config(run=(tmp_path,), **flags))
    study = replace(DIGITS, levels=1)
    for module in (ntk_spectrum, signal_propagation):
        with pytest.raises(Refused, match=r"levels must lie in 0\.\.1, those of the run: got \[99\]"):
            module.run(module.Config(study=study, store=tmp_path, at_levels=(99,)))
    assert list(tmp_path.iterdir()) == []


def test_the_analyses_are_questions():
    found = questions()
    assert set(found) == set(NAMES) and all(found.values())


def test_the_defaults_are_the_digits():
    assert DIGITS.task == "digits" and imp.Config().study == DIGITS
