"""A lottery ticket in a few minutes: the digits pruned by half six times, and the lines between what was found.

Run by ``make demo``. Both analyses read one stored run, so that a second start ends in seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd

from analyses import imp, mode_connectivity
from analyses.command import Tables, main, result_folder
from ticketlab.commands import guarded, parsed

LAST = imp.Config().study.levels
LINES = mode_connectivity.Config(align=True, align_levels=(0, LAST))


@dataclass(frozen=True)
class Config:
    """Find tickets on the bundled digits, and what joins them: tables, figures and two sentences, in results."""


def demo(_: Config) -> int:
    """Both analyses at their defaults, lines between init seeds added, and a sentence on each."""
    flags = ["--align", "--align-levels", "0", str(LAST)]
    for name, module, argv in (("imp", imp, []), ("mode_connectivity", mode_connectivity, flags)):
        code = main(name, module.Config, module.run, module.draw, module.summary, argv)
        if code:
            return code
        print()
    barriers = pd.read_csv(result_folder("mode_connectivity", LINES) / "barriers.csv")
    print(found(imp.run(imp.Config()), {"barriers": barriers}))
    return 0


def found(networks: Tables, lines: Tables) -> str:
    """What the tables say of the last level, in two sentences: means over all replicas, in percent and points."""
    last = networks["levels"].query("level == @LAST")
    error = 100 * last.groupby("treatment")["test_error"].mean()
    dense = 100 * networks["levels"].query("level == 0")["test_error"].mean()
    heights = lines["barriers"].query(
        "level == @LAST and split == 'test' and metric == 'error' and baseline == 'mean' and rewind_step == 0"
    )
    barrier = 100 * heights.groupby("question")["barrier"].mean()
    return (
        f"At {100 * last['density'].iloc[0]:.2g} % of the weights the ticket errs on {error['ticket']:.1f} % of the "
        f"test images, the same mask on a fresh initialisation on {error['reinit']:.1f} %, a mask shuffled in its "
        f"layers on {error['layerwise_shuffle']:.1f} %; the dense network on {dense:.1f} %.\n"
        f"On the line between tickets from two init seeds the error rises by {barrier['independent']:.1f} points, "
        f"by {barrier['independent, matched']:.1f} where hidden units are matched first, and by "
        f"{barrier['siblings']:.1f} between two runs of one ticket in different batch orders "
        f"(n = {last['init_seed'].nunique()} seeds)."
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda: demo(parsed(Config, None, prog="python -m examples.demo"))))
