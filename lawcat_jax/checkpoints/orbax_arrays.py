"""Named arrays in a directory of orbax, written and read with little memory beside the arrays themselves."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.checkpoints import fingerprints
from lawcat_jax.checkpoints.delta import cast as cast_array
from lawcat_jax.checkpoints.delta import is_trained
from lawcat_jax.checkpoints.fingerprints import same_as_stated
from lawcat_jax.checkpoints.hf.mapping import flatten, unflatten
from lawcat_jax.checkpoints.hf.read import Shardings
from lawcat_jax.checkpoints.hf.write import check_leaves
from lawcat_jax.checkpoints.model_json import ModelJson
from lawcat_jax.checkpoints.orbax_errors import is_disk_full, only_one_report, unraisable_hook
from lawcat_jax.errors import UserError

_RESTORE_BYTES = 256 << 20


@contextlib.contextmanager
def _checkpointer(**options: Any) -> Iterator[Any]:
    import jax
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    # For good: the report comes from a thread, often after the error that it belongs to has been raised.
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = unraisable_hook
    only_one_report()
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
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False, **options)
    with ocp.Checkpointer(handler, **options) as checkpointer:
        yield checkpointer


def save_arrays(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Write arrays by '/'-joined path into the new directory ``path``; this process alone.

    Raises:
      OSError: the disk is full.
    """
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


def restore_arrays(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    cast: np.dtype | None,
    shardings: Shardings | None,
    stated: ModelJson,
) -> dict[str, Any]:
    """What :func:`save_arrays` wrote, by path, compared with what model.json says of it.

    What has a fingerprint is read as it is stored, compared, and cast afterwards, a group of arrays at a time.

    Args:
      path: the directory.
      expected: shapes by path.
      cast: dtype of the pretrained part; None keeps the stored one. Mixers and adapters always keep theirs.
      shardings: path -> Sharding or None; without one an array stays on the host.
      stated: the model.json beside it.

    Raises:
      UserError: missing, unreadable, damaged, changed, with other arrays than ``expected``, or values beyond float16.
    """
    import jax
    import orbax.checkpoint as ocp

    path = path.absolute()
    _check_readable(path)
    verify, written = fingerprints.wanted(), stated.params

    def final_dtype(name: str, stored: Any) -> np.dtype:
        base = not is_trained(name)  # the trainable part stays in its own precision
        return cast if base and cast is not None else np.dtype(stored.dtype)

    def checked(name: str) -> bool:
        return verify and not {"hash", "sum"}.isdisjoint(written.get(name, ()))

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
                if checked(name) and not same_as_stated(leaf, written[name]):
                    raise UserError(
                        f"{path}: the contents of {name} have changed since they were written; restore a copy or convert "
                        f"again ({fingerprints.SWITCH}=off in the environment reads them unchecked)"
                    )
                leaves[name] = cast_array(leaf, final_dtype(name, stored[name]), f"{path}: {name}")
    check_leaves(leaves, expected, str(path))
    return leaves


def _check_readable(path: Path) -> None:
    """Tell a directory that is not there, or may not be read, from a damaged one."""
    try:
        if not path.is_dir():
            raise UserError(f"{path.parent}: incomplete, {path.name}/ is missing; convert or save it again")
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
