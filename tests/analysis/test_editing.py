"""Edited students: gate ranks under a budget, and hybrids cut from a student."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lawcat_jax import models
from lawcat_jax.analysis.editing import gate_ranks
from lawcat_jax.analysis.editing.run import divergence, edit_checkpoint, with_gate_budget, with_softmax_layers
from lawcat_jax.checkpoints.model_dir import ModelBundle, load_model
from lawcat_jax.config import AttentionConfig, LoraConfig
from lawcat_jax.errors import UserError
from tests.analysis.test_inspection import batch, write_student
from tests.models.helpers import LAWCAT, TINY, build, forward, jit

LORA = LoraConfig(rank=2, targets=("q_proj", "o_proj"))
EACH = 24 + 16  # parameters of one rank of one layer of TINY


@pytest.fixture(scope="module")
def student() -> ModelBundle:
    _, params = build(TINY, LAWCAT, LORA)
    return ModelBundle(TINY, LAWCAT, LORA, params, None, {})


def gate_logits(bundle: ModelBundle, inputs: np.ndarray) -> np.ndarray:
    """[M, T, N] of the gates of all layers on given inputs [M, T, D]."""
    mixers = jax.tree.map(lambda x: np.asarray(x, np.float64), bundle.params["mixers"])
    return inputs @ mixers["gate_down"]["kernel"] @ mixers["gate_up"]["kernel"] + mixers["gate_up"]["bias"][:, None]


def hidden_inputs(bundle: ModelBundle, read) -> np.ndarray:
    """[M, tokens, D]: what the gates see of the valid tokens, layer by layer in Python."""
    graphdef, _ = models.abstract(bundle.model, bundle.attention, bundle.lora)

    @jit
    def run(params):
        decoder = models.bind(graphdef, params)
        context = decoder.context(read["tokens"], lengths=read["lengths"])

        def mix(mixer, index, state, h, q, k, v):
            return mixer(h, q, k, v, context)[0], h

        (segment,) = decoder.segments()
        return decoder.scan_linear(segment, decoder.embedded(read["tokens"], context), mix)[1]

    return np.asarray(run(bundle.params), np.float64)[:, read["mask"]]


def test_budgets_of_gate_parameters(student):
    """The budget is kept, what is lost is what was said, and it falls as the budget grows, to nothing at the full one."""
    read = batch()
    inputs = hidden_inputs(student, read)
    before, losses = gate_logits(student, inputs), []
    for budget in (0, EACH - 1, 3 * EACH, 5 * EACH + 7, 8 * EACH, 12 * EACH):
        edited, facts = with_gate_budget(student, budget, read, "it")
        assert facts["parameters"] == EACH * sum(facts["ranks"]) <= budget
        assert facts["parameters"] > budget - EACH
        down = edited.params["mixers"]["gate_down"]["kernel"]
        assert down.shape == (3, 24, max(1, *facts["ranks"])) == (3, 24, edited.attention.gate_rank)
        assert facts["stored"] == 3 * EACH * down.shape[-1]
        for layer, rank in enumerate(facts["ranks"]):
            assert np.linalg.matrix_rank(down[layer]) == rank
        error = np.sqrt(np.mean((gate_logits(edited, inputs) - before) ** 2))
        assert error == pytest.approx(facts["logit_error"], rel=1e-3, abs=1e-6)
        losses.append(error)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2] > losses[3] > losses[4] > 0.01


def test_the_budget_is_spent_better_than_evenly(student):
    read = batch()
    mixers = student.params["mixers"]
    graphdef, _ = models.abstract(TINY, LAWCAT, LORA)
    found = gate_ranks.moments(student.params, read, graphdef=graphdef)
    parts = gate_ranks.components(mixers["gate_up"]["kernel"], np.asarray(found.covariance))
    inputs = hidden_inputs(student, read)

    def error(ranks, parts, mean) -> float:
        down, up = gate_ranks.truncated(mixers["gate_down"], mixers["gate_up"], parts, mean, ranks)
        own = dataclasses.replace(student, params={"mixers": {"gate_down": down, "gate_up": up}})
        return float(np.mean((gate_logits(own, inputs) - gate_logits(student, inputs)) ** 2))

    chosen = gate_ranks.choose_ranks(parts.variance, 6)
    assert sum(chosen) == 6
    assert error(chosen, parts, found.mean) <= error([2, 2, 2], parts, found.mean)
    # Truncating the matrices themselves, which knows nothing of the text, loses more at the same ranks.
    blind = gate_ranks.components(
        mixers["gate_up"]["kernel"], np.einsum("mdr,mds->mrs", *[mixers["gate_down"]["kernel"]] * 2)
    )
    assert error([2, 2, 2], parts, found.mean) < error([2, 2, 2], blind, np.zeros((3, 4)))


def test_the_full_budget_gives_identical_logits(student):
    read = batch()
    for budget in (12 * EACH, 10**12):
        edited, facts = with_gate_budget(student, budget, read, "it")
        assert facts["ranks"] == [4, 4, 4]
        graphdef, _ = models.abstract(TINY, edited.attention, LORA)
        np.testing.assert_array_equal(
            forward(edited.params, read["tokens"], graphdef=graphdef),
            forward(student.params, read["tokens"], graphdef=graphdef),
        )


@pytest.mark.slow
def test_unused_columns_stay_unused_in_training(student):
    edited, facts = with_gate_budget(student, 5 * EACH, batch(), "it")
    assert len(set(facts["ranks"])) > 1
    graphdef, _ = models.abstract(TINY, edited.attention)
    base = {name: value for name, value in edited.params.items() if name not in ("mixers", "lora")}

    def loss(mixers):
        return jnp.mean(models.bind(graphdef, {**base, "mixers": mixers})(batch()["tokens"]) ** 2)

    mixers = jax.tree.map(jnp.asarray, edited.params["mixers"])
    gradients = jit(jax.grad(loss))(mixers)
    optimizer = optax.adam(1e-2)
    updates, _ = optimizer.update(gradients, optimizer.init(mixers))
    after = optax.apply_updates(mixers, updates)
    for layer, rank in enumerate(facts["ranks"]):
        assert not np.any(after["gate_down"]["kernel"][layer, :, rank:])
        assert not np.any(after["gate_up"]["kernel"][layer, rank:])
        assert rank == 0 or np.any(updates["gate_down"]["kernel"][layer, :, :rank])


def test_a_hybrid_cut_from_a_student(student):
    hybrid = with_softmax_layers(student, (1,), "it")
    assert hybrid.attention.softmax_layers == (1,)
    twice = with_softmax_layers(hybrid, (0,), "it")
    once = with_softmax_layers(student, (1, 0), "it")
    assert twice.attention == once.attention
    jax.tree.map(np.testing.assert_array_equal, twice.params, once.params)
    np.testing.assert_array_equal(once.params["mixers"]["conv_q"], student.params["mixers"]["conv_q"][2:])
    with pytest.raises(UserError, match="it has no linearised layer 1; it has 0, 2"):
        with_softmax_layers(hybrid, (1,), "it")
    with pytest.raises(UserError, match="no linearised layer would be left"):
        with_softmax_layers(hybrid, (0, 2), "it")


@pytest.mark.slow
def test_divergence_of_an_edit(student):
    read = batch()
    hybrid = with_softmax_layers(student, (1,), "it")
    p, q = (
        np.asarray(jax.nn.log_softmax(logits), np.float64)
        for logits in (
            forward(
                one.params,
                read["tokens"],
                lengths=read["lengths"],
                graphdef=models.abstract(TINY, one.attention, LORA)[0],
            )
            for one in (student, hybrid)
        )
    )
    expected = (np.exp(p) * (p - q)).sum(-1)[read["mask"]].mean()
    assert expected > 1e-4
    assert divergence(student, hybrid, read) == pytest.approx(expected, rel=1e-4)
    assert divergence(hybrid, hybrid, read) == pytest.approx(0, abs=1e-7)


def test_what_cannot_be_edited(tmp_path):
    path = write_student(tmp_path, AttentionConfig(gate_rank=4), layers=3)
    with pytest.raises(UserError, match="nothing to do"):
        edit_checkpoint(path, str(tmp_path / "new"))
    with pytest.raises(UserError, match="--target is missing"):
        edit_checkpoint(path, "", softmax_layers=(1,))
    with pytest.raises(UserError, match="asset:tiny_llama has no linearised layers to edit"):
        edit_checkpoint("asset:tiny_llama", str(tmp_path / "new"), softmax_layers=(1,))
    with pytest.raises(UserError, match="source and target are the same directory"):
        edit_checkpoint(path, path, softmax_layers=(1,), overwrite=True)
    with pytest.raises(UserError, match=r"--softmax_layers: .* has no linearised layer 5"):
        edit_checkpoint(path, str(tmp_path / "new"), softmax_layers=(5,), samples=1, length=128)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_editing_a_checkpoint(tmp_path, capsys):
    path = write_student(tmp_path, AttentionConfig(gate_rank=4), layers=3)
    options = {"samples": 1, "length": 128}
    facts = edit_checkpoint(path, str(tmp_path / "new"), softmax_layers=(1,), gate_parameters=200, **options)
    printed = capsys.readouterr().out
    assert f"gate ranks by linearised layer: {', '.join(map(str, facts['ranks']))}" in printed
    edited = load_model(str(tmp_path / "new"))
    assert edited.attention is not None
    assert edited.attention.softmax_layers == (1,)
    assert len(facts["ranks"]) == 2
    assert sum(facts["ranks"]) * (32 + 16) == facts["parameters"] == 192
    assert edited.extra["training_length"] == 128
    assert edited.tokenizer_path is not None
    with pytest.raises(UserError, match="pass --overwrite"):
        edit_checkpoint(path, str(tmp_path / "new"), softmax_layers=(1,), **options)


def test_gates_without_a_rank():
    mixers = build(TINY, dataclasses.replace(LAWCAT, gate_kind="none"))[1]["mixers"]
    with pytest.raises(UserError, match="it has no gates of two matrices"):
        gate_ranks.rank_parameters(mixers, "it")
