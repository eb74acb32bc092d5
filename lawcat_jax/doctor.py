"""Look over an installation: ``python -m lawcat_jax.doctor [--json]``.

Versions and combinations known to fail, devices and memory, the kernels that each operation will use here and why not
the others, a CPU jax on a machine with an accelerator, plugins that do not fit, caches that cannot be written.

One line for each finding, with its remedy. Exit status 0 when nothing is wrong, 1 when something is. Works with a broken
jax or without one: flags are parsed by the standard library, and jax is asked in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lawcat_jax.analysis.environment import lenient_output, output_problem
from lawcat_jax.analysis.installation import examine, render


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 when nothing is wrong, else 1 (2 for a mistake on the command line)."""
    parser = argparse.ArgumentParser(prog="python -m lawcat_jax.doctor", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    report = examine()
    lenient_output()
    for line in (json.dumps(report, indent=2) if as_json else render(report)).splitlines():
        try:
            print(line, flush=True)
        except OSError as problem:
            return output_problem(problem) or 2
    return output_problem() or (0 if report["ok"] else 1)


if __name__ == "__main__":
    sys.exit(main())
