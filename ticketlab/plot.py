"""Pictures of Python objects, as the figures draw tables: each function returns a matplotlib ``Figure``.

>>> tl.plot.imp(tl.load_run("runs/...")).savefig("imp.png")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ticketlab.connectivity import Path
from ticketlab.console import inside
from ticketlab.engine.level import Level
from ticketlab.engine.run import Run
from ticketlab.ntk import Spectrum

inside()  # puts a checkout on the path, where figures lie beside the package

from figures.imp import draw as draw_imp  # noqa: E402
from figures.style import (  # noqa: E402
    density_axis,
    label_of,
    layer_label,
    log_axis,
    look_of,
    mean_and_replicas,
    paper,
    some_layers,
)

ONE_COLUMN = (3.4, 2.8)  # inches


def imp(run: Run | Iterable[Level], *, task: str = "own data", model: str = "own network") -> Figure:
    """Test error and early-stop step against density, a line per treatment: that of ``analyses.imp``.

    Args:
        run: A stored run, or levels from ``tl.imp``.
        task: Name for the title, where levels are given.
        model: Likewise.
    """
    if isinstance(run, Run):
        task, model = run.config.task, run.config.model
        table = run.metrics
    else:
        table = pd.concat([level.metrics.assign(level=level.level) for level in run], ignore_index=True)
    return draw_imp({"levels": table.assign(task=task, model=model)})


def masks(run: Run | Iterable[Level]) -> Figure:
    """What tickets keep of each layer against what they keep of the network: lines are means over seeds, dots tickets.

    Args:
        run: A stored run, or levels from ``tl.imp``; of many layers five are drawn, the first and the last among them.
    """
    rows = []
    for level in run:
        for name, mask in level.subset(treatment="ticket").masks.items():
            shares = 100 * mask.flatten(1).double().mean(1).cpu().numpy()
            rows.append(pd.DataFrame({"layer": name, "density": level.density, "kept": shares}))
    table = pd.concat(rows, ignore_index=True)
    with paper():
        figure, axes = plt.subplots(figsize=ONE_COLUMN)
        for name, look in some_layers(table["layer"].unique()).items():
            one = table[(table["layer"] == name) & (table["kept"] > 0)]
            mean_and_replicas(axes, one["density"], one["kept"], label=layer_label(name), **look)
        density_axis(axes, table["density"].to_numpy())
        log_axis(axes)
        axes.set_ylabel("weights kept of a layer (%)")
        axes.legend()
    return figure


def path(line: Path) -> Figure:
    """Loss and error along a line, a colour per split; thin lines are replicas, thick ones their mean."""
    looks = {"train": ("0.5", "--"), "validation": ("#0072B2", ":"), "test": ("black", "-")}
    table = line.table
    with paper():
        figure, panels = plt.subplots(1, 2, figsize=(2 * ONE_COLUMN[0], ONE_COLUMN[1]))
        for axes, metric, label in zip(panels, ("loss_nats", "error"), ("loss (nats)", "error (%)"), strict=True):
            scale = 100 if metric == "error" else 1
            for split, rows in table.groupby("split", sort=False):
                color, dashes = looks[str(split)]
                for _, one in rows.groupby("replica"):
                    axes.plot(one["alpha"], scale * one[metric], dashes, color=color, lw=0.5, alpha=0.4)
                mean = scale * rows.groupby("alpha")[metric].mean()
                axes.plot(mean.index, mean, dashes, color=color, label=split)
            axes.set_xlabel(r"$\alpha$, from a to b")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        panels[0].legend(title=f"n = {table['replica'].nunique()}", title_fontsize=7)
    return figure


def spectrum(spectra: Spectrum | Mapping[str, Spectrum]) -> Figure:
    """Eigenvalues over their trace against rank, on log axes; geometric means where a spectrum is a stack.

    Args:
        spectra: One, or several by the names of a legend; treatments have their own looks.
    """
    named = {"": spectra} if isinstance(spectra, Spectrum) else spectra
    with paper():
        figure, axes = plt.subplots(figsize=ONE_COLUMN)
        for name, one in named.items():
            share = (one.eigenvalues / one.trace[..., None]).reshape(-1, one.eigenvalues.shape[-1]).cpu().numpy()
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = np.exp(np.log(np.where(share > 0, share, np.nan)).mean(0))
            look = {k: v for k, v in look_of(name).items() if k != "marker"} if name else {"color": "black"}
            axes.loglog(np.arange(1, len(mean) + 1), mean, label=label_of(name), **look)  # type: ignore[arg-type]
        axes.set_ylim(bottom=max(1e-12, axes.get_ylim()[0]))
        log_axis(axes)
        most = max(one.eigenvalues.shape[-1] for one in named.values())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank")
        axes.set_ylabel("eigenvalue / trace")
        if "" not in named:
            axes.legend()
    return figure
