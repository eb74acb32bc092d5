"""Store the teacher's largest logits on what stage 2 reads, for runs that then need no teacher beside the student.

    python -m lawcat_jax.teacher_logits --config=configs/smollm2.py --target=logits/smollm2 --k=64
    python -m lawcat_jax.train --config=configs/smollm2.py --config.stage2.teacher_logits=logits/smollm2

Interrupted and run again, it goes on where it was. Teacher, tokenizer, data, lengths and seed of the runs must be those of
the config that it was written with; all else may differ.
"""

from __future__ import annotations

from absl import flags

from lawcat_jax import command_line

_CONFIG = command_line.define_config()
_TARGET = flags.DEFINE_string("target", "", "Folder to write.")
_K = flags.DEFINE_integer(
    "k", 64, "Largest logits to keep of each position; the others are kept as one sum.", lower_bound=1
)


def main(argv: list[str]) -> None:
    command_line.end_when_terminated()
    command_line.no_arguments(argv)
    config = command_line.load_config(_CONFIG)
    from lawcat_jax.training.teacher_logits import write_teacher_logits

    write_teacher_logits(config, _TARGET.value, _K.value)


if __name__ == "__main__":
    command_line.run_main(main)
