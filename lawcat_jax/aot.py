"""Will it fit? ``python -m lawcat_jax.aot --config=configs/llama1b.py --topology=v5e:4x4 [--config.<field>=<value>]``.

Compiles every stage's train step, prefill and decoding for a TPU slice (``pip install 'jax[tpu]'``) or for GPUs
(``--topology=h200:8``, two machines ``h200:2x8``; ``pip install 'jax[cuda13]'``) on a machine without one, and prints
bytes a chip, operations, collectives and a roofline estimate. Exit codes: 0 everything fits, 1 something does not, 2 a
mistake that the user can mend.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from lawcat_jax import command_line
from lawcat_jax.errors import UserError, run_main

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:4x4",
    "TPU slice: v4, v5e, v5p, v6e or tpu7x with its shape; or GPUs: a100, h100, h200 or b200 with their number (h200:8) "
    "or machines x GPUs of each (h200:2x8).",
)
_STAGES = flags.DEFINE_list("stages", None, "Which of pretrain, stage1, stage2, prefill, decode; default: all enabled.")
_PREFILL_LENGTH = flags.DEFINE_integer("prefill_length", 0, "Tokens of a prefill; default: the last stage's length.")
_PREFILL_BATCH = flags.DEFINE_integer("prefill_batch", 0, "Sequences of a prefill; default: one a data x fsdp shard.")
_DECODE_BATCH = flags.DEFINE_integer("decode_batch", 0, "Sequences decoded at once; default: one a data x fsdp shard.")
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of text.")


def main(argv: list[str]) -> int:
    """Compile, report, and say whether everything fits."""
    command_line.no_arguments(argv)
    config = command_line.load_config(_CONFIG)
    from lawcat_jax.analysis import compile_report
    from lawcat_jax.runtime import chips

    compile_report.prepare_environment()
    chip = chips.chip_of(_TOPOLOGY.value)
    names = _programs(config, compile_report)
    sizes = {name: flag.value for name, flag in _SIZES.items()}
    for name, value in sizes.items():
        if value < 0:
            raise UserError(f"--{name}={value}: must be at least 1, or 0 for the default")
    from lawcat_jax.analysis import compile_report_text as aot_text
    from lawcat_jax.runtime import sharding

    model = compile_report.architecture(config)
    devices = compile_report.topology_devices(_TOPOLOGY.value)
    chip = chip.as_devices(len(devices), _TOPOLOGY.value)
    mesh = sharding.make_mesh(config.mesh, devices, rows=sharding.common_rows(config))
    if not _JSON.value:
        print(aot_text.heading(_TOPOLOGY.value, chip, mesh, config), flush=True)
    reports = []
    for name in names:
        options = compile_report.Options(**sizes)
        reports.append(compile_report.compile_program(name, config, model, mesh, chip, options))
        if not _JSON.value:
            print(aot_text.text(reports[-1]), flush=True)
    if _JSON.value:
        print(json.dumps(aot_text.as_json(_TOPOLOGY.value, chip, mesh, reports), indent=1))
    failed = [report for report in reports if not report.fits]
    for report in failed:
        print(f"error: {report.problem}", file=sys.stderr, flush=True)
    return 1 if failed else 0


_SIZES = {"prefill_length": _PREFILL_LENGTH, "prefill_batch": _PREFILL_BATCH, "decode_batch": _DECODE_BATCH}


def _programs(config, compile_report) -> list[str]:
    available = compile_report.programs(config)
    if _STAGES.value is None:
        return available
    for name in _STAGES.value:
        if name not in available:
            raise UserError(f"--stages: {name!r} is not one of this configuration's programs, {', '.join(available)}")
    return list(_STAGES.value)


if __name__ == "__main__":
    run_main(main)
