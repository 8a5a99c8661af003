"""Figures draw from fixture tables, state their n, and are the same bytes each time."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.pruning_criteria import METHODS
from figures import imp, mode_connectivity, ntk_spectrum, width_sweep
from figures import pruning_criteria as criteria_figure
from figures.__main__ import HERE, Config, draw_all, main
from figures.style import LABELS, LOOKS, drawn, look_of, paper, save, treatments
from ticketlab.engine.treatments import TREATMENTS

ABOUT = {"task": "digits", "model": "mlp_100_50"}


def levels_table() -> pd.DataFrame:
    rows = [
        {
            **ABOUT,
            "level": level,
            "treatment": treatment,
            "init_seed": seed,
            "density": 1.0 if treatment == "dense_restart" else 0.8**level,
            "test_error": 0.02 + 0.001 * level + 0.002 * seed,
            "early_stop_step": 100 * (1 + level + seed),
            "first_step": 10,
            "steps": 490,
        }
        for level, treatment, seed in itertools.product(range(4), ("ticket", "reinit", "dense_restart"), range(2))
        if level > 0 or treatment == "ticket"
    ]
    return pd.DataFrame(rows)


def connectivity_tables() -> dict[str, pd.DataFrame]:
    about = {**ABOUT, "n_train": 100, "n_test": 50}
    places = [(0, 0), (0, 10), (1, 0), (2, 0)]
    questions, splits = ("theta_k to theta_T", "siblings"), ("train", "test")
    paths, barriers = [], []
    for question, (level, k), seed, split in itertools.product(questions, places, range(2), splits):
        base = {"question": question, "level": level, "density": 0.8**level, "rewind_step": k, "init_seed": seed}
        for alpha in np.linspace(0, 1, 5):
            bump = 0.1 * alpha * (1 - alpha)
            paths.append(
                {**base, "split": split, "alpha": alpha, "loss_nats": 1 - alpha + bump, "error": bump, **about}
            )
        for metric, baseline in itertools.product(("loss_nats", "error"), ("mean", "linear", "max")):
            barriers.append({**base, "split": split, "metric": metric, "baseline": baseline, "barrier": 0.01 * seed})
    return {"paths": pd.DataFrame(paths), "barriers": pd.DataFrame(barriers).assign(**about)}


def ntk_tables() -> dict[str, pd.DataFrame]:
    about = {**ABOUT, "n_spectrum": 20, "n_regression": 50, "n_test": 50, "rewind_step": 0}
    kernels, spectra = [], []
    for level, treatment, seed in itertools.product((0, 2), ("ticket", "reinit"), range(2)):
        if level > 0 or treatment == "ticket":
            density = 0.8**level
            base = {
                "level": level,
                "treatment": treatment,
                "init_seed": seed,
                "density": density,
                "level_density": density,
            }
            measures = dict.fromkeys([*ntk_spectrum.PANELS, "regression_error", "test_error"], 0.5)
            kernels.append({**base, **measures, **about})
            spectra += [{**base, "rank": i, "share_of_trace": 2.0**-i, **about} for i in range(1, 9)]
    return {"kernels": pd.DataFrame(kernels), "spectra": pd.DataFrame(spectra)}


def width_tables() -> dict[str, pd.DataFrame]:
    about = {"task": "digits", "depth": 1, "n_examples": 8, "steps": 9}
    rows = [
        {"width": w, "seed": s, **dict.fromkeys(width_sweep.PANELS, w**-0.5), **about}
        for w, s in itertools.product((4, 8, 16), range(2))
    ]
    fits = [
        {"measure": m, "slope": -0.5, "low": -0.6, "high": -0.4, "intercept": 0.0, "theory": -0.5}
        for m in width_sweep.PANELS
    ]
    return {"widths": pd.DataFrame(rows), "slopes": pd.DataFrame(fits)}


def test_ntk_figures_say_what_they_show():
    found = texts(ntk_spectrum.draw(ntk_tables()))
    assert "n = 2" in found and "20 training examples" in found and "regression with $\\Theta_m$, 50 examples" in found
    found = texts(width_sweep.draw(width_tables()))
    assert "slope -0.500 ± 0.100 (95 %)" in found and "8 examples" in found and "n = 2 per width" in found


def texts(figure) -> str:
    found = [figure.get_suptitle(), *(t.get_text() for axes in figure.axes for t in axes.texts)]
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title()]
        legend = axes.get_legend()
        found += [t.get_text() for t in (*legend.get_texts(), legend.get_title())] if legend else []
    found += [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    return " | ".join(found)


def test_imp_shows_every_replica_and_says_n():
    table = levels_table()
    figure = imp.draw({"levels": table})
    assert "n = 2" in texts(figure) and "weights kept (%)" in texts(figure) and "500 steps" in texts(figure)
    left = figure.axes[0]
    shown = np.concatenate([line.get_ydata() for line in left.lines if line.get_linestyle() == "None"])
    expected = 100 * table["test_error"]
    assert set(np.round(expected, 9)) <= set(np.round(shown, 9))


def test_mode_connectivity_says_n_alphas_and_examples():
    figure, more = mode_connectivity.draw(connectivity_tables()), mode_connectivity.supplement(connectivity_tables())
    found = texts(figure)
    for text in ("n = 2", "5 alphas", "100 train", "50 test", "stable\nbelow 2", "baseline: mean", "baseline: linear"):
        assert text in found
    heights = figure.axes[0].lines
    assert any(np.allclose(line.get_ydata(), 0.5) for line in heights)  # means of 0 and 1 points
    assert len(figure.axes) == len(more.axes) == 4


def test_no_barrier_is_said_in_words():
    tables = connectivity_tables()
    tables["barriers"]["barrier"] = 1e-7
    panel = mode_connectivity.draw(tables).axes[0]
    assert panel.texts[0].get_text() == "no barrier at any density:\nmeans below 0.1 points" and not panel.lines


@pytest.mark.parametrize(
    "draw",
    [
        lambda: imp.draw({"levels": levels_table()}),
        lambda: mode_connectivity.draw(connectivity_tables()),
        lambda: ntk_spectrum.draw(ntk_tables()),
        lambda: width_sweep.draw(width_tables()),
    ],
)
def test_the_same_bytes_each_time(draw, tmp_path):
    first = [path.read_bytes() for path in save(draw(), tmp_path / "first")]
    second = [path.read_bytes() for path in save(draw(), tmp_path / "second")]
    assert first == second
    assert b"Type 3" not in first[0] and b"/FontFile2" in first[0]  # embedded TrueType, fonttype 42


def test_every_treatment_has_a_look_that_survives_grey():
    assert set(LOOKS) == set(LABELS)
    looks = [look_of(name) for name in (*TREATMENTS, "mine", "another_of_mine")]  # the last two, as new ones have it
    for one, other in itertools.combinations(looks, 2):
        assert one["marker"] != other["marker"] and one["linestyle"] != other["linestyle"]


def test_a_new_treatment_is_drawn_without_being_named_here():
    table = levels_table().replace({"treatment": {"reinit": "of_my_own"}})
    assert treatments(table) == ["ticket", "dense_restart", "of_my_own"]
    assert "of my own" in texts(imp.draw({"levels": table}))


@pytest.mark.parametrize("study", sorted(path.name for path in (HERE / "data").iterdir()))
def test_a_committed_study_keeps_the_rules_of_figures(study):
    """Main figures have at most four panels; panels have letters, axes at least two labels, legends hide no text."""
    tables = {path.stem: pd.read_csv(path) for path in sorted((HERE / "data" / study).glob("*.csv"))}
    module = importlib.import_module(f"figures.{study.partition('-')[0]}")
    for suffix, draw in drawn(module.draw).items():
        figure = draw(tables)
        with paper():
            figure.draw_without_rendering()
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert len(panels) <= (6 if suffix else 4)
        lettered = [{text.get_text() for text in axes.texts} & set("abcdef") for axes in panels]
        assert [*"abcdef"][: len(panels)] == [one for letters in lettered for one in letters]
        for axes in panels:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                labels = [
                    t for t, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=False) if low <= at <= high
                ]
                assert not axes.axison or sum(bool(label.get_text()) for label in labels) >= 2, (suffix, axis)


def test_python_m_figures_draws_the_studies_of_a_folder(tmp_path):
    shutil.copytree(HERE / "data" / "width_sweep-mnist", tmp_path / "data" / "width_sweep-mine")
    (written,) = draw_all(Config(data=tmp_path / "data", out=tmp_path / "out"))
    assert written == tmp_path / "out" / "width_sweep-mine.png" and written.stat().st_size > 1000


def test_a_run_of_ones_own_is_drawn_beside_its_tables(tmp_path):
    folder = shutil.copytree(HERE / "data" / "width_sweep-mnist", tmp_path / "width_sweep" / "digits-1")
    for names in ((), ("width_sweep",)):
        (written,) = draw_all(Config(names=names, run=(folder,)))
        assert written == folder / "width_sweep.png" and written.exists()
    draw_all(Config(run=(folder,), titles=False))
    caption = (folder / "width_sweep.txt").read_text()
    assert caption.startswith("NTK scaling, MNIST") and "Three log-log panels from widths and slopes" in caption
    with pytest.raises(ValueError, match="must be the name of a figure"):
        draw_all(Config(names=("pies",), run=(folder,)))
    with pytest.raises(ValueError, match="must hold the CSV tables"):
        draw_all(Config(names=("imp",), run=(tmp_path,)))
    with pytest.raises(ValueError, match="pies must be a study in"):
        draw_all(Config(names=("pies",)))


def test_python_m_figures_refuses_what_it_does_not_know(tmp_path):
    (tmp_path / "pies-mnist").mkdir()
    with pytest.raises(ValueError, match="must be the name of a figure"):
        draw_all(Config(data=tmp_path, out=tmp_path))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder with a study that is whole and studies that are not, and a file."""
    monkeypatch.chdir(tmp_path)
    broken = {"ragged": b"a,b\n1,2\n1,2,3,4\n", "bytes": b"\xf5\x00", "empty": b"", "other": b"a,b\n1,2\n"}
    for name, content in broken.items():
        (tmp_path / name / "imp-mine").mkdir(parents=True)
        (tmp_path / name / "imp-mine" / "levels.csv").write_bytes(content)
    (tmp_path / "folder" / "imp-mine" / "levels.csv").mkdir(parents=True)
    shutil.copytree(HERE / "data" / "width_sweep-mnist", tmp_path / "whole" / "width_sweep-mine")
    (tmp_path / "file").touch()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--wrong", "Unrecognized options: --wrong. See python -m figures --help."),
        ("--outt x", "Did you mean --out?"),
        ("--out", "--out"),
        ("pies", "pies must be a study in"),
        ("--data file", "file must hold folders FIGURE-NAME of CSV tables: it has none."),
        ("--data none", "none must hold folders FIGURE-NAME"),
        ("--data whole --out file", "--out must be a place to write to: file: "),
        ("--data whole --out /dev/null/x", "--out must be a place to write to: /dev/null/x: Not a directory"),
        ("--data ragged", "ragged/imp-mine/levels.csv must be a CSV table: Error tokenizing data"),
        ("--data bytes", "bytes/imp-mine/levels.csv must be a CSV table: 'utf-8' codec"),
        ("--data empty", "empty/imp-mine/levels.csv must be a CSV table: No columns"),
        (
            "--data other",
            "other/imp-mine must hold the tables that imp writes, whole: KeyError: 'level'. Make it again.",
        ),
        ("--data folder", "folder/imp-mine/levels.csv must be usable: Is a directory"),
        ("--run none", "must be the name of a figure to draw none"),
        ("imp --run ragged/imp-mine", "must be a CSV table"),
        ("imp --run whole --out x", "--run must have one figure's name beside it at most"),
        ("imp masks --run whole", "--run must have one figure's name beside it at most"),
    ],
)
def test_wrong_input_is_one_line_and_2(argv, words, tables, capfd):
    assert main(argv.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["started", "forking"])
def test_a_signal_to_all_its_processes_is_one_line_and_none_is_left(number, moment, tmp_path):
    """While they start too, when hooks of a fork would lose what a signal raises."""
    wait = "os.register_at_fork(after_in_child=lambda: print(1, flush=True))" if moment == "forking" else "pass"
    script = f"import os, sys; from figures.__main__ import main; {wait}; sys.exit(main(['--out', {str(tmp_path)!r}]))"
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and inherited
    try:
        running = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, heard)
    try:
        if moment == "forking":
            running.stdout.readline()
        else:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("*.png")) and time.monotonic() < deadline:
                time.sleep(0.05)
        os.killpg(running.pid, number)
        _, err = running.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while alive(running.pid) and time.monotonic() < deadline:  # killed ones are waited for by others
            time.sleep(0.05)
        assert not alive(running.pid)
    finally:
        if alive(running.pid):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 128 + number and err == "\nstopped: the same command starts again.\n", err


def test_every_default_criterion_has_a_look_of_its_own():
    known = [criteria_figure.LOOKS.get(method) for method in METHODS]
    assert None not in known, [method for method in METHODS if method not in criteria_figure.LOOKS]
