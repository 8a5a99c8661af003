"""What a wheel holds: ``ticketlab`` alone, with ``analyses`` and ``figures`` inside it.

In a checkout they stand beside it, where ``python -m analyses.imp`` finds them. Installed, names as common as these are
the user's: the built copies are ``ticketlab.analyses`` and ``ticketlab.figures``, and import each other as such.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

IMPORT = re.compile(r"^(\s*(?:from|import) )(?=(?:analyses|figures)\b)", re.MULTILINE)
COMMAND = re.compile(r"python -m (?:analyses\.?|(?=figures\b))")


class Inside(build_py):
    """Copies modules, and names ``analyses`` and ``figures`` in the copies as they are installed."""

    def build_module(self, module, module_file, package):
        outfile, copied = super().build_module(module, module_file, package)
        text = Path(outfile).read_text(encoding="utf-8")
        Path(outfile).write_text(COMMAND.sub("ticketlab ", IMPORT.sub(r"\1ticketlab.", text)), encoding="utf-8")
        return outfile, copied


setup(
    packages=[
        *find_packages(include=["ticketlab*"]),
        *(f"ticketlab.{name}" for name in find_packages(include=["analyses*", "figures*"])),
    ],
    package_dir={"ticketlab.analyses": "analyses", "ticketlab.figures": "figures"},
    cmdclass={"build_py": Inside},
)
