"""The teacher's logits of a data set in files: written once, read by every run that is trained on the same samples.

A position keeps the ``k`` largest logits with their ids, and the log-sum-exp of all others, so that the teacher's
distribution over these ids and "any other" is exact. Positions of weight 0 in the divergence are not kept. A folder::

    teacher_logits.json        format, k, vocab_size, rows of each split, and what they were made of (``facts``)
    train/00000.npy            of each position kept, row after row: ids [k], logits [k] float32, rest float32
    train/00000.rows.npy       of each row: the number of positions up to its end, a digest of its tokens and positions
    train/00000.json           SHA-256 of the two files before; written last, so that what has it is complete
    validation/...             the same

Shards hold 64 rows each. What is damaged is refused when the folder is opened, and a row of other tokens when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lawcat_jax.config import DataConfig, MixtureSource, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_file, read_in_one_line, read_json, write_json

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FORMAT = 1
META = "teacher_logits.json"
SHARD_ROWS = 64
ARRAYS = ("teacher_ids", "teacher_logits", "teacher_rest")
"""The arrays of a :class:`~lawcat_jax.data.batch.Batch` that a store adds to its rows."""
_BLOCK = 16 << 20  # bytes read at once when a file is checked
_ROWS = np.dtype([("end", "<i8"), ("digest", "<u8")])


class Kept(NamedTuple):
    """The kept logits of n positions, the largest first; ``rest`` is the log-sum-exp of all others, -inf without any."""

    ids: Int[np.ndarray, "n k"]
    logits: Float[np.ndarray, "n k"]
    rest: Float[np.ndarray, " n"]


def kept_positions(row: Mapping[str, np.ndarray]) -> Int[np.ndarray, " n"]:
    """The positions of a row whose logits are kept: those that count in the divergence."""
    return np.flatnonzero(row["kl_weights"] > 0)


class StoreWriter:
    """Fills a folder shard by shard; what an earlier attempt has finished stays.

    Args:
      directory: created when missing.
      k, vocab_size: kept logits of a position, of how many.
      rows: rows of each split.
      facts: what the logits are of, JSON values.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, directory: str | Path, *, k: int, vocab_size: int, rows: Mapping[str, int], facts: Any):
        self._directory, self._dtype = Path(directory), _records(k, vocab_size)
        meta = {"format": FORMAT, "k": k, "vocab_size": vocab_size, "rows": dict(rows), "facts": facts}
        meta = json.loads(json.dumps(meta))  # as it will be read
        path = self._directory / META
        with read_in_one_line(str(directory)):
            if path.exists():
                found = read_json(path)
                if found != meta | {"facts": without_new_facts(meta["facts"], found.get("facts"))}:
                    raise UserError(
                        f"{directory} holds logits of another teacher, other data or another k; name another"
                    )
            elif self._directory.exists() and (not self._directory.is_dir() or any(self._directory.iterdir())):
                raise UserError(f"{directory} exists and holds something else; name another folder")
            else:
                write_json(path, meta)

    def missing(self, split: str, rows: int) -> list[range]:
        """The rows of each shard of a split that is not there yet."""
        shards = (range(start, min(start + SHARD_ROWS, rows)) for start in range(0, rows, SHARD_ROWS))
        return [shard for shard in shards if not self._path(split, shard.start // SHARD_ROWS, ".json").exists()]

    def write(self, split: str, first: int, rows: Sequence[Mapping[str, np.ndarray]], kept: Sequence[Kept]) -> None:
        """Write the shard whose first row is number ``first``: its rows and their kept logits."""
        records = np.zeros(sum(len(one.rest) for one in kept), self._dtype)
        for name in Kept._fields:
            records[name] = np.concatenate([getattr(one, name) for one in kept])
        table = np.zeros(len(rows), _ROWS)
        table["end"] = np.cumsum([len(one.rest) for one in kept])
        table["digest"] = [_digest(row) for row in rows]
        sums = {}
        for suffix, array in ((".npy", records), (".rows.npy", table)):
            path = self._path(split, first // SHARD_ROWS, suffix)
            with new_file(path) as partial, partial.open("wb") as out:
                np.save(out, array)
            sums[suffix] = _sha256(path)
        write_json(self._path(split, first // SHARD_ROWS, ".json"), sums)

    def _path(self, split: str, shard: int, suffix: str) -> Path:
        return _shard_path(self._directory, split, shard, suffix)


class TeacherStore:
    """A complete folder, whose files are checked on opening (they are read once) and then memory-mapped.

    Attributes: ``k``, ``vocab_size``, ``facts``, ``rows`` by split.

    Raises:
      UserError: no such folder, unfinished, of another format, or damaged.
    """

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        meta = _read_meta(self._directory)
        try:
            self.k, self.vocab_size = int(meta["k"]), int(meta["vocab_size"])
            self.rows: dict[str, int] = {str(split): int(count) for split, count in meta["rows"].items()}
            self.facts: dict[str, Any] = dict(meta["facts"])
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise _damaged(directory, problem) from None
        self._shards = {split: self._open(split, count) for split, count in self.rows.items()}

    def _open(self, split: str, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found, dtype = [], _records(self.k, self.vocab_size)
        for shard in range(-(-rows // SHARD_ROWS)):
            stated = _shard_path(self._directory, split, shard, ".json")
            if not stated.exists():
                raise UserError(f"{self._directory} is not finished: run the command that writes it again")
            arrays = []
            for suffix, expected in ((".npy", dtype), (".rows.npy", _ROWS)):
                path = _shard_path(self._directory, split, shard, suffix)
                with read_in_one_line(str(path)):
                    if _sha256(path) != read_json(stated).get(suffix):
                        raise UserError(f"{path} has changed since it was written; remove {stated}, and write it again")
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                if array.dtype != expected:
                    raise UserError(f"{path} is of another k; write the logits again")
                arrays.append(array)
            found.append((arrays[0], arrays[1]))
        return found

    def arrays(self, split: str, index: int, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The :data:`ARRAYS` of one row, [T, k], [T, k] and [T], zeros at positions that do not count.

        Args:
          split: train or validation.
          index: the row's number in the split; one beyond its end has no position that counts.
          row: its arrays.

        Raises:
          UserError: the store has the logits of other tokens under this number.
        """
        length = len(row["tokens"])
        out = {
            "teacher_ids": np.zeros((length, self.k), np.int32),
            "teacher_logits": np.zeros((length, self.k), np.float32),
            "teacher_rest": np.zeros(length, np.float32),
        }
        positions = kept_positions(row)
        if index >= self.rows.get(split, 0) and not len(positions):
            return out
        shards, (shard, place) = self._shards.get(split, []), divmod(index, SHARD_ROWS)
        if shard >= len(shards) or place >= len(shards[shard][1]) or shards[shard][1]["digest"][place] != _digest(row):
            raise UserError(
                f"{self._directory} has the logits of other tokens for {split} row {index}: the text or the program has "
                "changed since it was written; write it anew"
            )
        records, table = shards[shard]
        start = int(table["end"][place - 1]) if place else 0
        kept = records[start : int(table["end"][place])]
        for name in Kept._fields:
            out[f"teacher_{name}"][positions] = kept[name]
        return out


def without_new_facts(facts: Any, stored: Any) -> Any:
    """``facts`` as the version of the program that wrote ``stored`` would have them: without ``teacher.weights_hash`` and fields of
    ``data`` that it has not, as long as these have their defaults."""
    if not isinstance(stored, Mapping) or not isinstance(stored.get("teacher"), Mapping):
        return facts
    found = dict(facts)
    if "weights_hash" not in stored["teacher"] and "teacher" in facts:
        found["teacher"] = {name: value for name, value in facts["teacher"].items() if name != "weights_hash"}
    if "data" in facts and isinstance(stored.get("data"), Mapping):
        found["data"] = _without_new_fields(facts["data"], stored["data"], DataConfig())
        sources, old = facts["data"].get("mixture", ()), stored["data"].get("mixture", ())
        if sources and isinstance(old, list) and len(old) == len(sources):
            pairs = zip(sources, old, strict=True)
            found["data"]["mixture"] = [_without_new_fields(new, before, MixtureSource()) for new, before in pairs]
    return found


def _without_new_fields(new: Mapping[str, Any], old: Any, default: DataConfig | MixtureSource) -> dict[str, Any]:
    defaults = json.loads(json.dumps(to_dict(default)))
    return {name: value for name, value in new.items() if name in old or value != defaults.get(name, ...)}


def stored_count(directory: str | Path) -> int:
    """k of a store, without looking at its shards.

    Raises:
      UserError: no such folder, of another format, or damaged.
    """
    meta = _read_meta(Path(directory))  # a UserError is a ValueError
    try:
        return int(meta["k"])
    except (KeyError, TypeError, ValueError) as problem:
        raise _damaged(directory, problem) from None


def _read_meta(directory: Path) -> dict[str, Any]:
    if not (directory / META).is_file():
        raise UserError(f"{directory} holds no teacher logits; write them with python -m lawcat_jax.teacher_logits")
    meta = read_json(directory / META)
    if meta.get("format") != FORMAT:
        raise UserError(f"{directory}: format {meta.get('format')!r}, this program reads {FORMAT}; write it again")
    return meta


def _damaged(directory: str | Path, problem: Exception) -> UserError:
    return UserError(f"{directory}: {META} is damaged ({problem!r}); write the logits again")


def _records(k: int, vocab_size: int) -> np.dtype:
    ids = "<u2" if vocab_size <= 1 << 16 else "<i4"
    return np.dtype([("ids", ids, (k,)), ("logits", "<f4", (k,)), ("rest", "<f4")])


def _shard_path(directory: Path, split: str, shard: int, suffix: str) -> Path:
    return directory / split / f"{shard:05d}{suffix}"


def _digest(row: Mapping[str, np.ndarray]) -> int:
    """Of a row's valid tokens, where their documents begin, and its positions that count."""
    length = int(row["lengths"])
    digest = hashlib.blake2b(digest_size=8)
    for array in (row["tokens"][:length], row.get("segment_ids", np.zeros(0))[:length], kept_positions(row)):
        digest.update(np.ascontiguousarray(array, "<i4").tobytes() + b"|")
    return int.from_bytes(digest.digest(), "little")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
