"""Blocks of seeds here and on a cluster of processes, one of them killed: the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
import torch
from cases import blobs, build, half_masks, small_mlp

import ticketlab as tl
from analyses import sweep as plans
from ticketlab.engine.apart import apart
from ticketlab.engine.sweep import blocks, spread, sweep
from ticketlab.errors import Refused

CONFIG = tl.ImpConfig(
    levels=2, prune_fraction=0.5, init_seeds=(0, 1), treatments=("ticket", "sibling"),
    recipe=tl.Recipe(steps=300, eval_every=100),
)  # fmt: skip
PLAN = """
measures = ["imp", "mask_overlap"]
[study]
levels = 1
prune_fraction = 0.5
init_seeds = [0, 1]
treatments = ["ticket", "sibling"]
recipe.steps = 40
recipe.eval_every = 20
[over]
"recipe.learning_rate" = [0.01]
"""


def contents(store: Path) -> dict[str, str]:
    """Checksums of all that is stored, but for times and versions."""
    files = [path for path in sorted(store.rglob("*")) if path.suffix in (".safetensors", ".csv")]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Path]]]:
    store = tmp_path_factory.mktemp("here")
    return store, sweep([CONFIG], store, progress=False)


def test_blocks_share_out_the_seeds() -> None:
    whole = tl.ImpConfig(init_seeds=(3, 1, 4), order_seeds=(7, 8, 9))
    assert [(b.init_seeds, b.order_seeds) for b in blocks(whole, 2)] == [((3, 1), (7, 8)), ((4,), (9,))]
    assert [b.order_seeds for b in blocks(CONFIG)] == [None, None]
    with pytest.raises(Refused, match="at least 1 init seed"):
        blocks(whole, 0)
    with pytest.raises(Refused, match="must not share a block"):
        sweep([CONFIG, CONFIG], progress=False)


def test_blocks_are_read_as_one_run_and_seeds_are_added_later(here, tmp_path) -> None:
    store, ((first, second),) = here
    both, alone = tl.load_run([first, second]), tl.load_run(first)
    assert both.config.init_seeds == (0, 1) and len(both) == 3
    more = sweep([tl.ImpConfig(**{**vars(CONFIG), "init_seeds": (1, 0)})], store, progress=False)
    assert more == [[second, first]], "what is stored is not trained again"
    pd.testing.assert_frame_equal(
        both[2].metrics.query("init_seed == 0").drop(columns="replica").reset_index(drop=True),
        alone[2].metrics.drop(columns="replica").reset_index(drop=True),
    )


def test_a_study_is_the_sum_of_its_blocks_to_the_bit(here, tmp_path) -> None:
    _, (folders,) = here
    ((whole,),) = sweep([CONFIG], tmp_path, seeds=2, progress=False)
    for one, both in zip(tl.load_run(folders), tl.load_run(whole), strict=True):
        for seed in (0, 1):
            a, b = (level.select(treatment="ticket", init_seed=seed) for level in (one, both))
            assert all(torch.equal(p, b.end.params[n]) for n, p in a.end.params.items())
            pd.testing.assert_frame_equal(a.metrics, b.metrics)


def test_a_cluster_that_loses_a_worker_ends_in_the_same_bytes(here, tmp_path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed: list[int] = []

        def kill() -> None:  # the worker that stored the first level
            while not list(tmp_path.glob("*/level_00/manifest.json")):
                time.sleep(0.02)
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

        killer = Thread(target=kill)
        killer.start()
        found = sweep([CONFIG], tmp_path, client=client, progress=False)
        killer.join()
        with pytest.raises(Refused, match="levels must be at least 0"):
            spread(_refuses, [1, 2], client)
        parts, others = _measured_in_parts(client), _measured_in_parts(None)
    torch.testing.assert_close(parts, others, rtol=1e-12, atol=1e-12)
    assert killed and [path.name for path in found[0]] == [path.name for path in here[1][0]]
    assert contents(tmp_path) == contents(here[0]) and len(contents(tmp_path)) == 2 * 3 * 4


SHOWN = torch.linspace(-1, 1, 24 * 6, dtype=torch.float64).sin().view(24, 6)


def _rows_of_kernel(rows: range, report) -> torch.Tensor:
    net = build(small_mlp)
    report()
    return tl.ntk.kernel(net, tl.state(net), SHOWN[rows], SHOWN, masks=half_masks(net, 0))


def _point_of_line(alpha: float, report) -> tuple[float, float]:
    a, b = (tl.state(build(small_mlp, seed)) for seed in (0, 1))
    between = {n: (1 - alpha) * p + alpha * b.params[n] for n, p in a.params.items()}
    test = blobs().test
    loss, error = tl.evaluate(build(small_mlp), between, test.x, test.y)
    return float(loss), float(error)


def _chi_of_seed(seed: int, report) -> float:
    net = build(small_mlp, seed)
    return float(tl.signal.jacobian_singular_values(net, tl.state(net), SHOWN[:4]).square().mean())


def _measured_in_parts(client) -> tuple[torch.Tensor, list[tuple[float, float]], list[float]]:
    rows = spread(_rows_of_kernel, [range(i, i + 8) for i in range(0, 24, 8)], client)
    alphas = spread(_point_of_line, torch.linspace(0, 1, 5).tolist(), client)
    return torch.cat(rows), alphas, spread(_chi_of_seed, range(3), client)


def test_other_long_work_goes_the_same_way() -> None:
    net = build(small_mlp)
    rows, points, _ = _measured_in_parts(None)
    whole = tl.ntk.kernel(net, tl.state(net), SHOWN, masks=half_masks(net, 0))
    torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-12)
    ends = (tl.state(build(small_mlp, seed)) for seed in (0, 1))
    path = tl.connectivity.linear_path(net, *ends, blobs(), n_alphas=5, splits=("test",))
    errors = [error for _, error in points]
    assert errors == pytest.approx([float(e) for e in path.curves["test", "error"]])


def _refuses(item: int, report: object) -> None:
    tl.ImpConfig(levels=-item)


def _five(report) -> int:
    report()
    print("not an answer")
    return 5


def _pid(report) -> int:
    return os.getpid()


def _dies(report) -> None:
    os._exit(3)


def _waits(path: Path, report) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_a_call_apart_answers_fails_and_dies_like_one_here(tmp_path) -> None:
    parts: list[int] = []
    assert apart(_five, lambda: parts.append(1)) == 5 and parts == [1]
    with pytest.raises(Refused, match="levels must be"):
        apart(partial(_refuses, 1), lambda: None)
    with pytest.raises(ChildProcessError, match="without an answer"):
        apart(_dies, lambda: None)
    first, second = (apart(_pid, lambda: None) for _ in range(2))
    assert first == second != os.getpid(), "the process that has answered waits for the next call"
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert apart(_pid, lambda: None) != first


def test_a_call_apart_ends_when_nobody_waits_any_more(tmp_path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import sys; sys.path.insert(0, 'tests'); from functools import partial; from pathlib import Path; "
        f"import test_sweep as t; t.apart(partial(t._waits, Path({str(pid)!r})), lambda: None)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        assert _soon(lambda: pid.exists() and pid.read_text())
        parent.kill()
    assert _soon(lambda: not Path(f"/proc/{pid.read_text()}").exists())


def _soon(holds, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def test_a_plan_is_trained_measured_and_goes_on(tmp_path, monkeypatch) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    argv = [str(plan), "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert plans.main(argv) == 0
    folders = sorted((tmp_path / "out").glob("*/*"))
    assert [folder.parent.name for folder in folders] == ["imp", "mask_overlap"]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    before = contents(tmp_path)
    monkeypatch.setattr("ticketlab.engine.imp.train", None)  # all is stored
    assert plans.main(argv) == 0 and contents(tmp_path) == before


def test_every_combination_is_a_study(tmp_path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("[0.01]", "[0.01, 0.002]") + "levels = [1, 2, 3]\n")
    studies = plans.read_plan(plan).studies
    assert [(s.recipe.learning_rate, s.levels) for s in studies] == [(r, n) for r in (0.01, 0.002) for n in (1, 2, 3)]
    assert all(s.recipe.steps == 40 and s.init_seeds == (0, 1) for s in studies)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[study", "must be a plan in TOML"),
        ("[stduy]\n", "study and over"),
        ("over = 3", "study and over"),
        ("[over]\nlevels = 3", "over.levels"),
        ("[study]\nlevel = 3", "fields of this version"),
        ("[study]\nlevels = -3", "levels must be at least 0"),
        ("[study]\nrecipe.steps = 'many'", "steps"),
        ("measures = ['mode_conectivity']", "mode_connectivity"),
        ("seeds_per_block = 0", "at least 1 init seed"),
    ],
)
def test_a_plan_with_a_slip_is_one_line(text, told, tmp_path, capsys) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    assert plans.main([str(plan), "--store", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--local", "0"], "at least 1 worker"),
        (["--local", "1", "--scheduler", "tcp://127.0.0.1:1"], "exclude each other"),
        (["--resources", "GPU"], "NAME=AMOUNT"),
    ],
)
def test_flags_of_a_cluster_with_a_slip_are_one_line(flags, told, tmp_path, capsys) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    assert plans.main([str(tmp_path / "plan.toml"), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error


def test_a_slurm_job_starts_workers_of_one_gpu(recwarn) -> None:
    jobqueue = pytest.importorskip("dask_jobqueue")
    with jobqueue.SLURMCluster(
        cores=1, processes=1, memory="16GB", walltime="08:00:00", job_extra_directives=["--gres=gpu:1"],
        worker_extra_args=["--resources GPU=1"],
    ) as cluster:  # fmt: skip
        script = cluster.job_script()
    assert "#SBATCH --gres=gpu:1" in script and "--resources GPU=1" in script and "--nthreads 1" in script
