"""ticketlab: questions about lottery tickets, and the runs that answer them.

ticketlab NAME [--help]    answer a question, such as ticketlab imp
ticketlab figures          draw tables again
ticketlab runs [STORE]     what a store holds
ticketlab show RUN         the study of a run, and its errors level by level
ticketlab diff A B         what two runs have different, and their errors side by side
ticketlab verify RUN       hold every file of a run against its checksum
"""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ticketlab.engine.config import ImpConfig
from ticketlab.engine.run import Run, load_run, runs, verify
from ticketlab.errors import Refused, nearest
from ticketlab.version import __version__

HERE = Path(__file__).parent
STORED = {"runs": 1, "show": 1, "diff": 2, "verify": 1}
"""Commands on stores, with the number of folders that each takes at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where a run is damaged; 2 with one line on stderr where the input was at fault."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    return guarded(lambda: _command(*given))


def guarded(action: Callable[[], int]) -> int:
    """The exit code of an action: one line where the input was at fault or Ctrl-C stopped it, none for a closed pipe.

    Returns:
        The action's code, 2 where it refused its input, 130 where Ctrl-C stopped it, 141 where nobody reads its output.
    """
    try:
        code = action()
        sys.stdout.flush()
        return code
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: finished levels are stored, and the same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141


def _command(name: str = "--help", *rest: str) -> int:
    known = questions()
    if name in ("-h", "--help"):
        print((__doc__ or "").strip() + "\n\nquestions:")
        print("\n".join(_entry(question, about, max(map(len, known))) for question, about in known.items()))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name in known or name == "figures":
        return _ran(name, rest)
    if name not in STORED:
        raise Refused(nearest("command", name, (*STORED, "figures", *known)))
    least = 0 if name == "runs" else STORED[name]
    if {"-h", "--help"} & {*rest} or not least <= len(rest) <= STORED[name]:
        line = next(line for line in (__doc__ or "").splitlines() if line.startswith(f"ticketlab {name}"))
        if {"-h", "--help"} & {*rest}:
            print(line)
            return 0
        raise Refused(f"{name} must have {STORED[name]} folder{'s' * (STORED[name] > 1)}: got {len(rest)}. {line}")
    if name == "verify":
        return _verified(rest[0])
    answers: dict[str, Callable[..., str]] = {"runs": _stored, "show": shown, "diff": compared}
    print(answers[name](*rest))
    return 0


def _entry(name: str, about: str, width: int) -> str:
    first = f"  {name:<{width}}  "
    return textwrap.fill(about, _columns(), initial_indent=first, subsequent_indent=" " * len(first))


def _columns() -> int:
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def _ran(name: str, rest: Sequence[str]) -> int:
    module = "figures" if name == "figures" else f"analyses.{name}"
    package = "" if on_path() else "ticketlab."
    sys.argv = [f"ticketlab {name}", *rest]
    try:
        runpy.run_module(package + module, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def on_path() -> bool:
    """Whether this is a checkout, whose ``analyses`` and ``figures`` then can be imported from anywhere.

    Installed, they are ``ticketlab.analyses`` and ``ticketlab.figures``, and leave the names to the user.
    """
    root = HERE.parent
    checkout = (root / "pyproject.toml").exists() and (root / "analyses").is_dir()
    if checkout and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return checkout


def questions() -> dict[str, str]:
    """Each analysis with the first line of its docstring."""
    folder = (HERE.parent if on_path() else HERE) / "analyses"
    sources = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    modules = {name: ast.parse(source) for name, source in sources.items() if f'main("{name}", ' in source}
    return {name: (ast.get_docstring(module) or "").partition("\n")[0] for name, module in modules.items()}


def as_text(table: pd.DataFrame) -> str:
    """A table without its index; columns that do not fit the terminal go on below."""
    number = "{:.4g}".format
    return table.to_string(index=False, line_width=_columns(), float_format=number, na_rep="")


def errors(run: Run) -> pd.DataFrame:
    """Test errors in percent, mean ± standard deviation over n replicas: a row per level, a column per treatment."""
    table = run.metrics
    cells = table.groupby(["level", "treatment"], sort=False)["test_error"].agg(["mean", "std", "count"])
    text = cells.apply(lambda c: _spread(100 * c["mean"], 100 * c["std"], int(c["count"])), axis=1)
    densities = (100 * table.groupby("level")["level_density"].first()).map("{:.3g}".format)
    return pd.concat([densities.rename("kept %"), text.unstack(sort=False).fillna("")], axis=1).reset_index()


def _spread(mean: float, sd: float, n: int) -> str:
    return f"{mean:.2f} (n = 1)" if n == 1 else f"{mean:.2f} ± {sd:.2f} (n = {n})"


def shown(folder: str) -> str:
    """The study of a run in a few lines, and its test errors in percent."""
    run = load_run(folder)
    plain = _flat(ImpConfig())
    changed = [f"{name} {value}" for name, value in _flat(run.config).items() if value != plain[name]]
    flags = textwrap.fill(", ".join(changed) or "as the defaults", _columns())
    return "\n".join([repr(run), "", flags, "", "test error (%), mean ± sd", as_text(errors(run))])


def compared(a: str, b: str) -> str:
    """Flags that differ between two runs, and their test errors in percent side by side."""
    one, other = load_run(a), load_run(b)
    flags, others = _flat(one.config), _flat(other.config)
    rows = [(n, flags.get(n, ""), others.get(n, "")) for n in {**flags, **others} if flags.get(n) != others.get(n)]
    parts = [f"a: {one.folder}", f"b: {other.folder}", ""]
    parts += [as_text(pd.DataFrame(rows, columns=["flag", "a", "b"]))] if rows else ["the same flags"]
    both = errors(one).merge(errors(other), on=["level", "kept %"], how="outer", suffixes=(" a", " b")).fillna("")
    return "\n".join([*parts, "", "test error (%), mean ± sd", as_text(both)])


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
    front = ["levels", "seeds", "treatments", "megabytes", "changed", "run"]  # a run's name begins with task and model
    return as_text(table[front]) if len(table) else f"no runs in {folder}"


def _verified(folder: str) -> int:
    faults = verify(folder)
    print("\n".join(f"level {level}: {fault or 'whole'}" for level, fault in faults.items()) or "no level is stored")
    return int(not faults or any(faults.values()))
