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

USUAL = tl.ImpConfig().treatments
"""What an analysis trains that looks at nothing else: a preset then brings its own."""


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
    default: Any = config_type()
    if given.preset is None:
        if given.small:
            raise Refused(f"--small belongs to --preset, which names one of {', '.join(PRESETS)}: got it alone.")
        return default, rest
    study = preset(given.preset, small=given.small)
    if not any(f.name == "study" for f in fields(default)):
        raise Refused(f"--preset names a study, and this analysis has none: leave it out of {' '.join(argv)}.")
    if default.study.treatments != USUAL:
        study = replace(study, treatments=default.study.treatments)
    return replace(default, study=study), rest


def described() -> str:
    """The presets, a line each."""
    width = max(map(len, PRESETS))
    return "\n".join(
        f"{name:<{width}}  {one.config.model} on {one.config.task}: {one.paper}" for name, one in PRESETS.items()
    )
