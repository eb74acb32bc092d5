"""Model directories whose files have changed since they were written, and what model.json must state."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.checkpoints import fingerprints, model_json
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.checkpoints.stored_configs import meaning
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, RopeScaling
from lawcat_jax.errors import UserError

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=48, rope_theta=5e5
)
STUDENT = (MODEL, AttentionConfig(gate_rank=4), LoraConfig(rank=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    target = tmp_path_factory.mktemp("saved") / "m"
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), models.abstract(*STUDENT)[1])
    (target.parent / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (target.parent / "generation_config.json").write_text('{"do_sample": false}')
    extra = {"stage": "stage2", "training_length": 64, "add_bos": "never", "eval": {"samples": 3}}
    options = {"tokenizer_source": target.parent, "extra": extra}
    save_model(target, model=MODEL, attention=STUDENT[1], lora=STUDENT[2], params=params, **options)
    return target


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "m")


def edit(directory, change):
    values = json.loads((directory / "model.json").read_text())
    change(values)
    (directory / "model.json").write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7, 9), (3, 0, 2)])
def test_a_fingerprint_is_the_same_on_host_and_devices_and_sees_every_bit(dtype, shape):
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
    value = fingerprints.fingerprint(array)
    assert value == fingerprints.fingerprint(jnp.asarray(array))
    word = f"u{array.dtype.itemsize}"
    for index in range(array.size):
        for bit in range(8 * array.dtype.itemsize):
            changed = array.copy()
            changed.reshape(-1).view(word)[index] ^= np.dtype(word).type(1 << bit)
            assert fingerprints.fingerprint(changed) != value
    if array.size > 10:
        assert fingerprints.fingerprint(array[::-1]) != value


def flips(directory, count):
    """Copies of the directory's data files with one byte flipped each, spread over all of them."""
    files = [file for file in sorted((directory / "params").rglob("*")) if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    for number in range(count):
        place = total * number // count + 7
        for file in files:
            if place < file.stat().st_size:
                break
            place -= file.stat().st_size
        good = file.read_bytes()
        changed = bytearray(good)
        changed[place] ^= 0x10
        file.write_bytes(changed)
        yield file
        file.write_bytes(good)


def test_flipped_bytes_are_one_line_or_change_nothing(copy, monkeypatch):
    good = dict(flatten(load_model(copy, dtype="keep").params))
    refused = 0
    for file in flips(copy, 6):
        try:
            found = dict(flatten(load_model(copy, dtype="keep").params))
        except UserError as problem:
            if "\n" in str(problem):
                pytest.fail(str(problem))
            refused += "have changed since they were written" in str(problem)
            continue
        assert all(np.array_equal(found[path], good[path]) for path in good), file
    assert refused


def test_the_switch_reads_what_has_changed_and_old_directories_are_read_unchecked(copy, monkeypatch):
    changed = False
    for _ in flips(copy, 3):
        try:
            load_model(copy)
        except UserError:
            changed = True
            monkeypatch.setenv(fingerprints.SWITCH, "off")
            load_model(copy)
            monkeypatch.delenv(fingerprints.SWITCH)
    assert changed
    monkeypatch.setenv(fingerprints.SWITCH, "maybe")
    with pytest.raises(UserError, match="LAWCAT_VERIFY_WEIGHTS='maybe'"):
        load_model(copy)
    monkeypatch.delenv(fingerprints.SWITCH)

    def as_before(values):
        del values["digest"]
        for facts in values["params"].values():
            del facts["hash"]

    edit(copy, as_before)
    load_model(copy)


def test_directories_with_sums_are_checked_by_them(copy):
    """As an earlier version wrote them."""
    leaves = dict(flatten(load_model(copy).params))

    def as_before(values):
        del values["digest"]
        for path, facts in values["params"].items():
            del facts["hash"]
            facts["sum"] = fingerprints.fingerprint(np.asarray(leaves[path]))

    edit(copy, as_before)
    load_model(copy)
    edit(copy, lambda values: values["params"]["embed/embedding"].update(sum=7))
    with pytest.raises(UserError, match="the contents of embed/embedding have changed"):
        load_model(copy)


@pytest.mark.parametrize("kind", ["reversed", "negated"])
def test_layers_that_changed_places_and_signs_are_noticed(kind):
    """Which the sum does not always: not these."""
    leaf = np.random.default_rng(0).normal(size=(4, 256, 256)).astype(ml_dtypes.bfloat16).astype(np.float32)
    other = np.ascontiguousarray(leaf[::-1]) if kind == "reversed" else -leaf
    assert fingerprints.fingerprint(leaf) == fingerprints.fingerprint(other)
    assert fingerprints.same_as_stated(leaf, {"hash": fingerprints.array_digest(leaf)})
    assert not fingerprints.same_as_stated(other, {"hash": fingerprints.array_digest(leaf)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float16"])
@pytest.mark.parametrize("size", [(), (3, 0), (5, 7), (3, 60_000)])
def test_a_hash_is_the_same_on_host_and_devices(dtype, size, monkeypatch):
    monkeypatch.setattr(fingerprints, "_BLOCK", 1 << 17)  # several blocks of several pieces
    array = np.asarray(np.random.default_rng(0).normal(0, 30, size=size)).astype(dtype)
    assert fingerprints.array_digest(array) == fingerprints.array_digest(jnp.asarray(array))


@pytest.mark.slow
def test_sharded_and_cast_arrays_are_checked_too(copy, monkeypatch):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"dtype": "bfloat16", "shardings": lambda path: jax.NamedSharding(mesh, jax.P())}
    loaded = jax.tree.map(np.asarray, load_model(copy, **options).params)
    assert loaded["embed"]["embedding"].dtype == ml_dtypes.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["mixers"])} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, loaded, load_model(copy, dtype="bfloat16").params)
    monkeypatch.setenv(fingerprints.SWITCH, "off")  # cast by tensorstore, while it reads
    jax.tree.map(np.testing.assert_array_equal, loaded, load_model(copy, dtype="bfloat16").params)
    monkeypatch.delenv(fingerprints.SWITCH)
    refused = 0
    for _ in flips(copy, 6):
        try:
            load_model(copy, **options)
        except UserError as problem:
            refused += "have changed since they were written" in str(problem)
    assert refused


