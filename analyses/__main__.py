"""``python -m analyses`` lists the analyses, and the presets that they can begin with."""

from __future__ import annotations

import ast
from pathlib import Path

from analyses.presets import described


def listed() -> dict[str, str]:
    """Each analysis with the first line of its docstring."""
    sources = {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))}
    modules = {name: ast.parse(source) for name, source in sources.items() if f'main("{name}", ' in source}
    return {name: (ast.get_docstring(module) or "").partition("\n")[0] for name, module in modules.items()}


if __name__ == "__main__":
    found = listed()
    print("python -m analyses.NAME [--help]:\n")
    print("\n".join(f"{name:<{max(map(len, found))}}  {what}" for name, what in found.items()))
    print(f"\n--preset NAME [--small]:\n\n{described()}")
