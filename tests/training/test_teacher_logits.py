"""Stored teacher logits: the divergence over them, the files, and a stage that reads them instead of running the teacher."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    MixtureSource,
    StageConfig,
    TeacherConfig,
    to_dict,
)
from lawcat_jax.data.teacher_store import ARRAYS, SHARD_ROWS, Kept, StoreWriter, TeacherStore
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import finetune, inputs, loop, optim, run, stages
from lawcat_jax.training.divergence import StoredTeacher, Teacher, divergence
from lawcat_jax.training.finetune import chunked_token_sums
from lawcat_jax.training.step import StepInputs
from lawcat_jax.training.teacher_logits import write_teacher_logits
from tests.models.helpers import jit

VOCABULARY = 12


def logits(rows=2, length=7, seed=0):
    """(student's, teacher's) [B, T, V], f32."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.float32(rng.normal(0, 2, size=(rows, length, VOCABULARY))) for _ in range(2))


def stored(teacher, weights, k: int, *, reverse: bool = False) -> StoredTeacher:
    """What a store would keep, by sorting."""
    teacher = np.asarray(teacher, np.float64)
    order = np.argsort(-teacher, axis=-1)
    others = np.take_along_axis(teacher, order[..., k:], -1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(others).sum(-1))
    kept = np.take_along_axis(teacher, order[..., :k], -1)
    return StoredTeacher(jnp.asarray(order[..., :k]), jnp.float32(kept), jnp.float32(rest), weights, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_whole_vocabulary_gives_the_divergence_of_the_teacher(reverse):
    student, teacher = logits()
    weights = jnp.ones(student.shape[:2])
    online = Teacher(teacher, weights, reverse=reverse)

    def value(student, held):
        return jnp.sum(divergence(jax.nn.log_softmax(student), held))

    both = [
        jax.value_and_grad(value)(student, held)
        for held in (online, stored(teacher, weights, VOCABULARY, reverse=reverse))
    ]
    np.testing.assert_allclose(both[1][0], both[0][0], rtol=1e-5)
    np.testing.assert_allclose(both[1][1], both[0][1], atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
def test_the_others_are_one_bucket(k, reverse):
    student, teacher = logits()
    found = divergence(jax.nn.log_softmax(student), stored(teacher, jnp.ones(student.shape[:2]), k, reverse=reverse))

    def buckets(values):  # probabilities of the teacher's k first tokens, and of all others
        p = np.exp(np.asarray(values, np.float64))
        p = np.take_along_axis(p / p.sum(-1, keepdims=True), np.argsort(-np.asarray(teacher), axis=-1), -1)
        return np.concatenate([p[..., :k], p[..., k:].sum(-1, keepdims=True)], -1)

    q, p = buckets(teacher), buckets(student)
    if reverse:
        q, p = p, q
    np.testing.assert_allclose(found, (q * np.log(q / p)).sum(-1), rtol=1e-4, atol=1e-6)
    whole = divergence(jax.nn.log_softmax(student), Teacher(teacher, jnp.ones(student.shape[:2]), reverse=reverse))
    assert np.all(found <= whole + 1e-5)


def test_a_remainder_below_the_rounding_of_one():
    """Of a teacher that is sure, the others have a mass that 1 less the rest would not show."""
    teacher = jnp.zeros((1, 1, VOCABULARY)).at[..., 0].set(30.0)
    student = jnp.zeros((1, 1, VOCABULARY)).at[..., 0].set(28.0)
    held = stored(teacher, jnp.ones((1, 1)), 1)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(divergence(jax.nn.log_softmax(x), held)))(student)
    assert np.isfinite(value)
    np.testing.assert_allclose(gradient[0, 0, 1:].sum(), 11 * (np.exp(-28.0) - np.exp(-30.0)), rtol=1e-3)


def test_chunks_and_tokens_that_do_not_count():
    student, teacher = logits(length=7)
    weights = jnp.ones((2, 7)).at[:, 2:5].set(0.0).at[1, 6].set(0.0)
    held = stored(teacher, weights, 3)
    unseen = held._replace(logits=jnp.where(weights[..., None] > 0, held.logits, jnp.nan))

    def total(chunk, held, student):
        targets = jnp.zeros((2, 7), jnp.int32)
        return chunked_token_sums(lambda x: x, student, targets, weights, held, chunk)["kl"]

    whole = jit(jax.value_and_grad(functools.partial(total, 0, held)))(student)
    assert np.abs(whole[1][:, 2:5]).max() == 0 < np.abs(whole[1][:, :2]).max()
    for held_in_chunks, chunk in ((held, 3), (unseen, 0)):
        value, gradient = jit(jax.value_and_grad(functools.partial(total, chunk, held_in_chunks)))(student)
        np.testing.assert_allclose(value, whole[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, whole[1], atol=1e-6)


# The files


def row(seed: int, length: int = 9, valid: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = np.zeros(length, np.float32)
    weights[rng.choice(valid, 3, replace=False)] = 1
    return {"tokens": rng.integers(0, 50, length, np.int32), "lengths": np.int32(valid), "kl_weights": weights}


def kept(seed: int, k: int = 4) -> Kept:
    rng = np.random.default_rng(seed)
    return Kept(rng.integers(0, 50, (3, k)), rng.normal(size=(3, k)), rng.normal(size=3))


def write_store(folder, rows: int = SHARD_ROWS + 5, k: int = 4, facts=None, only: int | None = None) -> None:
    writer = StoreWriter(folder, k=k, vocab_size=50, rows={"train": rows}, facts=facts or {"teacher": "a"})
    for shard in writer.missing("train", rows)[:only]:
        writer.write("train", shard.start, [row(i) for i in shard], [kept(i, k) for i in shard])


def test_what_is_written_is_read(tmp_path):
    write_store(tmp_path / "s", only=1)
    with pytest.raises(UserError, match="is not finished"):
        TeacherStore(tmp_path / "s")
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s" / "train").iterdir()}
    write_store(tmp_path / "s")  # adds the rest
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s" / "train").iterdir()}
    assert len(after) == 6
    assert first.items() <= after.items()
    write_store(tmp_path / "t")
    for path in (tmp_path / "t").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "t")).read_bytes()
    store = TeacherStore(tmp_path / "s")
    assert (store.k, store.vocab_size, store.rows, store.facts) == (4, 50, {"train": 69}, {"teacher": "a"})
    for index in (0, 1, SHARD_ROWS - 1, SHARD_ROWS, 68):
        own, expected = row(index), kept(index)
        found = store.arrays("train", index, own)
        assert set(found) == set(ARRAYS)
        places = np.flatnonzero(own["kl_weights"])
        for name, values in expected._asdict().items():
            array = found[f"teacher_{name}"]
            assert array.shape[0] == 9
            np.testing.assert_array_equal(array[places], values.astype(array.dtype))
            array[places] = 0
            assert not array.any()
    blank = {**row(3), "kl_weights": np.zeros(9, np.float32)}
    assert not any(array.any() for array in store.arrays("train", 69, blank).values())  # fills up a last batch


def test_what_does_not_belong_to_a_store_is_refused(tmp_path):
    folder = tmp_path / "s"
    write_store(folder)
    for options in ({"k": 3}, {"facts": {"teacher": "b"}}, {"rows": 5}):
        with pytest.raises(UserError, match="holds logits of another teacher, other data or another k"):
            write_store(folder, **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        write_store(tmp_path / "full")
    store = TeacherStore(folder)
    for other in (
        row(2),
        {**row(1), "kl_weights": row(2)["kl_weights"]},
        {**row(1), "segment_ids": np.ones(9, np.int32)},
    ):
        with pytest.raises(UserError, match="other tokens for train row 1"):
            store.arrays("train", 1, other)
    for split, index in (("train", 69), ("train", 500), ("validation", 0)):
        with pytest.raises(UserError, match="other tokens"):
            store.arrays(split, index, row(1))
    for name in ("00001.npy", "00000.rows.npy"):
        path = folder / "train" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} has changed since it was written"):
            TeacherStore(folder)
        path.write_bytes(whole)
    meta = json.loads((folder / "teacher_logits.json").read_text())
    for change, message in (({"format": 9}, "format 9"), ({"k": 3}, "another k"), ({"rows": None}, "is damaged")):
        (folder / "teacher_logits.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            TeacherStore(folder)
    with pytest.raises(UserError, match="holds no teacher logits"):
        TeacherStore(tmp_path / "none")


def test_a_store_of_an_earlier_version_knows_no_hash_of_the_weights(tmp_path):
    own = {"teacher": {"weights": "a", "weights_hash": "h"}, "seed": 0}
    old = {"teacher": {"weights": "a"}, "seed": 0}
    write_store(tmp_path / "s", facts=old, only=1)
    write_store(tmp_path / "s", facts=own)  # goes on with it
    store = TeacherStore(tmp_path / "s")
    assert store.facts == old
    inputs.check_stored(store, own, "there")
    with pytest.raises(UserError, match=r"teacher\.weights: 'a' there, 'b' here"):
        inputs.check_stored(store, {**own, "teacher": {"weights": "b", "weights_hash": "h"}}, "there")
    write_store(tmp_path / "t", facts=own)
    permuted = {**own, "teacher": {"weights": "a", "weights_hash": "g"}}
    with pytest.raises(UserError, match="another teacher"):
        inputs.check_stored(TeacherStore(tmp_path / "t"), permuted, "there")
    with pytest.raises(UserError, match="holds logits of another teacher"):
        write_store(tmp_path / "t", facts=permuted)


def test_a_store_of_an_earlier_version_knows_no_fields_that_came_later(tmp_path):
    mixed = DataConfig(kind="mixture", mixture=(MixtureSource(kind="text", source="a"), MixtureSource(weight=2.0)))
    own = {"teacher": {"weights_hash": "h"}, "data": json.loads(json.dumps(to_dict(mixed)))}
    old = json.loads(json.dumps(own))
    for fields in (old["data"], *old["data"]["mixture"]):
        del fields["ignored_fields"]
    write_store(tmp_path / "s", facts=old, only=1)
    write_store(tmp_path / "s", facts=own)
    inputs.check_stored(TeacherStore(tmp_path / "s"), own, "there")
    own["data"]["mixture"][1]["ignored_fields"] = ["x"]
    with pytest.raises(UserError, match="other data or another k"):
        write_store(tmp_path / "s", facts=own)
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.ignored_fields: only in the new configuration"):
        inputs.check_stored(TeacherStore(tmp_path / "s"), own, "there")


# The stage


def config(**stage) -> Config:
    data = DataConfig(
        passkey_words=0, num_samples=20, validation_samples=4, min_length_fraction=0.8, answer_only=False, kl_weight=0.5
    )
    fields = {"steps": 2, "batch_size": 8, "seq_length": 96, "kl_weight": 0.7, "trainable": ("^lora/",), "data": data}
    return Config(
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=AttentionConfig(gate_rank=4),
        lora=LoraConfig(rank=2),
        stage1=StageConfig(enabled=False),
        stage2=StageConfig(**(fields | stage)),
    )


@pytest.mark.slow
def test_a_stage_with_stored_logits(tmp_path, capsys, monkeypatch):
    """Loss and gradient are those with the teacher running, and the iterator goes on with the same bits."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    folder = str(tmp_path / "logits")
    teacher = inputs.open_teacher(config())
    student, vocabulary = inputs.load_student(config(), mesh, teacher), teacher.model.vocab_size
    with monkeypatch.context() as once:  # loading takes seconds
        once.setattr(
            inputs,
            "load_student",
            lambda config, where, opened: dataclasses.replace(student, params=stages.place(student.params, where)),
        )
        write_teacher_logits(config(loss_chunk=40), folder, vocabulary)
    assert "train: 20 of 20 rows" in capsys.readouterr().err

    stored_config = config(teacher_logits=folder)
    stage, stored_stage = (stages.build("stage2", one, teacher.model, mesh) for one in (config(), stored_config))
    with_teacher, without = (inputs.prepare(one, student, stored_config.seed) for one in (stage, stored_stage))
    assert stored_stage.batch["teacher_ids"].shape == (8, 96, vocabulary)
    batches = [next(with_teacher.batches), next(without.batches)]
    for name, array in batches[0].items():
        np.testing.assert_array_equal(array, batches[1][name])
    assert set(batches[1]) - set(batches[0]) == set(ARRAYS)
    assert set(without.held_out[0]) >= set(ARRAYS)

    params = student.params
    rng = np.random.default_rng(0)  # adapters that begin at 0 would leave half of the gradient 0
    lora = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.05, x.shape)), params["lora"])

    def loss(stage, lora, batch):
        sums, _ = finetune.make_loss(stage.graphdef, stage.config)({**params, "lora": lora}, batch, StepInputs())
        return sums.loss / sums.weight, sums.metrics["kl"]

    found = []
    for one, batch in zip((stage, stored_stage), batches, strict=True):
        function = jit(jax.value_and_grad(functools.partial(loss, one), has_aux=True))
        found.append(function(lora, batch))
    ((value, kl), gradient), ((stored_value, stored_kl), stored_gradient) = found
    assert kl[0] / kl[1] > 0.05
    np.testing.assert_allclose(stored_value, value, rtol=1e-5)
    np.testing.assert_allclose(stored_kl[0], kl[0], rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), stored_gradient, gradient)

    state = without.batches.get_state()
    expected = [next(without.batches) for _ in range(3)]  # into the second pass
    without.batches.set_state(state)
    for batch in expected:
        for name, array in next(without.batches).items():
            np.testing.assert_array_equal(array, batch[name])

    for change, message in (
        ({"seq_length": 100}, "its logits\\.seq_length: 96 there, 100 here"),
        ({"data": dataclasses.replace(config().stage2.data, num_samples=21)}, "its logits.data.num_samples: 20 there"),
    ):
        other = config(teacher_logits=folder, **change)
        with pytest.raises(
            UserError, match=f"config.stage2.teacher_logits is of another teacher or other data .*{message}"
        ):
            inputs.prepare(dataclasses.replace(stored_stage, config=other.stage2), student, other.seed)
    spoilt = {**params, "embed": {"embedding": params["embed"]["embedding"].at[3, 3].add(1e-3)}}
    with pytest.raises(UserError, match=r"its logits\.teacher\.weights"):
        inputs.prepare(stored_stage, dataclasses.replace(student, params=spoilt), stored_config.seed)
    with pytest.raises(UserError, match=f"--k={vocabulary + 1}: the vocabulary has {vocabulary} tokens"):
        write_teacher_logits(config(), str(tmp_path / "more"), vocabulary + 1)


def test_what_stored_logits_cannot_serve():
    for stage, message in (
        ({"kl_weight": 0.0}, "only the divergence of stage 2 reads them"),
        ({"kl_temperature": 2.0}, "set kl_temperature=1"),
        ({"state_passing": "pieces", "data": DataConfig(passkey_words=0, pieces=2)}, "with data.pieces"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(teacher_logits="somewhere", **stage).validate()
    config(teacher_logits="somewhere").validate()
    assert finetune.runs_teacher(config().stage2)
    assert not finetune.runs_teacher(config(teacher_logits="somewhere").stage2)


@pytest.mark.slow
def test_a_run_with_stored_logits(tmp_path, monkeypatch):
    """It ends with the student of the run with the teacher, to rounding; interrupted and resumed, with the same bits."""
    folder = str(tmp_path / "logits")
    vocabulary = inputs.open_teacher(config()).model.vocab_size
    write_teacher_logits(config(), folder, vocabulary)

    def finished(name: str, stop_at: int = 0, **options) -> dict[str, np.ndarray]:
        one = config(steps=4, **options)  # 20 samples: the third step is of two passes
        one.workdir, one.eval = str(tmp_path / name), EvalConfig(enabled=False)
        one.log = LogConfig(tensorboard=False, diagnostics=False, progress="off")
        if stop_at:
            with monkeypatch.context() as patch:
                patch.setattr(loop.StopSignal, "requested", lambda self, step: step == stop_at)
                assert run.run(one) == loop.EXIT_INTERRUPTED
        assert run.run(one) == 0
        return optim.flatten(load_model(tmp_path / name / "student").params)

    straight = finished("without", teacher_logits=folder)
    with_teacher = finished("with")
    resumed = finished("resumed", stop_at=2, teacher_logits=folder)
    moved = 0.0
    for path, array in straight.items():
        np.testing.assert_array_equal(resumed[path], array, err_msg=path)
        # Adam's first steps have the size of the learning rate, whatever that of the gradient: compare with that.
        np.testing.assert_allclose(array, with_teacher[path], atol=0.05 * config().stage2.learning_rate, err_msg=path)
        moved = max(moved, np.abs(array).max() if path.endswith("/b") else 0.0)
    assert moved > 0.5 * config().stage2.learning_rate
