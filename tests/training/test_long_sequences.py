"""Tokens over the ``sequence`` axis of the mesh: a prompt's logits and the gradients of stage 2 are those of one device.

``small`` runs on simulated devices. ``llama1b`` is the same at the length for which the axis is there, on 4 or 8 GPUs:
``JAX_PLATFORMS=cuda python -m pytest -m slow tests/training/test_long_sequences.py -k llama1b``.
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.analysis.throughput import device, records
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, MeshConfig, ModelConfig, StageConfig
from lawcat_jax.runtime import sharding
from lawcat_jax.training import optim, stages

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with random weights: lengths of the prompt (read in two pieces) and of a training sequence; logits are
    compared at every ``stride``-th position; ``tolerance`` is the root mean square of the error as a share of the values'.
    """

    prompt: int
    length: int
    stride: int
    dtype: str
    tolerance: float


CASES = {
    "small": Case(prompt=128, length=64, stride=1, dtype="float32", tolerance=1e-5),
    "llama1b": Case(prompt=65_536, length=16_384, stride=64, dtype="bfloat16", tolerance=2e-2),
}


def config_of(name: str) -> Config:
    if name != "small":
        return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]("paper")
    config = Config(attention=AttentionConfig(gate_rank=4), lora=LoraConfig(rank=2))
    config.stage2 = StageConfig(steps=3, learning_rate=1e-2, trainable=("^lora/", "^mixers/"))
    config.teacher.architecture = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    return config


def placed(name: str, parts: int):
    """(configuration, its model, a mesh of ``parts`` devices along ``sequence``, parameters of the student on it)."""
    needs_gpu = name != "small"
    if jax.device_count() < parts or needs_gpu != (jax.default_backend() == "gpu"):
        pytest.skip(f"needs {parts} {'GPUs' if needs_gpu else '(simulated) devices'}")
    config = config_of(name)
    model = config.teacher.architecture
    assert model is not None
    where = sharding.make_mesh(MeshConfig(fsdp=1, sequence=parts), jax.devices()[:parts])
    dtype = jnp.dtype(CASES[name].dtype)
    return config, model, where, device.random_params(model, config.attention, config.lora, where, seed=0, dtype=dtype)


@functools.cache
def logits_of(name: str, parts: int) -> np.ndarray:
    """Logits of a prompt of random tokens that is read in two pieces."""
    case = CASES[name]
    config, model, where, params = placed(name, parts)
    graphdef, _ = models.abstract(model, config.attention, config.lora, dtype=jnp.dtype(case.dtype))

    def read(params, cache, tokens):
        decoder = models.bind(graphdef, params)
        hidden, cache = decoder.prefill(tokens, cache, return_hidden=True)
        return decoder.head(hidden[:, case.stride - 1 :: case.stride]), cache

    cache, found = models.bind(graphdef, params).init_cache(1, 1), []
    cache = jax.device_put(cache, sharding.shardings(cache, where))
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, (1, case.prompt), np.int32)
    pieces = [jax.device_put(piece, sharding.replicated(where)) for piece in np.split(prompt, 2, axis=1)]
    lies = jax.tree.map(lambda x: x.sharding, cache)
    run = jax.jit(sharding.on_mesh(read, where), out_shardings=(sharding.replicated(where), lies))
    hasty = {"xla_backend_optimization_level": 0} if name == "small" else None  # it runs for milliseconds
    run = run.lower(params, cache, pieces[0]).compile(compiler_options=hasty)
    for piece in pieces:
        logits, cache = run(params, cache, piece)
        found.append(np.asarray(logits, np.float32))
    # With fewer than 8 parts an all-gather tells the parts of each other, with more permutations do.
    sent = [kind for kind in ("all-gather", "collective-permute") if kind in run.as_text()]
    assert bool(sent) == (parts > 1)
    return np.concatenate(found, axis=1)


@functools.cache
def gradients_of(name: str, parts: int) -> dict[str, np.ndarray]:
    """What stage 2 trains, by path: the gradient of one step, and the ``loss``."""
    case = CASES[name]
    config, model, where, params = placed(name, parts)
    config.mesh = MeshConfig(fsdp=1, sequence=parts)
    config.stage2.batch_size, config.stage2.seq_length = 1, case.length
    sharding.check_mesh(config, model, where, ["stage2"])
    stage = stages.build("stage2", config, model, where, dtype=jnp.dtype(case.dtype))
    state, frozen = stage.split(params)
    batch = records.example_batch(model.vocab_size, 1, case.length, seed=0)
    state, metrics = stage.train_step(state, frozen, sharding.place_batch(batch, where), stage.key(0))
    moments = optim.flatten(jax.device_get(state.opt_state[0].mu))  # Adam's first: the gradient times 1 - b1
    return {path: value for path, value in moments.items() if np.any(value)} | {"loss": np.asarray(metrics["loss"])}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, as a share of that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


at_length = pytest.param("llama1b", marks=[pytest.mark.slow, pytest.mark.gpu])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", at_length])
@pytest.mark.parametrize("parts", [4, 8])
def test_logits_of_a_prompt(name, parts):
    found, expected = logits_of(name, parts), logits_of(name, 1)
    assert found.shape == expected.shape
    assert error(found, expected) < CASES[name].tolerance
    last = slice(found.shape[1] // 2, None)  # the second piece goes on from the state that the first has left
    assert error(found[:, last], expected[:, last]) < CASES[name].tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", at_length])
@pytest.mark.parametrize("parts", [4, 8])
def test_gradients_of_stage_2(name, parts):
    found, expected = gradients_of(name, parts), gradients_of(name, 1)
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for path, value in found.items():
        assert error(value, expected[path]) < CASES[name].tolerance, path
