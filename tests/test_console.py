"""``ticketlab`` on a command line: what it lists, shows, compares and verifies, and how it ends."""

from __future__ import annotations

import errno
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ticketlab as tl
from fuzz import __main__ as fuzz
from ticketlab import commands, console
from ticketlab.errors import Refused

ROOT = Path(__file__).parent.parent
BENCHMARKS = [
    f"benchmarks/{name}.py"
    for name in ("cluster", "execution", "gpu", "imp_step", "ntk", "operator", "signal", "text", "zoo")
]
COMMANDS = [
    *BENCHMARKS,
    "fuzz/soak.py",
    "docs/build.py",
    "examples/demo.py",
    "analyses/sweep.py",
    "ticketlab/to_shards.py",
]
COMMANDS += [f"{package}/__main__.py" for package in ("figures", "fuzz", "examples/certificate")]
RECIPE = tl.Recipe(steps=6, eval_every=3)
TINY = tl.ImpConfig(levels=1, init_seeds=(0, 1), treatments=("ticket", "reinit"), recipe=RECIPE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    for seeds in ((0, 1), (0,)):
        study = tl.ImpConfig(levels=1, init_seeds=seeds, treatments=("ticket", "reinit"), recipe=RECIPE)
        list(tl.imp(study, store=folder, device="cpu", progress=False))
    return folder


def ran(*argv, **more):
    return subprocess.run(
        [sys.executable, "-m", "ticketlab", *argv], capture_output=True, text=True, check=False, **more
    )


def test_without_arguments_it_lists_every_question(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert console.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*console.questions(), *console.STORED))
    assert max(map(len, printed.splitlines())) <= 100


def test_runs_of_a_store(store, capsys):
    table = tl.runs(store)
    assert table["levels"].tolist() == [2, 2] and sorted(table["seeds"]) == [1, 2]
    assert table["megabytes"].gt(0.1).all()
    assert console.main(["runs", str(store)]) == 0
    assert all(name in capsys.readouterr().out for name in table["run"][:1])
    with pytest.raises(Refused, match="must be a folder of run directories"):
        tl.runs(store / "none")


def test_a_run_is_shown_with_spread_and_n(store, capsys):
    (folder,) = (path for path in store.iterdir() if tl.load_run(path).config.init_seeds == (0, 1))
    run = tl.load_run(folder)
    assert console.main(["show", str(folder)]) == 0
    printed = capsys.readouterr().out
    rows = run.metrics.query("level == 1 and treatment == 'reinit'")["test_error"]
    line = next(line for line in printed.splitlines() if line.split()[:1] == ["1"])
    assert f"{100 * rows.mean():.2f} ± {100 * rows.std():.2f}" in line and line.split()[-1] == "2"
    assert "steps 6" in printed and "momentum" not in printed  # flags that are not the defaults


def test_two_runs_differ_in_their_seeds_alone(store, capsys):
    assert console.main(["diff", *map(str, sorted(store.iterdir()))]) == 0
    _, flags, _, errors = capsys.readouterr().out.split("\n\n")
    assert sorted(flags.splitlines()) in (["  a: 0", "  b: 0 1", "init_seeds"], ["  a: 0 1", "  b: 0", "init_seeds"])
    assert errors.split()[:10] == ["level", "density", "ticket", "a", "ticket", "b", "reinit", "a", "reinit", "b"]


