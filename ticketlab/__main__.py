"""``python -m ticketlab``, as ``ticketlab``."""

import sys

from ticketlab.console import main

if __name__ == "__main__":
    sys.exit(main())