def test_values_beyond_float16_are_refused(tmp_path):
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), models.abstract(MODEL)[1])
    params["final_norm"]["scale"][3] = 1e6
    save_model(tmp_path / "m", model=MODEL, params=params)
    with pytest.raises(UserError, match="final_norm/scale has values beyond float16"):
        load_model(tmp_path / "m", dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].pop("rope_theta"), r"missing: model\.rope_theta"),
        (lambda v: v["model"]["rope_scaling"].pop("kind"), r"missing: model\.rope_scaling\.kind"),
        (lambda v: v["attention"].pop("gate_normalizer"), r"missing: attention\.gate_normalizer"),
        (lambda v: v["lora"].pop("alpha"), r"missing: lora\.alpha"),
        (lambda v: v["model"].update(rope_theta=-5.0), r"model\.rope_theta: -5\.0 must be above 1"),
        (lambda v: v["model"].update(rms_norm_eps=0), r"model\.rms_norm_eps: 0 must be positive"),
        (lambda v: v["model"].update(bos_token_id=-1), r"model\.bos_token_id: -1 must not be negative"),
        (lambda v: v["model"].update(eos_token_ids=[3, -2]), r"model\.eos_token_ids: -2 must not be negative"),
        (lambda v: v["lora"].update(rank=0), r"lora\.rank: 0 must be at least 1"),
        (lambda v: v.update(extra=[1]), "extra should be an object"),
        (lambda v: v["extra"].update(training_length="long"), r"extra\.training_length: 'long'"),
        (lambda v: v["extra"].update(source=3), r"extra\.source: 3 is not a str"),
        (lambda v: v["extra"].update(eval=[3]), r"extra\.eval: '\[3\]' is not an object"),
        (lambda v: v["extra"].update(eval={"samples": "many"}), r"extra\.eval\.samples: 'many' is not a int"),
        (lambda v: v.update(params=[1]), "params should be an object"),
    ],
)
def test_what_model_json_must_state(copy, change, message):
    edit(copy, change)
    with pytest.raises(UserError, match=message) as caught:
        model_json.read(copy)
    assert str(copy / "model.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "field", "value"), [("model", "rope_theta", 1e4), ("lora", "alpha", 3.0)])
def test_values_that_have_changed_are_noticed(copy, part, field, value):
    edit(copy, lambda values: values[part].update({field: value}))
    with pytest.raises(UserError, match=r"model\.json: changed since it was written"):
        load_model(copy)
    edit(copy, lambda values: values.pop("digest"))
    assert getattr(getattr(load_model(copy), part), field) == value


@pytest.mark.parametrize("change", [{"add_bos": "always"}, {"training_length": 65}, {"eval": {"samples": 4}}])
def test_what_a_run_left_in_extra_is_covered(copy, change):
    edit(copy, lambda values: values["extra"].update(change))
    with pytest.raises(UserError, match=r"model\.json: changed since it was written"):
        load_model(copy)
    edit(copy, lambda values: values.pop("digest"))
    assert load_model(copy).extra.items() >= change.items()


def test_files_of_the_tokenizer_are_covered(copy):
    file = copy / "tokenizer" / "tokenizer.json"
    good = file.read_bytes()
    for spoilt in (good.replace(b'"a"', b'"b"'), good[:-1], b""):
        file.write_bytes(spoilt)
        with pytest.raises(UserError, match=r"tokenizer\.json has changed since it was written: restore a copy"):
            load_model(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing: restore a copy"):
        load_model(copy)
    edit(copy, lambda values: values["tokenizer"].pop("tokenizer.json"))
    (copy / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 5}')  # for users to edit
    assert load_model(copy).model.eos_token_ids == (5,)


def test_model_directories_of_earlier_versions_have_a_digest_without_extra(copy):
    def earlier(values):
        del values["tokenizer"]
        values["digest"] = fingerprints.digest(
            [{"model": meaning(MODEL), "attention": meaning(STUDENT[1]), "lora": meaning(STUDENT[2])}, values["params"]]
        )
        values["extra"]["training_length"] = 65

    edit(copy, earlier)
    assert load_model(copy).extra["training_length"] == 65
    edit(copy, lambda values: values["lora"].update(alpha=3.0))
    with pytest.raises(UserError, match="changed since it was written"):
        load_model(copy)


def test_fields_added_since_may_be_absent_and_notes_may_be_added(copy):
    def change(values):
        for name in ("nope_layers", "qk_norm"):
            del values["model"][name]
        del values["model"]["rope_scaling"]["beta_fast"]
        values["extra"]["note"] = "mine"

    edit(copy, change)
    assert load_model(copy).model == MODEL
    assert MODEL.rope_scaling == RopeScaling()


def test_an_unreadable_folder_is_not_called_damaged(copy, monkeypatch):
    import os

    monkeypatch.setattr(os, "access", lambda file, mode: False)  # also where the tests run as root
    with pytest.raises(UserError, match=r"cannot read .*params.*Permission denied"):
        load_model(copy)


def test_deeply_nested_json_is_one_line(copy):
    (copy / "model.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"nested too deeply|not valid JSON"):
        model_json.read(copy)
