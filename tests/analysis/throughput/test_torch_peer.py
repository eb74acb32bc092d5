"""The peer is the same model: same weights, same losses, same gradients as the trainer's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.analysis.throughput import records
from lawcat_jax.checkpoints.hf.mapping import hf_slots
from lawcat_jax.training import optim, stages
from lawcat_jax.training.step import StepInputs
from tests.analysis.throughput.small import MODEL, get_config
from tests.models.helpers import drawn, jit

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lawcat_jax.analysis.throughput import torch_model, torch_peer  # noqa: E402

CONFIG = get_config()
BATCH = records.example_batch(MODEL.vocab_size, 2, 24, seed=3)


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small only wait for more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def ours(stage: str):
    """(parameters, loss, gradients by path) of the trainer's own loss function, float32."""
    graphdef, shapes = models.abstract(MODEL, *stages.architecture(stage, CONFIG))
    params = drawn(shapes)
    trainable, frozen = optim.split(params, getattr(CONFIG, stage).trainable, "test")
    loss_fn = stages.LOSSES[stage](graphdef, getattr(CONFIG, stage))

    @jit
    def run(trainable):
        def loss(trainable):
            sums, _ = loss_fn(optim.merge(trainable, frozen), BATCH, StepInputs())
            return sums.loss / sums.weight

        return jax.value_and_grad(loss)(trainable)

    loss, gradients = run(trainable)
    return params, float(loss), optim.flatten(jax.device_get(gradients))


def peer(stage: str, params: dict, normaliser: str = "widened", conv: str = "shifted"):
    """The peer's model with our weights."""
    decoder = torch_model.build(
        CONFIG,
        stage,
        dtype=torch.float32,
        device="cpu",
        gla=torch_model.reference_gla,
        normaliser=normaliser,
        conv=torch_model.CONVOLUTIONS[conv],
    )
    flat, weights = optim.flatten(params), dict(decoder.named_parameters())
    with torch.no_grad():
        for name, slot in hf_slots(MODEL).items():
            ((path, _),) = slot.parts  # nothing of this family is fused
            value = flat[path] if slot.layer is None else flat[path][slot.layer]
            value = value.T if slot.transpose else value
            weights[name.replace("self_attn.", "self_attn.teacher.")].copy_(torch.from_numpy(np.array(value)))
        for layer, attention in enumerate(torch_model.attentions(decoder)):
            for path, parameter in torch_model.student_parameters(attention):
                parameter.copy_(torch.from_numpy(np.array(_taps(path, flat[path][layer]))))
    return decoder


def _taps(path: str, value: np.ndarray) -> np.ndarray:
    return value.swapaxes(1, 2).reshape(-1, value.shape[1]) if "/conv_" in path else value


def run(decoder, stage: str, **changes) -> float:
    settings = dataclasses.replace(getattr(CONFIG, stage), **changes)
    return float(torch_peer.loss_and_gradients(decoder, stage, settings, torch_peer.host_batch(BATCH)))


@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage2", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_the_trainer(stage):
    params, loss, gradients = ours(stage)
    decoder = peer(stage, params)
    assert run(decoder, stage) == pytest.approx(loss, rel=1e-4)
    trained = 0
    for layer, attention in enumerate(torch_model.attentions(decoder)):
        for path, parameter in torch_model.student_parameters(attention):
            if not parameter.requires_grad:
                assert path not in gradients
                continue
            expected = _taps(path, gradients[path][layer])
            error = np.sqrt(np.mean((parameter.grad.numpy() - expected) ** 2))
            assert error < 1e-3 * np.sqrt(np.mean(expected**2)), (layer, path)
            trained += parameter.numel()
    assert trained == sum(gradient.size for gradient in gradients.values())
    assert trained == sum(p.numel() for p in torch_model.trainable_parameters(decoder))


@pytest.mark.parametrize(
    ("stage", "normaliser", "conv"),
    [("stage1", "padded", "conv1d"), ("stage1", "second_call", "shifted"), ("stage2", "padded", "conv1d")],
)
def test_all_forms_are_the_same_function(stage, normaliser, conv):
    params, loss, _ = ours(stage)
    assert run(peer(stage, params, normaliser, conv), stage) == pytest.approx(loss, rel=1e-4)


def test_checkpointing_and_micro_batches_change_nothing():
    params, loss, _ = ours("stage2")
    decoder = peer("stage2", params)
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert run(decoder, "stage2", grad_accum=2) == pytest.approx(loss, rel=1e-4)


def test_the_step_trains():
    torch.manual_seed(0)
    decoder = peer("stage1", ours("stage1")[0])
    frozen = decoder.model.layers[0].mlp.up_proj.weight.clone()
    step = torch_peer.make_step(decoder, "stage1", dataclasses.replace(CONFIG.stage1, learning_rate=1e-2), "cpu")
    batch = torch_peer.host_batch(BATCH)
    losses = [float(step(batch)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(decoder.model.layers[0].mlp.up_proj.weight, frozen)


def test_the_reference_is_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 37, 2, size, generator=generator) for size in (6, 6, 5))
    log_g = -8 * torch.rand(1, 37, 2, 6, generator=generator)
    state, expected = torch.zeros(1, 2, 6, 5), []
    for t in range(37):
        state = log_g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    found = torch_model.reference_gla(q, k, v, log_g)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_other_designs_are_refused():
    assert torch_model.refusal(CONFIG, "stage2") == ""
    without = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, conv="off"))
    assert "config.attention.conv is 'off'" in torch_model.refusal(without, "stage1")
