"""Safetensors files written here, whose contents have changed since: the hash of each tensor, and the layout of all."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lawcat_jax.checkpoints import fingerprints
from lawcat_jax.checkpoints.hf import tensors
from lawcat_jax.checkpoints.hf.tensors import open_tensors, read_metadata, write_tensors
from lawcat_jax.errors import UserError

LAYERS = np.random.default_rng(0).normal(size=(4, 256, 256)).astype(ml_dtypes.bfloat16).astype(np.float32)
ARRAY, REVERSED = LAYERS.reshape(1024, 256), LAYERS[::-1].reshape(1024, 256)
SMALL = np.arange(12, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.bfloat16)


def write(path, metadata=None, **arrays):
    entries = [(name, array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()]
    write_tensors(path, entries, metadata=metadata)
    return path


def read(path, name):
    tensor = open_tensors(path)[name]
    return tensor.rows(0, tensor.shape[0])


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edit(path, change):
    """The same file with another header, and its data where ``change`` returns some."""
    header, data = header_of(path)
    data = change(header) or data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("kind", ["reversed", "negated", "exchanged"])
def test_what_a_sum_does_not_see(kind, tmp_path):
    """Rows of layers that changed places and signs, in a file and as earlier versions checked it."""
    other = {"reversed": REVERSED, "negated": -ARRAY, "exchanged": LAYERS[[2, 3, 0, 1]]}[kind]
    path, data = write(tmp_path / "a.safetensors", x=ARRAY), np.ascontiguousarray(other).tobytes()
    assert np.array_equal(read(path, "x"), ARRAY)
    assert fingerprints.fingerprint(ARRAY) == fingerprints.fingerprint(np.ascontiguousarray(other))
    edit(path, lambda header: data)
    with pytest.raises(UserError, match="the contents of x have changed since they were written; get a fresh copy"):
        read(path, "x")


def test_the_hash_is_that_of_model_directories(tmp_path):
    path = write(tmp_path / "a.safetensors", {"note": "mine"}, x=ARRAY, w=SMALL)
    stated = read_metadata(path)[tensors._HASHES]
    assert stated[32:] == fingerprints.array_digest(jnp.asarray(SMALL)) + fingerprints.array_digest(jnp.asarray(ARRAY))
    assert np.array_equal(safetensors.numpy.load_file(path)["x"], ARRAY)


def test_rows_in_any_order_and_pieces_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_BLOCK", 1 << 15)
    monkeypatch.setattr(fingerprints, "_PIECE", 1 << 12)
    path = write(tmp_path / "a.safetensors", x=ARRAY)
    edit(path, lambda header: REVERSED.tobytes())
    halves = open_tensors(path)["x"]
    first, second = halves.part(0, 300), halves.part(300, 1024)  # as of a fused projection
    assert second.rows(100, 724).shape == (624, 256)
    first.rows(0, 300)
    with pytest.raises(UserError, match="the contents of x have changed"):
        second.rows(0, 100)
    again = open_tensors(path)["x"]
    for _ in again.blocks(0, 1023):
        pass
    with pytest.raises(UserError, match="the contents of x have changed"):
        again.rows(1023, 1024)


@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 5, (1 << 32) + 3])
def test_parts_of_a_hash_add_up(first):
    """Also where the upper half of an element's index changes within a part."""
    array = SMALL.reshape(-1)
    whole = fingerprints.hash_part(array, first)
    parts = [fingerprints.hash_part(array[at : at + 1], first + at) for at in range(array.size)]
    assert [sum(words) % (1 << 32) for words in zip(*parts, strict=True)] == list(whole)


def change_dtype(header):
    header["w"]["dtype"] = "F16"


def change_shape(header):
    header["w"]["shape"] = [3, 4]


def change_names(header):
    header["v"], header["w"] = header["w"], header["v"]


def remove(header):
    del header["v"]


@pytest.mark.parametrize("change", [change_dtype, change_shape, change_names, remove])
def test_the_layout_is_covered(change, tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", v=SMALL + SMALL, w=SMALL)
    edit(path, change)

    def load():
        return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in open_tensors(path).items()}

    with pytest.raises(UserError, match="have changed since they were written; get a fresh copy"):
        load()
    monkeypatch.setenv(fingerprints.SWITCH, "off")
    assert load()


def test_files_of_earlier_versions_are_checked_by_their_sums(tmp_path):
    path = write(tmp_path / "a.safetensors", x=ARRAY, w=SMALL)

    def as_before(header):
        del header["__metadata__"][tensors._HASHES]
        sums = [fingerprints.fingerprint(array) for array in (SMALL, ARRAY)]  # in the order of names
        header["__metadata__"][tensors._SUMS] = "".join(f"{value:08x}" for value in sums)

    edit(path, as_before)
    assert np.array_equal(read(path, "x"), ARRAY)
    _, data = header_of(path)
    changed = bytearray(data)
    changed[5] ^= 1
    edit(path, lambda header: bytes(changed))
    with pytest.raises(UserError, match="the contents of x have changed since they were written"):
        read(path, "x")


def test_files_of_others_are_read(tmp_path):
    safetensors.numpy.save_file({"x": ARRAY}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert np.array_equal(read(tmp_path / "a.safetensors", "x"), ARRAY)
