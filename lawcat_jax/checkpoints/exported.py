"""What an exported student looks like on disk (``convert --to=transformers``), and how it is read back.

Names are those of the modules in ``torch/modeling_lawcat.py``. Pretrained matrices are [out, in], as everywhere in torch;
mixers and adapters keep our own layout, one array for each layer. Ours stack the layers on axis 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lawcat_jax.checkpoints.delta import cast, is_trained
from lawcat_jax.checkpoints.fingerprints import SWITCH, check_files, wanted
from lawcat_jax.checkpoints.hf.config_map import token_ids
from lawcat_jax.checkpoints.hf.mapping import linearised_layers, unflatten
from lawcat_jax.checkpoints.hf.read import GENERATION, Progress, Shardings, collect_tensors, stated_ids
from lawcat_jax.checkpoints.hf.tensors import read_metadata
from lawcat_jax.checkpoints.stored_configs import Configs, configs_from_json, content_digest, extra_from_json
from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json

KEY = "lawcat"  # of config.json, and its model_type
FILES = "lawcat_files"  # in the metadata of the weights: JSON, {name: SHA-256} of the tokenizer's files
FORMAT_VERSION = 1
_LAYER = "model.layers.{layer}."
_TOP = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_RENAMED = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}


class Name(NamedTuple):
    """Tensor name, with ``{layer}`` where there is one for each layer, and whether it is our kernel transposed."""

    torch: str
    transpose: bool

    @property
    def stacked(self) -> bool:
        """Whether there is one for each layer."""
        return "{layer}" in self.torch


def torch_name(path: str) -> Name:
    """Where a parameter of ours stands in the torch model."""
    if path in _TOP:
        return Name(_TOP[path], path.endswith("kernel"))
    first, *parts = path.split("/")
    if is_trained(path):
        block = "mixer" if first == "mixers" else "lora"
        return Name(f"{_LAYER}self_attn.{block}.{'.'.join(parts)}", False)
    *modules, leaf = parts
    modules = ["self_attn" if module == "attention" else _RENAMED.get(module, module) for module in modules]
    return Name(f"{_LAYER}{'.'.join(modules)}.{'bias' if leaf == 'bias' else 'weight'}", leaf == "kernel")


def layers_of(path: str, model: ModelConfig, attention: AttentionConfig | None) -> tuple[int, ...]:
    """Numbers of the layers that the rows of a stacked parameter belong to."""
    return linearised_layers(model, attention) if is_trained(path) else tuple(range(model.num_layers))


def is_exported(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of an exported student."""
    return values.get("model_type") == KEY or KEY in values


class ExportedCheckpoint:
    """An opened directory of ``convert --to=transformers``, also after transformers has saved it again.

    Fingerprints of arrays and of the tokenizer's files are in the metadata of the weights, which transformers does not write:
    what it has saved is checked by its configuration alone.

    Attributes: ``model``, ``attention``, ``lora``, ``extra``.

    Raises:
      UserError: a configuration that is damaged, changed or of another version, or damaged files.
    """

    def __init__(self, directory: Path, shapes: Any):
        values = read_json(directory / "config.json").get(KEY)
        where = f"{directory / 'config.json'}: {KEY}"
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            version = values.get("format_version") if isinstance(values, dict) else None
            raise UserError(f"{where}: format version {version!r}, but this program reads {FORMAT_VERSION}")
        self.directory = directory
        self.extra: dict[str, Any] = extra_from_json(values, where)
        self.configs: Configs = configs_from_json(values, where)
        written = content_digest(*self.configs, self.extra)
        for name, value in token_ids(stated_ids(directory / GENERATION)).items():
            setattr(self.configs[0], name, value)
        self._shapes: dict[str, tuple[int, ...]] = shapes(*self.configs)
        self._tensors = collect_tensors(directory)
        self._check()
        if values.get("digest") not in (None, written):
            raise UserError(
                f"{where}: changed since it was written (its digest differs); restore a copy or convert again. If you edited it "
                'on purpose, remove its line "digest"'
            )
        self._check_files()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _names(self, path: str) -> list[str]:
        name = torch_name(path)
        if not name.stacked:
            return [name.torch]
        return [name.torch.format(layer=layer) for layer in layers_of(path, *self.configs[:2])]

    def _check(self) -> None:
        expected = {}
        for path, shape in self._shapes.items():
            name = torch_name(path)
            own = shape[1:] if name.stacked else shape
            expected |= dict.fromkeys(self._names(path), own[::-1] if name.transpose else own)
        problems = [f"{name} is missing" for name in expected if name not in self._tensors]
        tied = {"lm_head.weight"} if self.configs[0].tie_embeddings else set()
        problems += [f"{name} is unexpected" for name in self._tensors if name not in expected and name not in tied]
        for name, shape in expected.items():
            tensor = self._tensors.get(name)
            if tensor is not None and tensor.shape != shape:
                problems.append(f"{name} is {list(tensor.shape)}, should be {list(shape)}")
            elif tensor is not None and tensor.dtype is None:
                problems.append(f"{name} is {tensor.code}, which is not supported")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(f"{self.directory}: tensors do not fit config.json: {'; '.join(problems[:5])}{more}")

    def _check_files(self) -> None:
        files = {tensor.file for tensor in self._tensors.values()}
        text = read_metadata(min(files)).get(FILES, "{}") if files else "{}"
        try:
            stated = json.loads(text)
        except ValueError:
            stated = None
        if not isinstance(stated, dict):
            raise UserError(f"{min(files)}: its metadata {FILES} is damaged; get a fresh copy or convert again")
        if wanted():
            check_files(
                self.directory, stated, f"if you did it on purpose, {SWITCH}=off in the environment reads it unchecked"
            )

    def params(self, *, dtype: np.dtype | None, shardings: Shardings | None, progress: Progress) -> dict[str, Any]:
        """Every parameter as a plain nested dict; mixers and adapters in float32.

        Args:
          dtype: of the pretrained part; None keeps the stored one.
          shardings: path -> Sharding or None.
          progress: called with the bytes read.

        Raises:
          UserError: a file ends early, or a value does not fit into float16.
        """
        leaves = {}
        for path in self._shapes:
            name = torch_name(path)
            rows = []
            for tensor in (self._tensors[each] for each in self._names(path)):
                array = tensor.rows(0, tensor.shape[0])
                progress(array.nbytes)
                rows.append(array.T if name.transpose else array)
            kinds = {row.dtype for row in rows}
            stored = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # where layers differ: no loss
            wanted = np.dtype(np.float32) if is_trained(path) else dtype or stored
            rows = [cast(row, wanted, path) for row in rows]
            leaf = np.stack(rows) if name.stacked else np.ascontiguousarray(rows[0])
            sharding = None if shardings is None else shardings(path)
            if sharding is not None:
                import jax

                leaf = jax.make_array_from_callback(leaf.shape, sharding, lambda index, leaf=leaf: leaf[index])
            leaves[path] = leaf
        return unflatten(leaves)
