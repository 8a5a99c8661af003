"""ticketlab: questions about lottery tickets, and the runs that answer them.

ticketlab NAME [--help]    answer a question, such as ticketlab imp
ticketlab figures          draw tables again
ticketlab sweep PLAN       studies in blocks of seeds, on a cluster or here
ticketlab runs [STORE]     what a store holds
ticketlab show RUN         the study of a run, and its errors level by level
ticketlab diff A B         what two runs have different, and their errors side by side
ticketlab verify RUN       hold every file of a run against its checksum
ticketlab --version

Completion of names and flags in bash: source <(ticketlab --tyro-print-completion bash)
"""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import pandas as pd
import tyro

from ticketlab.commands import guarded
from ticketlab.engine import store
from ticketlab.engine.config import ImpConfig
from ticketlab.engine.run import Run, load_run, runs
from ticketlab.engine.verify import verify
from ticketlab.errors import Refused, nearest
from ticketlab.printed import across, as_text, width
from ticketlab.version import __version__

HERE = Path(__file__).parent
INSTALLED = (HERE / "analyses").is_dir()
"""Whether this is a wheel's content, not a checkout."""
STORED = {"runs": 1, "show": 1, "diff": 2, "verify": 1}
"""Commands on stores, with the number of folders that each takes at most."""
TITLE = "Test error in percent, mean ± sd over n networks:"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where a run is damaged; otherwise as `guarded`."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    return guarded(lambda: _command(*given))


def _command(name: str = "--help", *rest: str) -> int:
    known = questions()
    if name in known or name in ("figures", "sweep"):
        return _ran(name, rest)
    if name == "--tyro-print-completion":
        return _completion(rest)
    if name == "verify" and len(rest) == 1 and not rest[0].startswith("-"):
        return _verified(rest[0])
    print(_answer(name, rest, known))
    return 0


def _answer(name: str, rest: Sequence[str], known: Mapping[str, str]) -> str:
    if name in ("-h", "--help"):
        longest = max(map(len, known))
        listed = [_entry(question, about, longest) for question, about in known.items()]
        return "\n".join([(__doc__ or "").strip(), "", "questions:", *listed])
    if name == "--version":
        return __version__
    if name not in STORED:
        raise Refused(nearest("command", name, (*STORED, "figures", "sweep", *known)))
    usage = next(line for line in (__doc__ or "").splitlines() if line.startswith(f"ticketlab {name}"))
    if {"-h", "--help"} & {*rest}:
        return usage
    most = STORED[name]
    if len(rest) > most or (len(rest) < most and name != "runs"):
        raise Refused(f"{name} must have {most} folder{'s' * (most > 1)}: got {len(rest)}. {usage}")
    answers: dict[str, Callable[..., str]] = {"runs": _stored, "show": shown, "diff": compared}
    return answers[name](*rest)


def _entry(name: str, about: str, longest: int) -> str:
    first = f"  {name:<{longest}}  "
    return textwrap.fill(about, width(), initial_indent=first, subsequent_indent=" " * len(first))


def _ran(name: str, rest: Sequence[str]) -> int:
    if not {"", os.getcwd()} & {*sys.path}:  # where models and tasks of one's own may lie, as with python -m
        sys.path.append(os.getcwd())
    if name == "figures":
        return pkgutil.resolve_name(f"{inside()}figures.__main__:main")(rest)
    if name == "sweep":
        return analysis(name).main(rest)
    its = analysis(name)
    return its.main(name, its.Config, its.run, its.draw, its.summary, rest)


def analysis(name: str) -> Any:
    """The module of an analysis."""
    return pkgutil.resolve_name(f"{inside()}analyses.{name}")


def inside() -> str:
    """What the names ``analyses`` and ``figures`` stand behind: nothing in a checkout, which then is on the path.

    Installed, they are ``ticketlab.analyses`` and ``ticketlab.figures``, and leave the names to the user.
    """
    if INSTALLED:
        return "ticketlab."
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    return ""


def questions() -> dict[str, str]:
    """Each analysis with the first line of its docstring."""
    folder = (HERE if INSTALLED else HERE.parent) / "analyses"
    sources = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    modules = {name: ast.parse(source) for name, source in sources.items() if f'main("{name}", ' in source}
    return {name: (ast.get_docstring(module) or "").partition("\n")[0] for name, module in modules.items()}


@dataclass(frozen=True)
class _Folder:
    """A command on stores."""

    folder: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Stores or runs."""


def _completion(shell: Sequence[str]) -> int:
    """Print the script by which a shell completes names and flags."""
    kinds: dict[str, Any] = {n: pkgutil.resolve_name(f"{inside()}analyses.{n}:Config") for n in questions()}
    kinds |= dict.fromkeys(STORED, _Folder)
    commands: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(commands, prog="ticketlab", args=["--tyro-print-completion", *shell], config=flags)
    return 0


def errors(run: Run) -> pd.DataFrame:
    """Test errors in percent: one row per level, one column per treatment, mean ± standard deviation, and n."""
    table = run.metrics.assign(density=run.metrics["level_density"])
    return across(table, ["level", "density"], "treatment", "test_error")


def shown(folder: str) -> str:
    """The study of a run in a few lines, and its test errors in percent."""
    run = load_run(folder)
    plain = _flat(ImpConfig())
    changed = [f"{name} {value}" for name, value in _flat(run.config).items() if value != plain[name]]
    flags = textwrap.fill(", ".join(changed) or "as the defaults", width())
    return "\n".join([repr(run), "", flags, "", as_text(errors(run), TITLE)])


def compared(a: str, b: str) -> str:
    """Flags that differ between two runs, and their test errors in percent side by side."""
    one, other = load_run(a), load_run(b)
    flags, others = _flat(one.config), _flat(other.config)
    changed = [name for name in {**flags, **others} if flags.get(name) != others.get(name)]
    parts = [f"a: {one.folder}", f"b: {other.folder}", ""] + ([] if changed else ["the same flags"])
    for name in changed:
        sides = (f"a: {flags.get(name, '')}", f"b: {others.get(name, '')}")
        parts += [
            name,
            *(textwrap.fill(side, width(), initial_indent="  ", subsequent_indent="     ") for side in sides),
        ]
    left, right = errors(one), errors(other)
    both = pd.concat([left.add_suffix(" a"), right.add_suffix(" b")], axis=1).fillna("")
    both = both.sort_index(ascending=[True, False])
    names = dict.fromkeys([*left.columns, *right.columns])
    order = [f"{name} {run}" for name in names for run in "ab" if f"{name} {run}" in both]
    return "\n".join([*parts, "", as_text(both[order], TITLE)])


def _flat(config: ImpConfig) -> dict[str, str]:
    """Flags of a study by name, those of its recipe among them, as they are written."""
    values: dict[str, Any] = asdict(config)
    recipe: Mapping[str, Any] = values.pop("recipe")
    return {name: _written(value) for name, value in {**values, **recipe}.items()}


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return json.dumps(value, default=str).strip('"') if value is not None else "none"


def _stored(folder: str = "runs") -> str:
    table = runs(folder)
    front = ["levels", "seeds", "treatments", "megabytes", "changed"]  # a run's name begins with task and model
    return as_text(table.set_index("run")[front]) if len(table) else f"no runs in {folder}"


def _verified(folder: str) -> int:
    try:
        faults = verify(folder)
    except Refused as error:
        if not store.is_run(Path(folder).expanduser()):
            raise
        print(error)
        return 1
    print("\n".join(f"level {level}: {fault or 'whole'}" for level, fault in faults.items()) or "no level is stored")
    return int(not faults or any(faults.values()))
