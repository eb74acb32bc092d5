"""Train: ``python -m lawcat_jax.train --config=configs/tiny.py [--workdir=...] [--config.<field>=<value>]``.

Running the same command again resumes; a finished run exits at once. Exit codes: 0 finished, 2 a mistake that the
user can mend, 75 (EX_TEMPFAIL) interrupted by SIGTERM, also while weights load, or in training by SIGINT, with everything saved: run the
command again.

docs/config.md lists every --config.<field> with type, unit, default and meaning.
"""

from __future__ import annotations

from absl import flags

from lawcat_jax import command_line

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: config.workdir, else runs/<config name>.")


def main(argv: list[str]) -> int:
    """Check the configuration and run it."""
    command_line.end_when_terminated()  # until the training loop takes over, and when it is done
    command_line.no_arguments(argv)
    config = command_line.load_config(_CONFIG)
    config.workdir = _WORKDIR.value or config.workdir or f"runs/{command_line.config_name()}"
    from lawcat_jax.training.run import run  # after the checks, which need no jax and answer at once

    return run(config)


if __name__ == "__main__":
    command_line.run_main(main)
