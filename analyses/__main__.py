"""``python -m analyses`` lists the analyses, and the presets that they can begin with."""

from __future__ import annotations

import sys

from analyses.presets import described
from ticketlab.commands import guarded
from ticketlab.console import questions


def main() -> int:
    found = questions()
    print("python -m analyses.NAME [--help]:\n")
    print("\n".join(f"{name:<{max(map(len, found))}}  {what}" for name, what in found.items()))
    print(f"\n--preset NAME [--small]:\n\n{described()}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
