"""Hugging Face checkpoints -> our parameters, streamed so that one copy of the model is held at most."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.checkpoints.hf.config_map import generation_ids, model_config_from_hf
from lawcat_jax.checkpoints.hf.mapping import Slot, base_shapes, hf_slots, ignored, unflatten
from lawcat_jax.checkpoints.hf.tensors import DTYPES, StoredTensor, Tensor, open_tensors
from lawcat_jax.checkpoints.hf.values import check_float16
from lawcat_jax.config import ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json
from lawcat_jax.runtime import network

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
GENERATION = "generation_config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LISTED = 20  # names per kind of problem in one message

Progress = Callable[[int], object]  # called with bytes done
Shardings = Callable[[str], Any]  # path -> jax.sharding.Sharding | None


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The local directory of a path or hub id; hub files are downloaded to the Hugging Face cache.

    Raises:
      UserError: there is neither such a directory nor such a repository, or no network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source} is a file; name the checkpoint's directory")
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"no such directory: {source}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UserError(f"no such directory: {source} (and huggingface_hub is not installed)") from None
    network.hub_or_offline()
    # Only what is read here: repositories also carry .bin, .pth and "consolidated" copies of the weights.
    # The configuration of an adapter, so that one beside the weights is noticed.
    patterns = ["config.json", GENERATION, "model*.safetensors", INDEX, "adapter_config.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"{source}: gated on the Hugging Face hub; accept its licence there and run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{source}: the Hugging Face hub has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{source}: neither a directory here nor a public repository on the Hugging Face hub") from None
    except Exception as problem:  # network libraries differ: requests, httpx, OSError, LocalEntryNotFoundError
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        if not network.hub_or_offline():
            first = "no connection, or HF_HUB_OFFLINE is set, and it is not in the cache"
        raise UserError(
            f"{source}: no directory of that name here, and the Hugging Face hub cannot be reached ({first})"
        ) from None


def stated_ids(file: Path) -> dict[str, Any]:
    """The special token ids of a generation_config.json; none without the file.

    Raises:
      UserError: not a JSON object, or with ids that are none.
    """
    return generation_ids(read_json(file), str(file)) if file.is_file() else {}


class Checkpoint:
    """An opened HF directory: its architecture, and every tensor by name, checked but not read.

    Attributes: ``path``, ``values`` (config.json), ``config`` (:class:`ModelConfig`), ``tensors``.

    Raises:
      UserError: one message with everything that is wrong: config, missing or damaged files, and
        missing, unexpected or wrongly shaped tensors by name.
    """

    def __init__(
        self, path: Path, *, values: dict[str, Any] | None = None, tensors: Mapping[str, StoredTensor] | None = None
    ):
        """``values`` and ``tensors`` are given by other file formats, which then name ``path`` in messages."""
        self.path = path
        own = values is None
        self._where = "config.json" if own else "its configuration"
        self.values = read_json(path / "config.json") if own else values
        self.config: ModelConfig = model_config_from_hf(
            self.values,
            str(path / "config.json" if own else path),
            stated_ids(path / GENERATION) if own else {},
        )
        self.tensors: dict[str, StoredTensor] = dict(collect_tensors(path) if tensors is None else tensors)
        if self.config.tie_embeddings and _EMBEDDING not in self.tensors and _HEAD in self.tensors:
            self.tensors[_EMBEDDING] = self.tensors.pop(_HEAD)  # one matrix, stored under the name of its other use
        self.slots: dict[str, Slot] = hf_slots(self.config)
        self._check()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(self.tensors[name].nbytes for name in self.slots)

    def dtypes(self) -> dict[str, np.dtype]:
        """The stored dtype of each of our parameters; layers that differ meet in float32, without loss."""
        found: dict[str, set[np.dtype]] = {}
        for name, slot in self.slots.items():
            dtype = self.tensors[name].dtype
            assert dtype is not None  # _check refuses others
            for path, _ in slot.parts:
                found.setdefault(path, set()).add(dtype)
        return {path: kinds.pop() if len(kinds) == 1 else np.dtype(np.float32) for path, kinds in found.items()}

    def _check(self) -> None:
        kinds: dict[str, list[str]] = {
            "missing": [name for name in self.slots if name not in self.tensors],
            "unexpected": [n for n in self.tensors if n not in self.slots and not ignored(n, self.config)],
            "wrongly shaped": [
                f"{name} is {list(self.tensors[name].shape)}, should be {list(slot.hf_shape)}"
                for name, slot in self.slots.items()
                if name in self.tensors and self.tensors[name].shape != slot.hf_shape
            ],
            "of unsupported dtype": [
                f"{name} is {self.tensors[name].code}, supported: {', '.join(DTYPES)}"
                for name in self.slots
                if name in self.tensors and self.tensors[name].dtype is None
            ],
        }
        parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
        if parts:
            raise UserError(f"{self.path}: tensors do not fit {self._where}: {'; '.join(parts)}")
        head, embedding = self.tensors.get(_HEAD), self.tensors[_EMBEDDING]
        if self.config.tie_embeddings and head is not None and not _same_values(head, embedding):
            raise UserError(
                f"{self.path}: config.json ties the embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false to use both"
            )

    def tokenizer_directory(self) -> str | None:
        """The directory of the tokenizer's files; None when there are none."""
        return str(self.path) if any((self.path / name).is_file() for name in TOKENIZER_FILES) else None

    def params(
        self, *, dtype: np.dtype | None = None, shardings: Shardings | None = None, progress: Progress = lambda n: None
    ) -> dict[str, Any]:
        """Read every parameter into the nested dict of stacked arrays.

        Args:
          dtype: cast while reading; None keeps the stored dtypes.
          shardings: path -> Sharding or None. A sharded parameter becomes a jax.Array of which each host
            reads only the slices its devices hold; others are numpy arrays.
          progress: called with the bytes read.

        Raises:
          UserError: the file ends early, or a value does not fit into float16.
        """
        by_path: dict[str, list[tuple[StoredTensor, Slot]]] = {}
        for name, slot in self.slots.items():
            start = 0
            for path, rows in slot.parts:
                by_path.setdefault(path, []).append((self.tensors[name].part(start, start + rows), slot))
                start += rows
        stored, leaves = self.dtypes(), {}
        for path, shape in base_shapes(self.config).items():
            kind = stored[path] if dtype is None else dtype
            sharding = shardings(path) if shardings is not None else None
            pieces = by_path[path]
            if sharding is None:
                everything = tuple(slice(0, size) for size in shape)
                leaves[path] = _read(pieces, everything, kind, progress)
            else:
                leaves[path] = _read_sharded(pieces, shape, kind, sharding, progress)
        return unflatten(leaves)


