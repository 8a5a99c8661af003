"""Runs of one study in blocks of seeds, read as one: the same networks as in one run."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import ticketlab as tl
from ticketlab.errors import Refused

CONFIG = tl.ImpConfig(
    levels=2,
    init_seeds=(3, 1),
    treatments=("ticket", "reinit"),
    recipe=tl.Recipe(steps=12, eval_every=6),
    snapshot_steps=(6,),
)


def stored(folder, **changes):
    config = replace(CONFIG, **changes)
    list(tl.imp(config, store=folder, device="cpu", progress=False))
    return tl.run_folder(config, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    store = tmp_path_factory.mktemp("blocks")
    return store, stored(store), [stored(store, init_seeds=(seed,)) for seed in (3, 1)]


def test_blocks_are_the_run_of_all_their_seeds(folders):
    _, whole, blocks = folders
    run, one = tl.load_run(blocks), tl.load_run(whole)
    assert run.config == one.config and len(run) == len(one) == 3 and "and 1 more" in repr(run)
    for level, other in zip(run, one, strict=True):
        assert level.metrics["replica"].tolist() == list(range(len(level.metrics)))
        for treatment in level.metrics["treatment"].unique():
            for seed in (3, 1):
                ours, theirs = (found.select(treatment=treatment, init_seed=seed) for found in (level, other))
                for name, tensor in theirs.end.params.items():
                    torch.testing.assert_close(ours.end.params[name], tensor)
                    assert name not in theirs.masks or torch.equal(ours.masks[name], theirs.masks[name])
                keys = ["init_seed", "treatment", "test_error", "kept"]
                pd.testing.assert_frame_equal(ours.metrics[keys], theirs.metrics[keys], rtol=1e-5)
                assert len(ours.curves) == len(theirs.curves)
    assert run[0].snapshots[6].params["fc1.weight"].shape == one[0].snapshots[6].params["fc1.weight"].shape


def test_a_shorter_block_ends_the_run(folders):
    store, _, blocks = folders
    longer = stored(store / "longer", init_seeds=(7,), levels=3)
    assert len(tl.load_run([*blocks, longer])) == 3


def test_what_is_not_one_study_is_refused(folders):
    store, whole, blocks = folders
    with pytest.raises(Refused, match="init_seeds must be one or more different"):
        tl.load_run([whole, blocks[0]])
    with pytest.raises(Refused, match="differ in prune_fraction"):
        tl.load_run([blocks[0], stored(store / "other", init_seeds=(5,), prune_fraction=0.3)])
    with pytest.raises(Refused, match="empty list"):
        tl.load_run([])
