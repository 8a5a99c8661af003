"""How every figure looks, and how it is saved: the same bytes each time."""

from __future__ import annotations

import inspect
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Draw = Callable[[Mapping[str, pd.DataFrame]], Figure]
TWO_COLUMNS = 7.0  # inches

# Okabe & Ito's colours, safe for colour-blind readers; markers and dashes tell them apart in grey.
LOOKS: dict[str, dict[str, object]] = {
    "ticket": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "reinit": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "random_mask": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "layerwise_shuffle": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "dense_restart": {"color": "#000000", "marker": "D", "linestyle": (0, (5, 1, 1, 1))},
    "sibling": {"color": "#56B4E9", "marker": "x", "linestyle": (0, (1, 1))},
    "lr_rewind": {"color": "#E69F00", "marker": "+", "linestyle": (0, (7, 1.5))},
    "fine_tune": {"color": "#E69F00", "marker": "*", "linestyle": (0, (3, 1))},
    "reinit_keep_sign": {"color": "#D55E00", "marker": "p", "linestyle": (0, (8, 1, 2, 1))},
    "reshuffle": {"color": "#CC79A7", "marker": "h", "linestyle": (0, (4, 2))},
    "reshuffle_keep_sign": {"color": "#CC79A7", "marker": "H", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
    "random_sign": {"color": "#009E73", "marker": "1", "linestyle": (0, (2, 2))},
    "signed_constant": {"color": "#0072B2", "marker": "P", "linestyle": (0, (8, 2, 1, 2))},
    "random_constant": {"color": "#56B4E9", "marker": "X", "linestyle": (0, (2, 1, 1, 1))},
    "frozen_init": {"color": "#000000", "marker": "<", "linestyle": (0, (4, 1, 4, 3))},
    "frozen_unless_shrunk": {"color": "#999999", "marker": ">", "linestyle": (0, (10, 2))},
    "random_erk": {"color": "#009E73", "marker": "d", "linestyle": (0, (5, 2))},
}
LABELS = {
    "ticket": "ticket",
    "reinit": "reinitialised",
    "random_mask": "random mask",
    "random_erk": "random mask (ERK)",
    "layerwise_shuffle": "shuffled in layers",
    "dense_restart": "dense, retrained",
    "sibling": "ticket, other batch order",
    "lr_rewind": "learning rate rewound",
    "fine_tune": "fine-tuned",
    "reinit_keep_sign": "reinitialised, signs kept",
    "reshuffle": "values reshuffled",
    "reshuffle_keep_sign": "values reshuffled, signs kept",
    "random_sign": "random signs",
    "signed_constant": "constant, signs kept",
    "random_constant": "constant, random signs",
    "frozen_init": "pruned weights frozen",
    "frozen_unless_shrunk": "frozen unless shrunk",
}
LAYERS: tuple[dict[str, object], ...] = (
    {"color": "#440154", "marker": "o", "linestyle": "-"},
    {"color": "#31688e", "marker": "s", "linestyle": "--"},
    {"color": "#35b779", "marker": "^", "linestyle": "-."},
    {"color": "#8fa31e", "marker": "D", "linestyle": ":"},
    {"color": "#b8860b", "marker": "v", "linestyle": (0, (5, 1, 1, 1))},
)
"""Looks of layers, from the input on; treatments have other colours."""
LONGEST = 16
"""Letters of a layer's name in a legend."""
TASKS = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "examples.cifar_small:task": "CIFAR-10 at 16 x 16",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "examples.text_small:topics": "packages of the standard library",
    "examples.text_small:next_bytes": "its next bytes",
    "stdlib_lm": "next bytes of the standard library",
    "stdlib_topics": "packages of the standard library",
}
FAMILIES = {
    "lenet": "LeNet",
    "mlp": "MLP",
    "conv": "Conv",
    "resnet": "ResNet",
    "vgg": "VGG",
    "vit": "ViT",
    "bert": "BERT",
    "encoder": "encoder",
    "decoder": "decoder",
    "gpt2": "GPT-2",
    "llama": "Llama",
}
SIZES = {"w": "width", "d": "depth", "h": "heads", "p": "patch"}
DENSE = {"color": "0.45", "linestyle": "-", "linewidth": 2.2}
"""Look of dense networks where they are a line among treatments."""
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.2}
"""Place of a legend over its axes, where it hides nothing."""


