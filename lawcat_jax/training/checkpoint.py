"""Checkpoints of one stage: orbax, asynchronous, verified when loaded.

Layout: ``<directory>/<step>/{state,best,meta}``. ``state`` and ``best`` are plain nested dicts of arrays, ``meta`` is
JSON: what the host knows (iterator, best loss, ...), the shapes and dtypes of all leaves, a fingerprint of each, and a
digest of all this (checkpoints of earlier versions have none). A fingerprint is a ``hash``
(:mod:`lawcat_jax.runtime.array_hash`); earlier versions wrote a ``sum``, which does not notice that elements changed places.

Orbax writes a step under a temporary name and commits it at the end, so a killed save leaves no half checkpoint. It
does not notice damage afterwards, and does not fall back: both happen here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lawcat_jax.checkpoints.orbax_errors import is_disk_full, only_one_report, unraisable_hook
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed
from lawcat_jax.runtime.array_hash import array_hash, element_bits
from lawcat_jax.runtime.sharding import path_name

Tree = Any

FORMAT = 2
_UNSIGNED_FORMAT = 1  # of earlier versions: no digest of the metadata


class Restored(NamedTuple):
    """A checkpoint that passed every check."""

    step: int
    trees: dict[str, Tree]
    meta: dict[str, Any]


def _digest(meta: dict[str, Any]) -> str:
    """Hex digest of the metadata but for the digest itself, as JSON returns it."""
    values = json.loads(json.dumps({name: value for name, value in meta.items() if name != "digest"}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class DamagedError(Exception):
    """A checkpoint that must not be used; the message says why."""


Kind = Literal["hash", "sum"]


@functools.partial(jax.jit, static_argnames="kind")
def _fingerprints(leaves: list[jax.Array], kind: Kind) -> jax.Array:
    """u32 [leaves, words]: a fingerprint of each leaf, the same on any mesh: its hash, or the sum of its bits."""
    if kind == "hash":
        return jnp.stack([array_hash(leaf) for leaf in leaves])
    return jnp.stack([jnp.sum(element_bits(leaf), dtype=jnp.uint32, keepdims=True).reshape(1) for leaf in leaves])


def tree_digest(tree: Tree, kind: Kind = "hash") -> str:
    """Hex digest of the paths, shapes, dtypes and bits of a tree of arrays, the same on any mesh. The kind ``sum`` is that of
    earlier versions, for comparison with what they wrote: it does not notice that elements of an array changed places."""
    return hashlib.sha256(json.dumps(_describe(tree, kind), sort_keys=True).encode()).hexdigest()


@jax.jit
def copy(tree: Tree) -> Tree:
    """A copy with buffers of its own, for trees whose buffers will be donated."""
    return jax.tree.map(jnp.copy, tree)


def _describe(tree: Tree, kind: Kind = "hash") -> dict[str, dict[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    words = np.asarray(_fingerprints([leaf for _, leaf in leaves], kind)) if leaves else []
    return {
        path_name(path): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            kind: int(found[0]) if kind == "sum" else "".join(f"{word:08x}" for word in found),
        }
        for (path, leaf), found in zip(leaves, words, strict=True)
    }


def abstract(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of a tree of arrays: what to restore into, on any mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpointer:
    """Saves and restores one stage. ``directory`` may be a bucket path; ``keep`` newest steps stay."""

    ITEMS = ("state", "best", "meta")

    def __init__(self, directory: str, *, keep: int, primary: bool = True):
        import orbax.checkpoint as ocp

        only_one_report()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, unraisable_hook
        self._ocp, self._primary = ocp, primary
        self._path = epath.Path(directory)
        if "://" not in str(directory):
            self._path = self._path.absolute() if hasattr(self._path, "absolute") else self._path.resolve()
        self._saved: int | None = None
        try:
            self._manager = ocp.CheckpointManager(
                self._path,
                item_names=self.ITEMS,
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            )
        except OSError as problem:
            raise UserError(f"{self._path}: cannot keep checkpoints there ({problem.strerror or problem})") from problem

    @property
    def last_saved(self) -> int | None:
        """Step of the newest save that this object has begun or restored."""
        return self._saved

    def save(self, step: int, trees: dict[str, Tree], meta: dict[str, Any]) -> None:
        """Begin a save; the arrays may be donated as soon as this returns.

        Raises:
          UserError: this save could not begin, or an earlier one failed (a full disk, a lost mount).
        """
        self._check_writable()
        args = self._ocp.args
        described = {name: _describe(tree) for name, tree in trees.items()}
        if jax.default_backend() == "cpu":  # there, "host copies" are views of the buffers to be donated
            trees = copy(trees)
        items = {name: args.StandardSave(tree) for name, tree in trees.items()}
        meta = {"format": FORMAT, **meta, "step": step, "trees": described}
        meta["digest"] = _digest(meta)
        try:
            self._manager.save(step, args=args.Composite(**items, meta=args.JsonSave(meta)), force=True)
        except Exception as problem:
            raise self._failed(problem) from problem
        self._saved = step

    def _check_writable(self) -> None:
        # After a save that could not even begin, orbax' threads wait for minutes for what it did not write.
        if not self._primary or "://" in str(self._path):
            return
        try:
            with tempfile.TemporaryFile(dir=os.fspath(self._path)):
                pass
        except OSError as problem:
            if not is_disk_full(problem):
                raise self._failed(problem) from problem

    def wait(self) -> None:
        """Wait until every begun save is on disk.

        Raises:
          UserError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as problem:
            raise self._failed(problem) from problem

    def check(self) -> None:
        """Look whether a save that goes on in the background has failed.

        Raises:
          UserError: it has.
        """
        try:
            self._manager.check_for_errors()
        except Exception as problem:
            raise self._failed(problem) from problem

    def _failed(self, problem: Exception) -> UserError:
        text = " ".join(str(problem).split())
        text = "no space left on the device; free some, and" if is_disk_full(problem) else f"{text[:300]};"
        return UserError(
            f"checkpoint in {self._path} could not be written: {text} run the same command again (finished "
            "checkpoints are kept)"
        )

    def restore(
        self, targets: dict[str, Tree], accept: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> Restored | None:
        """The newest checkpoint that loads, or None when there is none at all.

        ``targets`` gives per item the tree of ShapeDtypeStructs (with shardings) to load. ``accept`` gets what was saved
        as ``meta`` and raises where it makes no sense. Checkpoints newer than the one returned are moved aside as
        ``<step>.damaged``.

        Raises:
          UserError: checkpoints exist and none loads; or ``accept`` raised it.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._load(step, targets)
                accept(restored.meta)
            except UserError:
                raise
            except Exception as problem:  # whatever orbax, tensorstore or json raise for broken files
                problems[step] = " ".join(str(problem).split())[:300] or type(problem).__name__
                print(f"checkpoint {self._path / str(step)} is damaged: {problems[step]}", flush=True)
                continue
            self._move_aside(problems)
            self._saved = step
            return restored
        if steps:
            raise UserError(
                f"{self._path}: none of the checkpoints {steps} loads (newest: {problems[steps[0]]}). Restore them "
                "from a backup, or remove that folder to train the stage anew"
            )
        return None

    def _load(self, step: int, targets: dict[str, Tree]) -> Restored:
        args = self._ocp.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if not isinstance(meta, dict) or meta.get("step") != step:
            raise DamagedError("meta does not describe this step")
        if meta.get("format") not in (FORMAT, _UNSIGNED_FORMAT):
            raise DamagedError(f"format {str(meta.get('format'))[:20]!r}, which this program does not read")
        if meta["format"] == FORMAT and meta.get("digest") != _digest(meta):
            raise DamagedError("its metadata has changed since it was saved")
        names = list(meta["trees"])
        if "state" not in names or not set(names) <= set(targets):
            raise DamagedError(f"unexpected items {names}")
        wanted = {name: args.StandardRestore(targets[name]) for name in names}
        found = self._manager.restore(step, args=args.Composite(**wanted))
        trees = {name: found[name] for name in names}
        for name in names:
            _check(trees[name], targets[name], meta["trees"][name], name)
        return Restored(step, trees, meta)

    def _move_aside(self, steps: Iterable[int]) -> None:
        if self._primary:
            for step in steps:
                target = self._path / f"{step}.damaged"
                try:
                    if target.exists():
                        target.rmtree()
                    (self._path / str(step)).rename(target)
                except OSError as problem:
                    raise UserError(
                        f"{self._path / str(step)} is damaged and cannot be moved aside ({problem.strerror or problem})"
                    ) from problem
        if steps:
            distributed.barrier("checkpoint_move_aside")
            self._manager.reload()

    def close(self) -> None:
        """Wait for saves and release the manager's threads."""
        with contextlib.suppress(Exception):  # of a save; whoever wants to know calls wait
            self._manager.close()
        sys.unraisablehook = self._unraisable


def _check(tree: Tree, target: Tree, saved: dict[str, dict], item: str) -> None:
    """Every expected leaf is there, with its shape, dtype and the bits that were saved."""
    expected = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    of_earlier_version = any("sum" in leaf for leaf in saved.values())
    found = _describe(tree, "sum" if of_earlier_version else "hash")
    for path, leaf in expected.items():
        if path not in found or path not in saved:
            raise DamagedError(f"{item}: {path} is missing")
        if tuple(found[path]["shape"]) != tuple(leaf.shape) or found[path]["dtype"] != str(leaf.dtype):
            raise DamagedError(f"{item}: {path} is {found[path]}, expected {leaf.shape} {leaf.dtype}")
        if found[path] != saved[path]:
            raise DamagedError(f"{item}: the contents of {path} have changed since they were saved")
    if extra := sorted(set(found) - set(expected)):
        raise DamagedError(f"{item}: unexpected {', '.join(extra[:5])}")
