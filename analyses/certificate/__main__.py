"""The certificate stands in examples/; this door keeps ``python -m analyses.certificate`` open."""

import sys

from examples.certificate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