@contextmanager
def paper() -> Iterator[None]:
    """The project's style, inside this context alone."""
    with plt.style.context(Path(__file__).with_name("paper.mplstyle")):
        yield


def save(figure: Figure, stem: Path, *, pdf: bool = True, draw: Draw | None = None) -> list[Path]:
    """Write STEM.pdf and STEM.png without dates or versions, so that equal figures are equal files.

    Args:
        figure: A figure, closed afterwards.
        stem: Path without suffix.
        pdf: Whether to write a PDF beside the PNG.
        draw: Of a figure that is to lose its title to a caption, STEM.txt: what drew it, whose docstring says what
            the panels are. Panels keep theirs, which are needed to read them.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [Path(f"{stem}.pdf")] * pdf + [Path(f"{stem}.png")]
    if draw is not None:
        words = " ".join((inspect.getdoc(draw) or "").replace("``", "").split())
        title = figure.get_suptitle().replace("\n", "; ")
        Path(f"{stem}.txt").write_text(f"{title}. {words}\n")
        figure.suptitle("")
    with paper():
        if pdf:
            figure.savefig(paths[0], metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(paths[-1], metadata={"Software": None})
    plt.close(figure)
    return paths


def drawn(draw: Draw) -> dict[str, Draw]:
    """A figure's main picture, and its supplement where its module has one, by what the files' names end in."""
    supplement = getattr(sys.modules[draw.__module__], "supplement", None)
    return {"": draw} | ({"-supplement": supplement} if supplement else {})


def name_task(table: pd.DataFrame) -> str:
    """Such as "LeNet-300-100 on MNIST", from the columns ``task`` and ``model``."""
    task, model = table["task"].iloc[0], table["model"].iloc[0]
    return f"{name_model(model)} on {TASKS.get(task, task)}"


def name_model(model: str) -> str:
    """Such as "ResNet-14 (width 8)" of ``resnet_14_w8``; a name of one's own stays as it is."""
    family, *parts = model.split("_")
    if family not in FAMILIES:
        return model.replace("_", " ") if ":" not in model else model
    sizes = [f"{SIZES[part[0]]} {part[1:]}" for part in parts if part[0] in SIZES and part[1:].isdigit()]
    name = "-".join([FAMILIES[family], *(part for part in parts if part.isdigit())])
    words = [part for part in parts if part in ("padded", "bn") or (part in ("mini", "tiny", "base") and not sizes)]
    return " ".join([name, *words]) + (f" ({', '.join(sizes)})" if sizes else "")


def letter(axes: Iterable[Axes]) -> None:
    """Name panels a, b, c in reading order."""
    for name, place in zip("abcdefghi", axes, strict=False):
        if not place.get_title():
            place.set_title(" ")  # room for the letter, or it would stand in the figure's title
        place.annotate(name, (0, 1), (-22, 5), "axes fraction", textcoords="offset points", weight="bold",
                       annotation_clip=False).set_in_layout(False)  # fmt: skip


def keys(axes: Axes) -> tuple[list[Artist], list[str]]:
    """Handles and labels of a legend, each label once."""
    firsts: dict[str, Artist] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        firsts.setdefault(label, handle)
    return list(firsts.values()), list(firsts)


