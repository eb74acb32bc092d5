"""Compare many students of one teacher: ``python -m lawcat_jax.study --config=configs/study_smollm2.py``.

Trains and evaluates every row of the study's table, several at a time where devices are named, and writes tables,
pictures and verdicts into ``--output``. Run again, it goes on. Exit codes: 0 all done, 2 a mistake or a row that failed,
75 interrupted, or out of ``--minutes``, with everything saved: run the command again.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags

from lawcat_jax.command_line import no_arguments, not_empty, run_main
from lawcat_jax.errors import UserError

_STARTED = time.monotonic()
_CONFIG = flags.DEFINE_string("config", None, "File of the study, with get_study() and get_config(variant).")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of everything. Default: runs/<name of the file>.")
_ONLY = flags.DEFINE_list(
    "only", None, "Rows (no_conv) or runs (no_conv_seed1) to do, with what they need; default: all."
)
_DEVICES = flags.DEFINE_list("devices", None, "CUDA devices for runs side by side (0,1). Default: one run at a time.")
_PER_DEVICE = flags.DEFINE_integer("runs_per_device", 1, "Runs that share a device.", lower_bound=1)
_MINUTES = flags.DEFINE_float(
    "minutes", None, "End after so long, with up to 40 s more for runs to save in. Default: no limit.", lower_bound=0.0
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Threads, and processes, of a run that prepare its data, where its config has some. Default: the cores, shared by the runs.",
    lower_bound=1,
)
_LIST = flags.DEFINE_bool("list", False, "Print what there is to do, and do nothing.")
_REPORT = flags.DEFINE_bool("report", False, "Write the results of what is finished, and run nothing.")
_PAGE = flags.DEFINE_string("page", None, "With --report: a Markdown page to put the tables into (docs/results.md).")


def main(argv: list[str]) -> int:
    """Run the study, list it, or report on it."""
    no_arguments(argv)
    for flag, items in (("--only", _ONLY.value), ("--devices", _DEVICES.value)):
        not_empty(flag, items)
    if _CONFIG.value is None:
        raise UserError("--config: name the file of a study, for example --config=configs/study_smollm2.py")
    if _PAGE.value is not None and not _REPORT.value:
        raise UserError("--page: goes with --report")
    from lawcat_jax.analysis.study.run import Options, list_study, report_study, run_study

    options = Options(
        config=_CONFIG.value,
        output=Path(_OUTPUT.value or f"runs/{Path(_CONFIG.value).stem}"),
        only=[name.strip() for name in _ONLY.value or () if name.strip()],
        devices=[name.strip() for name in _DEVICES.value or () if name.strip()],
        runs_per_device=_PER_DEVICE.value,
        minutes=_MINUTES.value,
        workers=_WORKERS.value,
    )
    if _LIST.value:
        return list_study(options)
    return report_study(options, _PAGE.value) if _REPORT.value else run_study(options, _STARTED)


if __name__ == "__main__":
    run_main(main, cache_programs=False)
