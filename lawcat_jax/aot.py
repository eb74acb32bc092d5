"""Will it fit? ``python -m lawcat_jax.aot --config=configs/llama1b.py --topology=v5e:4x4 [--config.<field>=<value>]``.

Compiles every stage's train step, prefill and decoding for a TPU slice (``pip install 'jax[tpu]'``) or for GPUs
(``--topology=h200:8``, two machines ``h200:2x8``; ``pip install 'jax[cuda13]'``) on a machine without one, and prints
bytes per chip, operations, collectives and a roofline estimate. Exit codes: 0 everything fits, 1 something does not, 2 a
mistake that the user can mend.
"""

from __future__ import annotations

from absl import flags

from lawcat_jax import command_line

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
    command_line.not_empty("--stages", _STAGES.value)
    config = command_line.load_config(_CONFIG)
    from lawcat_jax.analysis.fit import print_fit

    return print_fit(
        config,
        topology=_TOPOLOGY.value,
        programs=_STAGES.value,
        sizes={
            "prefill_length": _PREFILL_LENGTH.value,
            "prefill_batch": _PREFILL_BATCH.value,
            "decode_batch": _DECODE_BATCH.value,
        },
        as_json=_JSON.value,
    )


if __name__ == "__main__":
    command_line.run_main(main, cache_programs=False)