def below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, under them: that of the axes given."""
    handles, labels = keys(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)))


def said(axes: Axes, words: str) -> None:
    """A panel in words, where a drawing would be empty or of rounding alone."""
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def mark(axes: Axes, y: float, words: str) -> None:
    """A line across, named on its right, where the words hide nothing."""
    axes.axhline(y, color="0.4", lw=0.8, ls=":", zorder=0)
    axes.annotate(textwrap.fill(words, 11), (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=6)


def log_axis(axes: Axes) -> None:
    """Log scale upwards with at least two labels, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1,) if high > 100 * low else (1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    if low >= 1e-3 and high <= 1e4:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def density_axis(axes: Axes, densities: np.ndarray) -> None:
    """Log axis of density in percent, dense on the left: pruning goes to the right."""
    axes.set_xscale("log")
    axes.set_xlim(1.15, 0.85 * float(np.min(densities)))
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if t >= np.min(densities) * 0.99]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("weights kept (%)")


def treatments(table: pd.DataFrame) -> list[str]:
    """Those that a table has, in the order of ``LOOKS``, others behind."""
    found = dict.fromkeys(table["treatment"])
    return [t for t in {**LOOKS, **found} if t in found]


def look_of(treatment: str) -> dict[str, object]:
    """Colour, marker and dashes: those above, or of a treatment that is not there some of its own, from its name."""
    n = zlib.crc32(treatment.encode())
    colors, markers = sorted({str(look["color"]) for look in LOOKS.values()}), ("d", "8", "2", "3", "4", "|", "_")
    dashes = (0, (1 + n % 9, 1 + n // 9 % 4, 1, 1 + n // 36 % 4))
    own: dict[str, object] = {
        "color": colors[n % len(colors)],
        "marker": markers[n // 8 % len(markers)],
        "linestyle": dashes,
    }
    return LOOKS.get(treatment, own)


def label_of(treatment: str) -> str:
    return LABELS.get(treatment, treatment.replace("_", " "))


def some_layers(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Those that a panel has room for with their looks, the first and the last among them."""
    places = np.unique(np.linspace(0, max(0, len(names) - 1), len(LAYERS)).round().astype(int))[: len(names)]
    return {names[i]: look for i, look in zip(places, LAYERS, strict=False)}


def layer_label(name: str) -> str:
    """A layer's name as far as a legend has room: its end, at a dot, where it is long."""
    name = name.removesuffix(".weight")
    if len(name) <= LONGEST:
        return name
    parts, kept = name.split("."), ""
    while parts and len(parts[-1]) + len(kept) < LONGEST:
        kept = f"{parts.pop()}.{kept}" if kept else parts.pop()
    return f"…{kept or name[-LONGEST:]}"


def layer_axis(axes: Axes, depth: Sequence[int], names: Sequence[str]) -> None:
    """Ticks at layers: their names where these are few and short, or else their numbers from the input."""
    if sum(map(len, names)) <= 4 * LONGEST:
        axes.set_xticks(list(depth), list(names))
        return
    axes.set_xlabel("layer, from the input")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def against_density(axes: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    """A column of networks, a line a treatment; the dense networks, from which all of them come, belong to each."""
    for treatment in treatments(table):
        rows = table[(table["treatment"] == treatment) | (table["level"] == 0)]
        mean_and_replicas(axes, rows["level_density"], rows[column], label=label_of(treatment), **look_of(treatment))
    density_axis(axes, table["level_density"].to_numpy())
    axes.set_ylabel(label)


def mean_and_replicas(axes: Axes, x: pd.Series, y: pd.Series, *, label: str, **look: object) -> None:
    """The mean of y at each x as a line; every replica as a faint dot, or nothing is hidden."""
    frame = pd.DataFrame({"x": x.to_numpy(), "y": y.to_numpy(dtype=float)}).dropna()
    mean = frame.groupby("x")["y"].mean()
    marker, color = look["marker"], look["color"]
    axes.plot(frame["x"], frame["y"], linestyle="none", marker=marker, color=color, alpha=0.25, markersize=2.2, mew=0.5)
    axes.plot(mean.index, mean.to_numpy(), label=label, **look)  # type: ignore[arg-type]
