"""``python -m analyses`` lists the analyses, and the presets that they can begin with."""

from __future__ import annotations

from analyses.presets import described
from ticketlab.console import questions

if __name__ == "__main__":
    found = questions()
    print("python -m analyses.NAME [--help]:\n")
    print("\n".join(f"{name:<{max(map(len, found))}}  {what}" for name, what in found.items()))
    print(f"\n--preset NAME [--small]:\n\n{described()}")
