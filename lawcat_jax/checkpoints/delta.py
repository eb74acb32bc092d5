"""A student as one small file: what was trained, without the teacher that it was trained from.

A student is its teacher plus a few megabytes. The file is a safetensors file with the arrays of ``mixers`` and ``lora``
under their own paths; one metadata entry, ``lawcat_delta``, is a JSON object:

    format_version   1
    model, attention, lora   the configurations, as in model.json
    teacher          source and revision as the run named them; ``weights``, a dtype and a fingerprint for each
                     parameter of the student's pretrained part
    extra            of the student: training length, defaults of its evaluation, stage
    recipe           configuration and results of the run that made it, where they were known
    sha256           of all of the above and of the arrays, checked when the file is opened

The fingerprint of a parameter is the SHA-256 of its shape, written as ``[2, 3]``, and of its values as little-endian
float32 in row-major order. It does not depend on the number format as long as no rounding happens: a bfloat16 teacher
fits a student whose copy of it is float32. Where the student's copy was rounded (a float32 teacher trained on in
bfloat16), the teacher is rounded to the recorded dtype first, so that a join gives the student's own bits.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.checkpoints.hf.mapping import base_shapes
from lawcat_jax.checkpoints.hf.tensors import CODES, DTYPES, open_tensors, read_metadata, write_tensors
from lawcat_jax.checkpoints.hf.values import check_float16
from lawcat_jax.checkpoints.hf.write import check_leaves
from lawcat_jax.checkpoints.stored_configs import configs_from_json, configs_to_json, extra_from_json
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_file

SUFFIX = ".safetensors"
FORMAT_VERSION = 1
_KEY = "lawcat_delta"
_BLOCK = 1 << 22  # values hashed at once
_FLOAT32 = np.dtype(np.float32)
# Rounding these moves the half-life of a state by more than any other parameter moves anything, and they are small.
_KEPT_FLOAT32 = ("gate", "gate_down", "gate_up", "window_factor")


def is_trained(path: str) -> bool:
    """Whether a parameter belongs to what a student adds to its teacher."""
    return path.startswith(("mixers/", "lora/"))


def is_delta(source: Any) -> bool:
    """Whether ``source`` is such a file, judged by its header."""
    path = Path(source).expanduser()
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        return _KEY in read_metadata(path)
    except UserError:
        return False


def fingerprint(array: Any) -> str:
    """The fingerprint of one parameter, see above; 64 hexadecimal digits."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(str(list(array.shape)).encode())
    values = array.reshape(-1)
    for start in range(0, values.size, _BLOCK):
        digest.update(values[start : start + _BLOCK].astype("<f4", copy=False))
    return digest.hexdigest()


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, str]:
    """:func:`fingerprint` of every parameter by path, several at a time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing runs outside the interpreter's lock
        return dict(zip(leaves, pool.map(fingerprint, leaves.values()), strict=True))


class Delta:
    """An opened file: its configurations are read and its contents checked.

    Attributes: ``path``; ``model``, ``attention``, ``lora``; ``teacher`` and ``revision`` as the run named them (None
    where unknown); ``extra``; ``recipe``.

    Raises:
      UserError: unreadable, of another format version, or with contents that are not those that were written.
    """

    model: ModelConfig
    attention: AttentionConfig
    lora: LoraConfig | None

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        try:
            values = json.loads(read_metadata(self.path).get(_KEY, "null"))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{self.path}: not a student's small file (as convert --to=delta writes)")
        if values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: format version {values.get('format_version')!r}, but this program reads "
                f"{FORMAT_VERSION}; write it again with convert --to=delta"
            )
        arrays = {}
        for name, tensor in open_tensors(self.path).items():
            if tensor.dtype is None:
                raise UserError(f"{self.path}: {name} is {tensor.code}, supported: {', '.join(DTYPES)}")
            arrays[name] = tensor.rows(0, tensor.shape[0]) if tensor.shape else np.empty((), tensor.dtype)
        stated = values.pop("sha256", None)
        if stated != _content(values, arrays):
            raise UserError(f"{self.path}: damaged, its contents are not those that were written; get a fresh copy")
        self.model, attention, self.lora = configs_from_json(values, str(self.path))
        teacher = values.get("teacher")
        if attention is None or not isinstance(teacher, dict) or not isinstance(teacher.get("weights"), dict):
            raise UserError(f"{self.path}: incomplete; write it again with convert --to=delta")
        self.attention = attention
        self.teacher, self.revision = teacher.get("source"), teacher.get("revision")
        self._weights: dict[str, dict[str, str]] = teacher["weights"]
        self.extra, self.recipe = extra_from_json(values, str(self.path)), values.get("recipe")
        self._arrays = arrays

    def check_architecture(self, base: ModelConfig, where: str) -> None:
        """Refuse a base of another shape, before its weights are read; token ids may differ.

        Raises:
          UserError: naming the fields that differ.
        """
        a, b = to_dict(self.model), to_dict(base)
        differing = [name for name in a if not name.endswith(("token_id", "token_ids")) and a[name] != b[name]]
        if differing:
            listed = ", ".join(f"{name} {b[name]!r} instead of {a[name]!r}" for name in differing)
            raise UserError(f"{where} is not the teacher of {self.path}: it has {listed}")

    def join(self, base: dict[str, Any], where: str) -> dict[str, np.ndarray]:
        """Every parameter of the student, bit for bit.

        Args:
          base: parameters of the teacher by path; emptied on the way, to hold one copy at a time.
          where: named in messages.

        Raises:
          UserError: ``base`` is not the teacher, or mixers or adapters do not fit the configurations.
        """
        base = {path: base.pop(path) for path in list(base) if not is_trained(path)}
        check_base(base, self._weights, where=where, student=str(self.path))
        return base | {path: np.asarray(array).astype(np.float32) for path, array in self._arrays.items()}


def check_base(base: dict[str, Any], weights: Mapping[str, Mapping[str, str]], *, where: str, student: str) -> None:
    """Bring a teacher's parameters to the recorded dtypes, in place, and compare their fingerprints.

    Raises:
      UserError: they are not the ones that were recorded.
    """
    problem = None
    if base.keys() != weights.keys():
        problem = "it has other parameters"
    else:
        for path, entry in weights.items():
            dtype = {dtype.name: dtype for dtype in CODES}.get(entry.get("dtype", ""))
            if dtype is None:
                raise UserError(f"{student}: {path} has the unknown dtype {entry.get('dtype')!r}")
            base[path] = cast(base[path], dtype, path)
        found = fingerprints(base)
        differing = [path for path, entry in weights.items() if found[path] != entry.get("sha256")]
        if differing:
            problem = f"{len(differing)} of {len(found)} parameters differ, for example {differing[0]}"
    if problem:
        raise UserError(
            f"{where} is not the teacher that {student} was trained from ({problem}); name that with --base"
        )


def cast(array: Any, dtype: np.dtype, where: str) -> Any:
    """``array``, of numpy or jax, in another floating-point format.

    Raises:
      UserError: a finite value does not fit.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype == np.float16:
        check_float16(array, out, where)
    return out