def test_verify_names_the_damaged_level(store, tmp_path, capsys):
    list(tl.imp(TINY, store=tmp_path, device="cpu", progress=False))
    (folder,) = tmp_path.iterdir()
    assert console.main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == "level 0: whole\nlevel 1: whole\n"
    curves = folder / "level_01" / "curves.csv"
    curves.write_text(curves.read_text().replace("0", "1", 1))
    assert console.main(["verify", str(folder)]) == 1
    assert "level 1: " in (printed := capsys.readouterr().out) and "does not match its checksum" in printed
    assert tl.verify(folder)[0] is None
    (folder / "level_00" / "manifest.json").unlink()
    assert console.main(["verify", str(folder)]) == 1
    assert (
        capsys.readouterr().out == f"level 0: {folder} lacks a whole level 0, and holds 1 after it. Resume the run.\n"
    )
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"steps": 6', '"steps": 7'))
    assert console.main(["verify", str(folder)]) == 1
    assert "must be what was stored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["imq"], "imp"),
        (["show"], "show must have 1 folder: got 0"),
        (["diff", "a"], "diff must have 2 folders: got 1"),
        (["show", "nowhere"], "must be a run directory"),
        (["imp", "--levels", "1", "--device", "cuda:7"], "device must be one that PyTorch has here"),
        (["width_sweep", "--device", "cuda:7"], "device must be one"),
        (["verify", "nowhere"], "must be a run directory"),
        (["show", "no\nwhere"], "no\\nwhere must be a run directory"),
        (["imp", "--steps", "x"], "--steps: invalid literal for int() with base 10: 'x'. See "),
        (["imp", "--stepz", "3"], "Unrecognized options: --stepz, 3. Did you mean --steps? See "),
        (["imp", "--steps"], "--steps"),
        (["imp", "--learning-rate", "nan"], "error: learning_rate must be positive and finite"),
        (["width_sweep", "--widths", "3", "3", "3"], "error: widths must be at least three"),
        (["imp", "--out", "/dev/null/x"], "--out must be a place to write to: /dev/null/x/imp"),
        (["imp", "--store", "/dev/null/x", "--out", "y"], "must be a place to write to: Not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_2(argv, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert console.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_version_and_the_help_of_a_command(capsys):
    assert console.main(["--version"]) == 0 and capsys.readouterr().out.strip() == tl.__version__
    assert console.main(["show", "--help"]) == 0 and capsys.readouterr().out.startswith("ticketlab show RUN")
    assert ran("--version").stdout.strip() == tl.__version__


def test_bash_completes_names_and_flags(capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        console.main(["--tyro-print-completion", "bash"])
    assert not done.value.code
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for words, expected in (("ticketlab mode", "mode_connectivity"), ("ticketlab imp --prune-f", "--prune-fraction")):
        cword = len(words.split()) - 1
        script = f"source completion; COMP_WORDS=({words}); COMP_CWORD={cword}; _tyro_ticketlab; echo ${{COMPREPLY[@]}}"
        shell = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert expected in shell.stdout.split() and "magnitude" not in shell.stdout, shell.stderr


def test_a_model_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    """As the console script starts: without the working directory on the path, where ``python -m`` has it."""
    (tmp_path / "net_of_ones_own.py").write_text(
        "import ticketlab as tl\ndef net(): return tl.models.build('mlp_100_50', (1, 8, 8), 10)"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    flags = ["--levels", "0", "--steps", "4", "--eval-every", "2", "--init-seeds", "0", "--device", "cpu"]
    assert console.main(["imp", "--model", "net_of_ones_own:net", *flags]) == 0
    assert sys.path[-1] == str(tmp_path) and len(list((tmp_path / "results" / "imp").iterdir())) == 1


def test_the_help_of_an_analysis_is_short_grouped_and_names_treatments(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert console.main(["ntk_spectrum", "--help"]) == 0
    printed = capsys.readouterr().out
    order = [printed.index(f"\n{group}:") for group in ("this analysis", "study", "recipe", "files")]
    assert order == sorted(order) and "layerwise_shuffle" in printed and "synflow" in printed
    assert max(map(len, printed.splitlines())) <= 100 and len(printed.splitlines()) < 60
    flags = [line for line in printed.splitlines() if line.startswith("  --")]
    assert all(re.fullmatch(r"  --\S+( \S+)*  +[A-Z\dk].*\.+", line) for line in flags), flags  # each in one line
    named = (
        "task model levels prune-fraction treatments init-seeds steps batch-size optimizer learning-rate rewind-step"
    )
    assert {f"--{name}" for name in [*named.split(), "device", "store", "out", "run", "preset"]} <= {*printed.split()}
    assert "--nesterov" not in printed and "example:" in printed and "--help-all describes all 42 flags" in printed
    with pytest.raises(SystemExit) as done:  # tyro's
        console.main(["ntk_spectrum", "--help-all"])
    assert not done.value.code
    assert "--nesterov" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert console.main(["imp", "--out", "new/folder"]) == 2
    assert "--out must be a place to write to: new/folder/imp" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a\nfile"), "a\\nfile must be usable: Too many open files."),
        (OSError(errno.EIO, "Input/output error"), "the output must be usable: Input/output error."),
        (MemoryError("Unable to allocate 7 TiB"), "memory must hold the work: Unable to allocate 7 TiB."),
        (RuntimeError("CUDA out of memory. Tried\nmore"), "memory must hold the work: CUDA out of memory. Tried."),
    ],
)
def test_surroundings_that_fail_are_one_line_and_2(error, words, capsys):
    assert commands.guarded(raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        commands.guarded(raising(RuntimeError("a bug")))


def raising(error):
    def action(*_):
        raise error

    return action


@pytest.mark.parametrize(
    ("shell", "code", "lines"), [(">/dev/full", 2, 1), (">&-", 0, 0), (">&- 2>&-", 0, 0), ("2>&-", 0, 0)]
)
def test_output_that_is_full_or_closed(shell, code, lines):
    command = f"{sys.executable} -m ticketlab --version {shell}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, lines), done.stderr


def test_a_closed_pipe_is_silent():
    command = f"{sys.executable} -m ticketlab imp --help-all | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "" and "imp" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on(number, tmp_path):
    flags = ["--steps", "200000", "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    command = [sys.executable, "-m", "ticketlab", "imp", *flags]
    heard = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background it is ignored, and inherited so
    try:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "runs").glob("*/config.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 128 + number, err
    (line,) = [line for line in err.splitlines() if line.startswith("stopped:")]
    assert line.endswith(f"is stored in {tmp_path / 'runs'}; the same command goes on from there.")
    assert "Traceback" not in err
    assert out.startswith("run: ")


@pytest.mark.parametrize("file", COMMANDS)
def test_a_wrong_flag_of_any_command_is_one_line(file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [file, "--wrong"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (done.value.code, out) == (2, "") and re.match("error: .* See (python|ticketlab) .* --help.$", line)


@pytest.mark.parametrize(
    ("argv", "words"), [(["pies"], "unknown target 'pies'"), (["--seconds", "nan"], "--seconds must be positive")]
)
def test_wrong_input_of_the_fuzzer_is_one_line(argv, words, capsys):
    assert fuzz.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")
