"""How fast does it train here? ``python -m lawcat_jax.throughput --config=configs/llama1b.py:paper_gpu [--config.<field>=<value>]``.

Builds the configuration's model with random weights, times the steps of both stages that the trainer would run on the
devices at hand, and then the same model in PyTorch with fla's ``chunk_gla`` on the first of them. Prints a table and
writes ``throughput.json`` in ``--out`` after every measurement. Exit codes: 0 measured, 1 a stage was not, 2 a mistake
that the user can mend; a peer that is not installed is noted and does not count.

``--mesh_sweep='data=1;data=2;fsdp=4;fsdp=2,tensor=2'`` measures both stages and the prefill of a prompt on each of these
meshes, of as many of the machine's devices as the mesh has, without a peer: tokens/s, efficiency against the first mesh,
MFU, bytes a device, and beside them what ``aot`` predicts. Writes ``mesh_sweep.json`` and ``mesh_sweep.md`` after every
row. A mesh that is larger than the machine is a row without numbers. Every device gets as many tokens as on the first
mesh; ``batch=``, ``length=``, ``prefill_batch=`` and ``prefill_length=`` in a mesh say otherwise.
"""

from __future__ import annotations

import shlex
import sys

from absl import flags

from lawcat_jax import command_line
from lawcat_jax.analysis.throughput import run

_CONFIG = command_line.define_config()
_STAGES = flags.DEFINE_list("stages", None, "Which of stage1, stage2 and (in a sweep) prefill; default: all enabled.")
_SWEEP = flags.DEFINE_string("mesh_sweep", None, "Meshes to measure, such as 'data=1;data=2;fsdp=2,tensor=2'.")
_PREDICT = flags.DEFINE_string(
    "predict",
    "auto",
    "Whose prediction by aot stands in a sweep: auto (the machine's devices), none, or h200, v5e, ...",
)
_BATCH = flags.DEFINE_integer(
    "batch", 0, "Sequences per step over all devices (of a sweep's first mesh); default: the configuration's."
)
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens per sequence; default: the configuration's.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps between two synchronisations, of which one time is taken.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times taken; the median counts.")
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before the first time is taken.")
_SECONDS = flags.DEFINE_float("seconds", 0.0, "Time for everything, compilation included; 0: no limit.")
_PEER = flags.DEFINE_string("peer", "torch", "What to compare with: torch, or none.")
_GLA = flags.DEFINE_string("gla", "fla", "The peer's gated linear attention: fla, or reference (slow, for tests).")
_NORMALISERS = flags.DEFINE_list("normalisers", list(run.NORMALISERS[:2]), "Forms of the peer's normaliser to try.")
_OUT = flags.DEFINE_string("out", "throughput_results", "Folder for the results.")


def main(argv: list[str]) -> int:
    """Measure, and say whether all stages were."""
    command_line.no_arguments(argv)
    command_line.not_empty("--stages", _STAGES.value)
    config = command_line.load_config(_CONFIG)
    options = run.Options(
        stages=_STAGES.value or [],
        batch=_BATCH.value,
        length=_LENGTH.value,
        steps=_STEPS.value,
        repeats=_REPEATS.value,
        warmup=_WARMUP.value,
        seconds=_SECONDS.value,
        peer=_PEER.value,
        gla=_GLA.value,
        normalisers=tuple(_NORMALISERS.value),
        out=_OUT.value,
        command=shlex.join(["python", "-m", "lawcat_jax.throughput", *sys.argv[1:]]),
    )
    if _SWEEP.value is not None:
        from lawcat_jax.analysis.throughput import sweep  # imports jax, for which the environment is prepared only now

        return sweep.sweep(config, options, _SWEEP.value, _PREDICT.value)
    return run.benchmark(config, options)


if __name__ == "__main__":
    command_line.run_main(main, cache_programs=False)
