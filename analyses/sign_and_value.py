"""What of a ticket's start matters: its signs, its values, or what its pruned weights become (Zhou et al. 2019).

Every start is trained at every density under the same mask, on the same batches, in one stack with the ticket.
The treatments lr_rewind and fine_tune, which go on from trained weights, are not among the default starts; at a
constant learning rate they are one and the same. With no arguments it runs on the bundled digits in a few minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pandas as pd

import ticketlab as tl
from analyses.command import OfRun, StudyFlags, Tables, joined, main, open_run
from analyses.intervals import interval, with_holm
from figures.sign_and_value import draw
from ticketlab.errors import Refused
from ticketlab.printed import grouped, spread

STARTS = (
    *("ticket", "reinit", "reinit_keep_sign", "reshuffle", "reshuffle_keep_sign"),
    *("random_sign", "signed_constant", "random_constant", "frozen_init", "frozen_unless_shrunk"),
)
STUDY = tl.ImpConfig(treatments=STARTS, levels=5, prune_fraction=0.54, recipe=tl.Recipe(steps=1500))


@dataclass(frozen=True)
class Config(OfRun):
    """Test error of every way to start a ticket's mask, against density."""

    study: StudyFlags = field(default_factory=lambda: STUDY)


def run(config: Config) -> Tables:
    """``starts``: one row per network. ``gaps``: how far each start is from the ticket and from reinitialising.

    Raises:
        Refused: A run without the treatment reinit, which the others are compared with.
    """
    study, _, _, levels = open_run(config)
    if "reinit" not in study.treatments:
        raise Refused(f"treatments must contain 'reinit', to compare with: got {study.treatments}. Add it.")
    starts = joined(level.metrics for level in levels)
    about = {"task": study.task, "model": study.model}
    tables = {"starts": starts, "gaps": gaps(starts)}
    return {name: table.assign(**about) for name, table in tables.items()}


def gaps(starts: pd.DataFrame) -> pd.DataFrame:
    """Differences in test error between networks of one initialisation, with 95 % intervals by Student's t.

    ``n`` networks of a start have a result; a difference is missing where either network diverged, so it has its own.
    Of each difference the p-value is unadjusted, and p_holm corrected for all differences from the same start.
    """
    rows = []
    for level, at_level in starts[starts["level"] > 0].groupby("level"):
        errors = at_level.pivot(index="init_seed", columns="treatment", values="test_error")
        density = at_level.loc[at_level["treatment"] == "ticket", "density"].iloc[0]
        for treatment in errors:
            row: dict[str, object] = {"level": level, "density": density, "treatment": treatment}
            row["n"] = errors[treatment].count()
            for other in ("ticket", "reinit"):
                gap = interval(errors[treatment] - errors[other], "")
                row |= {f"error_above_{other}_{column}".rstrip("_"): value for column, value in gap.items()}
            rows.append(row)
    table = pd.DataFrame(rows)
    for other in ("ticket", "reinit"):
        table = with_holm(table, f"error_above_{other}_p_value")
    return table


def summary(tables: Tables) -> pd.DataFrame:
    """Test error and gaps to two starts at the sparsest level: mean ± sd over n, p_holm for all levels."""
    table, starts = tables["gaps"], tables["starts"]
    last = table[table["level"] == table["level"].max()].set_index("treatment")
    at_last = starts[starts["level"] == starts["level"].max()]
    errors = at_last.pivot(index="init_seed", columns="treatment", values="test_error")
    each = grouped(at_last, ["treatment"], {"density": "density", "test_error_%": "test_error"})
    parts = []
    for other in ("ticket", "reinit"):
        p_values = last[[f"error_above_{other}_{name}" for name in ("p_value", "p_holm", "n_family")]]
        rows = each.join(p_values.set_axis(["p_unadjusted", "p_holm", "n_family"], axis=1)).drop(index=other)
        points = [spread(errors[start] - errors[other], "_points", len(errors)) for start in rows.index]
        rows["p_holm"] = [f"{p:.3g} of {n}" for p, n in zip(rows["p_holm"], rows["n_family"], strict=True)]
        parts.append(rows.assign(above_points=points, above=other).set_index("above", append=True))
    return pd.concat(parts)[["density", "test_error_%", "above_points", "n", "p_unadjusted", "p_holm"]]


if __name__ == "__main__":
    sys.exit(main("sign_and_value", Config, run, draw, summary))
