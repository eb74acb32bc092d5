"""Mesh and sharding table; a step on many devices equals the step on one."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, MeshConfig, ModelConfig, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import optim, stages

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
    max_position_embeddings=64,
)  # fmt: skip


def mesh(devices: int = 8, **sizes: int):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} (simulated) devices")
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def test_rest_of_the_devices():
    assert dict(mesh(tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    assert dict(mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    for sizes in ({"tensor": 3}, {"fsdp": 2}, {"fsdp": 16}):
        with pytest.raises(UserError, match=r"does not fit 8 device"):
            mesh(**sizes)


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(gate_rank=4),
        AttentionConfig(gate_rank=0, tie_qk=False, conv="stacked", output_gate=True),
        AttentionConfig(conv="shared", gate_kind="per_head", window_size=8, feature_map="relu"),
        AttentionConfig(kind="lolcats", conv="off", window_size=8, tie_qk=False),
        AttentionConfig(kind="window", window_size=8),
    ],
)
def test_every_parameter_has_a_rule(attention):
    _, shapes = models.abstract(MODEL, attention, LoraConfig())
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(shapes, mesh(fsdp=2, tensor=2, data=2)))
    assert specs["layers"]["mlp"]["down_proj"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["embed"]["embedding"] == P("tensor", "fsdp")
    assert specs["layers"]["input_norm"]["scale"] == P()


def test_optimizer_state_is_split_like_its_parameters():
    config = Config(attention=AttentionConfig(gate_rank=4))
    config.stage1.seq_length = 32
    stage = stages.build("stage1", config, MODEL, mesh(fsdp=2, tensor=2, data=2))
    adam = stage.state.opt_state[0]
    for path, leaf in optim.flatten(stage.state.params).items():
        assert optim.flatten(adam.mu)[path].sharding == leaf.sharding
    assert stage.state.params["mixers"]["conv_q"].sharding.spec == P(None, "tensor")


def test_unknown_parameter_and_uneven_sizes():
    two = mesh(fsdp=2, tensor=2, data=2)
    with pytest.raises(KeyError, match="no sharding rule"):
        sharding.spec_for("mixers/novelty", (3, 4), two)
    assert sharding.spec_for("embed/embedding", (65, 32), two) == P(None, "fsdp")
    with pytest.raises(UserError, match="does not split over data x fsdp = 4"):
        sharding.check_batch(8, 4, two, "config.stage1")


def refused(config: Config, **sizes: int) -> str:
    config.mesh = MeshConfig(**sizes)
    found = jax.sharding.AbstractMesh(tuple(sharding.axis_sizes(config.mesh, 8).values()), sharding.AXES)
    with pytest.raises(UserError) as caught:
        sharding.check_mesh(config, MODEL, found)
    return str(caught.value)


def test_a_mesh_that_the_run_cannot_use_is_refused():
    stage = {"batch_size": 8, "seq_length": 36}
    config = Config(stage1=StageConfig(**stage), stage2=StageConfig(**stage, grad_accum=2))
    assert refused(config, fsdp=1, tensor=8) == (
        "config.mesh.tensor: 8 does not divide the 2 key-value heads of the model; choose one of 1, 2"
    )
    assert "the 2 key-value heads" in refused(config, fsdp=1, tensor=-1)
    assert "config.stage2.batch_size: 8 in 2 micro-batch(es) does not split over data x fsdp = 8" in refused(config)
    assert refused(config, fsdp=1, sequence=8) == "config.stage1.seq_length: config.mesh.sequence=8 does not divide 36"
    config.stage2.seq_length = 35
    assert refused(config, fsdp=2, sequence=4) == "config.stage2.seq_length: config.mesh.sequence=4 does not divide 35"
    for names in (["stage1"], ["prefill"]):  # only what will run is looked at
        sharding.check_mesh(config, MODEL, mesh(fsdp=2, sequence=4), names)


def test_devices_that_the_batch_cannot_use_may_go_to_a_tensor_axis_that_splits_no_heads():
    config = Config(stage1=StageConfig(batch_size=2), stage2=StageConfig(batch_size=2))
    found = sharding.make_mesh(config.mesh, jax.devices()[:8], rows=sharding.common_rows(config))
    assert (found.shape["fsdp"], found.shape["tensor"]) == (2, 4)
    sharding.check_mesh(config, MODEL, found)


def test_a_mesh_for_more_devices_than_there_are_says_what_it_takes():
    for sizes, reason in (({"fsdp": 16}, "their product is 16;"), ({"tensor": 3}, "their product, 3, must divide it;")):
        with pytest.raises(UserError, match=f"does not fit 8 device.*{reason} -1 in one axis takes the rest"):
            sharding.axis_sizes(MeshConfig(**sizes), 8)


def documents(rng: np.random.Generator) -> np.ndarray:
    """Ids [8, 32] of packed rows, a b a b ...: in the first rows documents begin at and around tokens that are a multiple
    of 4, where shards begin, one spans the row, and the others are drawn.
    """
    starts = [[0, 4, 8, 16, 24], [0, 3, 5, 7, 9, 15, 17], [0, 1, 2, 3, 4, 5, 6], [0]]
    starts += [[0, *rng.choice(np.arange(1, 32), size=4, replace=False)] for _ in range(4)]
    numbers = [np.searchsorted(np.sort(row), np.arange(32), side="right") for row in starts]
    return 1 + np.stack(numbers).astype(np.int32) % 2


@functools.cache
def steps_on(name: str, devices: int, sizes: tuple, packed: bool = False) -> tuple:
    """(losses of two steps, gradients of the first, parameters after both)."""
    config = Config(attention=AttentionConfig(gate_rank=4), lora=LoraConfig(rank=2))
    stage_config = StageConfig(
        steps=3, batch_size=8, seq_length=32, learning_rate=1e-2, kl_weight=0.5 if name == "stage2" else 0.0,
        trainable=("^mixers/",) if name == "stage1" else ("^lora/", "^mixers/"),
    )  # fmt: skip
    setattr(config, name, stage_config)
    where = mesh(devices, **dict(sizes))
    stage = stages.build(name, config, MODEL, where)
    params = models.init_params(MODEL, *stages.architecture(name, config), seed=0)
    state, frozen = stage.split(stages.place(params, where))
    losses, gradients, compiled = [], {}, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event.endswith("backend_compile_duration") else None
    )
    for index in range(2):
        rng = np.random.default_rng(index)
        lengths = rng.integers(16, 33, size=8).astype(np.int32)
        valid = np.arange(32) < lengths[:, None]
        tokens = rng.integers(0, 64, size=(8, 33)).astype(np.int32)
        batch = {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": valid, "lengths": lengths,
            "loss_weights": valid.astype(np.float32),
        }  # fmt: skip
        if packed:
            batch["segment_ids"] = documents(rng)
        arguments = (state, frozen, sharding.place_batch(batch, where), stage.key(0))
        before = len(compiled)
        state, metrics = stage.train_step(*arguments)
        assert (len(compiled) > before) == (index == 0)  # compiles once
        losses.append(float(metrics["loss"]))
        if index == 0:  # Adam's first moment is then the gradient times 1 - b1
            moments = optim.flatten(jax.device_get(state.opt_state[0].mu))
            gradients = {path: value / (1 - stage_config.b1) for path, value in moments.items()}
    return losses, gradients, optim.flatten(jax.device_get(state.params))


# Four heads and two kv heads: a tensor axis of 8 or 4 leaves the kv heads whole, of 2 splits both.
SHAPES = [
    {"data": 8, "fsdp": 1},
    {"fsdp": 8},
    {"tensor": 8, "fsdp": 1},
    {"sequence": 8, "fsdp": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2"])
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()))
def test_many_devices_equal_one(name, sizes):
    """Losses to 1e-5, gradients to 1e-5 of the largest entry of each array; float32."""
    check_steps(name, sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("stage1", {"sequence": 8, "fsdp": 1}),
        ("stage2", {"sequence": 8, "fsdp": 1}),
        ("stage1", {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2}),
        ("stage2", {"fsdp": 2, "sequence": 4}),
    ],
)
def test_packed_rows_on_many_devices_equal_one(name, sizes):
    """As above, with documents that go on in, end at and begin with the shards of their row."""
    check_steps(name, sizes, packed=True)
    plain, packed = (steps_on(name, 1, (), which)[0] for which in (False, True))
    assert abs(plain[0] - packed[0]) > 1e-3  # they do matter


def check_steps(name: str, sizes: dict[str, int], packed: bool = False) -> None:
    """Losses to 1e-5, gradients to 1e-5 of the largest entry of each array; float32."""
    expected, expected_gradients, expected_params = steps_on(name, 1, (), packed)
    losses, gradients, params = steps_on(name, 8, tuple(sizes.items()), packed)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for path, value in gradients.items():
        scale = np.abs(expected_gradients[path]).max()
        np.testing.assert_allclose(value, expected_gradients[path], rtol=1e-5, atol=1e-5 * scale, err_msg=path)
        # Adam divides by the gradient's size: where that is about 0, rounding decides on the direction.
        np.testing.assert_allclose(params[path], expected_params[path], atol=2e-4, err_msg=path)
