"""Make a student of a trained student, without training.

    python -m lawcat_jax.edit --checkpoint=<student> --target=<directory> --softmax_layers=3,7
    python -m lawcat_jax.edit --checkpoint=<student> --target=<directory> --gate_parameters=400000 --text=book.txt

``--softmax_layers`` gives layers their softmax attention back (``lawcat_jax.inspect`` ranks them); ``--gate_parameters``
chooses a gate rank for each layer, so that the gates have at most so many parameters and change as little as possible.
"""

from __future__ import annotations

from absl import flags

from lawcat_jax.command_line import no_arguments, not_empty, run_main
from lawcat_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Student: model directory, folder of a run, or small file.")
_TARGET = flags.DEFINE_string("target", "", "Model directory to create.")
_SOFTMAX_LAYERS = flags.DEFINE_list("softmax_layers", None, "Layers, from 0, that get softmax attention back.")
_GATE_PARAMETERS = flags.DEFINE_integer(
    "gate_parameters", None, "Parameters of the gates' two matrices, all layers together, at most.", lower_bound=0
)
_TEXT = flags.DEFINE_string(
    "text",
    None,
    "What gates are measured on: tfds:<name>, hf:<name>, or a path. Default: passkey samples in a wording of their own.",
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Field of the text in its rows.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Rows of the text.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a row. Default: 1024, or the teacher's positions where they are fewer.", lower_bound=16
)
_REVISION = flags.DEFINE_string("revision", None, "Revision of a hub repository.")
_BASE = flags.DEFINE_string("base", None, "Teacher of a student's small file; default: the one that it names.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing model of this program.")


def _layer(item: str) -> int:
    if not item.strip().isdecimal():
        raise UserError(f"--softmax_layers: {item!r} is not the number of a layer (use --softmax_layers=3,7)")
    return int(item)


def main(argv: list[str]) -> None:
    no_arguments(argv)
    not_empty("--softmax_layers", _SOFTMAX_LAYERS.value)
    layers = tuple(_layer(item) for item in _SOFTMAX_LAYERS.value or ())
    from lawcat_jax.analysis.editing.run import edit_checkpoint

    edit_checkpoint(
        _CHECKPOINT.value,
        _TARGET.value,
        gate_parameters=_GATE_PARAMETERS.value,
        softmax_layers=layers,
        text=_TEXT.value,
        text_key=_TEXT_KEY.value,
        samples=_SAMPLES.value,
        length=_LENGTH.value,
        revision=_REVISION.value,
        base=_BASE.value,
        overwrite=_OVERWRITE.value,
    )


if __name__ == "__main__":
    run_main(main)