def record(params: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Dtype and fingerprint of each pretrained parameter, as the file stores them."""
    base = {path: leaf for path, leaf in params.items() if not is_trained(path)}
    found = fingerprints(base)
    return {path: {"dtype": str(leaf.dtype), "sha256": found[path]} for path, leaf in base.items()}


def write_delta(
    target: str | Path,
    *,
    model: ModelConfig,
    attention: AttentionConfig,
    lora: LoraConfig | None,
    params: Mapping[str, Any],
    teacher: str | None,
    revision: str | None = None,
    weights: Mapping[str, Mapping[str, str]] | None = None,
    extra: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
) -> int:
    """Write a student's mixers and adapters as one file; returns its bytes.

    Args:
      target: the file, ``*.safetensors``; it appears whole or not at all.
      model, attention, lora: the student's configurations.
      params: every parameter of the student by path.
      teacher, revision: where the pretrained part comes from.
      weights: what :func:`record` says of ``params``, if it is known already.
      extra, recipe: see the module.
      dtype: of the arrays; None keeps them (float32). Gates and window factors stay float32.
      overwrite: replace an existing file of this kind.

    Raises:
      UserError: the target exists and may not be replaced, or values that do not fit ``dtype``.
    """
    target = Path(target)
    check_delta_target(target, overwrite=overwrite)
    check_leaves(params, base_shapes(model), f"cannot write {target}", partial=True)
    arrays = {}
    for path in sorted(path for path in params if is_trained(path)):
        kept = any(name in _KEPT_FLOAT32 for name in path.split("/"))
        array = np.asarray(params[path])
        arrays[path] = array if dtype is None else cast(array, _FLOAT32 if kept else dtype, path)
    values = {
        "format_version": FORMAT_VERSION,
        **configs_to_json(model, attention, lora),
        "teacher": {"source": teacher, "revision": revision, "weights": dict(weights or record(params))},
        "extra": dict(extra or {}),
        "recipe": None if recipe is None else dict(recipe),
    }
    values = json.loads(json.dumps(values))  # as it will be read: tuples become lists
    values["sha256"] = _content(values, arrays)
    entries = [(path, array.dtype, array.shape, lambda array=array: array) for path, array in arrays.items()]
    with new_file(target) as temporary:
        write_tensors(temporary, entries, metadata={_KEY: json.dumps(values)}, hashes=False)
    return target.stat().st_size


def check_delta_target(target: str | Path, *, overwrite: bool) -> None:
    """Refuse a target that is no ``*.safetensors`` file, or that would be lost.

    Raises:
      UserError: saying which.
    """
    target = Path(target)
    if target.suffix != SUFFIX:
        raise UserError(f"--to=delta writes one file: give --target a name that ends in {SUFFIX}, not {target}")
    if target.is_dir():
        raise UserError(f"{target} is a directory; --to=delta writes one file")
    if target.exists() and not (overwrite and is_delta(target)):
        hint = "it is no student's small file, so it is not replaced" if overwrite else "pass --overwrite to replace it"
        raise UserError(f"{target} exists; {hint}")


def _content(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path, array in sorted(arrays.items()):
        digest.update(f"\n{path} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
