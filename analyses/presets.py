"""``--preset NAME [--small]``: the study of a paper as the default of an analysis, which other flags then change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import ticketlab as tl
from ticketlab.engine.presets import PRESETS, preset
from ticketlab.errors import Refused

C = TypeVar("C")

DIGITS = tl.ImpConfig(
    levels=6,
    prune_fraction=0.5,
    treatments=("ticket", "reinit", "layerwise_shuffle", "sibling"),
    snapshot_steps=(25, 50, 100, 200, 400),
    recipe=tl.Recipe(steps=1500),
)
"""The study of an analysis without arguments: one run on scikit-learn's digits, which most analyses share."""


def taken_off(config_type: type[C], argv: Sequence[str]) -> tuple[C, list[str]]:
    """The defaults that ``argv`` starts from, and its other flags.

    An analysis that names treatments of its own, which it compares, keeps those.

    Raises:
        Refused: An unknown preset, an analysis without a study, ``--small`` alone.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--small", action="store_true")
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise Refused(f"--preset must be followed by one of {', '.join(PRESETS)}: {error}.") from error
    default: Any = _shortened(config_type(), rest)
    if given.preset is None:
        if given.small:
            raise Refused(f"--small belongs to --preset, which names one of {', '.join(PRESETS)}: got it alone.")
        return default, rest
    study = preset(given.preset, small=given.small)
    if not any(f.name == "study" for f in fields(default)):
        raise Refused(f"--preset names a study, and this analysis has none: leave it out of {' '.join(argv)}.")
    if default.study.treatments != DIGITS.treatments:
        study = replace(study, treatments=default.study.treatments)
    return replace(default, study=study), rest


def _shortened(default: Any, argv: Sequence[str]) -> Any:
    """The default without the snapshots that lie beyond ``--steps``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", nargs="?")
    steps = parser.parse_known_args(list(argv))[0].steps
    if steps is None or not steps.isdecimal() or not hasattr(default, "study"):  # what is no number is refused later
        return default
    kept = tuple(k for k in default.study.snapshot_steps if k <= int(steps))
    return replace(default, study=replace(default.study, snapshot_steps=kept))


def described() -> str:
    """The presets, a line each."""
    width = max(map(len, PRESETS))
    return "\n".join(
        f"{name:<{width}}  {one.config.model} on {one.config.task}: {one.paper}" for name, one in PRESETS.items()
    )