def _read_sharded(pieces, shape, dtype, sharding, progress):
    import jax

    def callback(index):
        return _read(
            pieces, tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True)), dtype, progress
        )

    return jax.make_array_from_callback(shape, sharding, callback)


def _read(pieces: list[tuple[StoredTensor, Slot]], index: tuple[slice, ...], dtype: np.dtype, progress: Progress):
    """The slice ``index`` (in our axes) of one parameter."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    if pieces[0][1].layer is None:
        _read_piece(*pieces[0], index, out, progress)
    else:
        for row, layer in enumerate(range(index[0].start, index[0].stop)):
            _read_piece(*pieces[layer], index[1:], out[row], progress)
    return out


def _read_piece(
    tensor: StoredTensor, slot: Slot, index: tuple[slice, ...], out: np.ndarray, progress: Progress
) -> None:
    rows, *columns = index[::-1] if slot.transpose else index
    whole_rows = all(part.stop - part.start == n for part, n in zip(columns, tensor.shape[1:], strict=True))
    if not slot.transpose and whole_rows and tensor.dtype == out.dtype:
        step = max(1, (32 << 20) // max(1, tensor.nbytes // max(1, tensor.shape[0])))
        for first in range(rows.start, rows.stop, step):  # straight into place, in steps for the progress bar
            last = min(first + step, rows.stop)
            progress(tensor.rows(first, last, out[first - rows.start : last - rows.start]).nbytes)
        return
    target = out.T if slot.transpose else out  # a view in HF's axes
    for first, block in tensor.blocks(rows.start, rows.stop):
        part = block[(slice(None), *columns)]
        place = target[first - rows.start : first - rows.start + len(block)]
        if part.dtype == place.dtype:  # as raw words: NumPy moves bfloat16 element by element
            word = np.dtype(f"u{part.dtype.itemsize}")
            place.view(word)[...] = part.view(word)
        else:
            with np.errstate(over="ignore"):  # reported below, by name
                place[...] = part
        if out.dtype == np.float16 and tensor.dtype != out.dtype:
            check_float16(part, place, f"{tensor.file}: {tensor.name}")
        progress(block.nbytes)


def _same_values(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Equal, or equal up to the rounding of a head that is stored in a narrower dtype."""
    if head.shape != embedding.shape or head.dtype is None:
        return False
    pairs = zip(head.blocks(0, head.shape[0]), embedding.blocks(0, head.shape[0]), strict=True)
    with np.errstate(over="ignore"):
        return all(np.array_equal(x.view(np.uint8), y.astype(x.dtype).view(np.uint8)) for (_, x), (_, y) in pairs)


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def collect_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in a directory, by name; nothing is read beyond their headers.

    Raises:
      UserError: there are none, only pickle files, or damaged ones.
    """
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        return open_tensors(single)
    if index.is_file():
        return _collect_sharded(path, index)
    others = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(others) == 1 and not others[0].name.startswith("adapter"):
        return open_tensors(others[0])
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise UserError(
            f"{path}: only pickle files ({', '.join(pickles[:3])}), which can run code when opened; convert them to "
            "safetensors first, for example with transformers' save_pretrained"
        )
    raise UserError(f"{path}: no model.safetensors and no {INDEX}")


def _collect_sharded(path: Path, index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty")
    problems, tensors, shards = [], {}, {}
    for file in sorted({str(name) for name in weight_map.values()}):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            problems.append(f"shard name {file!r} is not the name of a .safetensors file in the same directory")
            continue
        try:
            shards[file] = open_tensors(path / file)
        except UserError as problem:
            problems.append(str(problem))
    for name, file in weight_map.items():
        if file in shards and name in shards[file]:
            tensors[name] = shards[file][name]
        elif file in shards:
            problems.append(f"tensor {name} is not in {file}")
    if problems:
        raise UserError(f"{index}: {_listed(problems).replace(', tensor ', '; tensor ')}")
    return tensors


@contextlib.contextmanager
def progress_bar(total: int | None, label: str) -> Iterator[Progress]:
    """Bytes done out of ``total``, on a terminal only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:
        yield bar.update


def read_hf(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: np.dtype | None = None,
    shardings: Shardings | None = None,
    progress: Progress = lambda n: None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture and parameters of a Hugging Face directory or hub id.

    Args: as of :meth:`Checkpoint.params`; ``revision`` of a hub repository.

    Raises:
      UserError: see :class:`Checkpoint` and :func:`resolve_source`.
    """
    checkpoint = Checkpoint(resolve_source(str(source), revision))
    return checkpoint.config, checkpoint.params(dtype=dtype, shardings=shardings, progress=progress)
