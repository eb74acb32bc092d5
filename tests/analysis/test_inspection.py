"""Inspection of students: costs of replacement against models built for them, states against one pass, the report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.analysis.inspection import passes, weights
from lawcat_jax.analysis.inspection.figure import draw
from lawcat_jax.analysis.inspection.report import as_markdown
from lawcat_jax.analysis.inspection.run import hybrids, inspect_checkpoint, rank
from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.train_tokenizer import save_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.models.mixers.inits import identity_taps
from tests.data import tokenizers as small
from tests.models.helpers import LAWCAT, TINY, build, drawn, forward, jit, tokens

LORA = LoraConfig(rank=2, targets=("q_proj", "o_proj"))


def batch(rows=2, length=12, seed=0) -> Batch:
    """Random tokens, the last row two shorter."""
    drawn = tokens(rows, length + 1, seed)
    lengths = np.full(rows, length, np.int32)
    lengths[-1] -= 2
    mask = np.arange(length) < lengths[:, None]
    return Batch(
        tokens=drawn[:, :-1], targets=drawn[:, 1:], loss_weights=mask.astype(np.float32), lengths=lengths, mask=mask
    )


def alone(attention: AttentionConfig, params: dict, layer: int) -> tuple:
    """(graphdef, parameters) of the teacher in which one layer is the student's: a hybrid of all others."""
    linear = [number for number in range(TINY.num_layers) if number not in attention.softmax_layers]
    kept = tuple(number for number in range(TINY.num_layers) if number != layer)
    graphdef, _ = models.abstract(TINY, dataclasses.replace(attention, softmax_layers=kept), LORA)
    place = linear.index(layer)
    cut = {name: jax.tree.map(lambda x: x[place : place + 1], params[name]) for name in ("mixers", "lora")}
    return graphdef, {**params, **cut}


@pytest.mark.slow
def test_replacement_costs_are_those_of_hybrids_built_for_them():
    attention = dataclasses.replace(LAWCAT, softmax_layers=(1,))
    graphdef, params = build(TINY, attention, LORA)
    read = batch()
    found = passes.replacement_costs(graphdef, params, read)
    teacher = forward(params, read["tokens"], graphdef=graphdef, lengths=read["lengths"], as_teacher=True)
    for number, layer in enumerate((0, 2)):
        other, own = alone(attention, params, layer)
        student = forward(own, read["tokens"], graphdef=other, lengths=read["lengths"])
        p, q = (np.asarray(jax.nn.log_softmax(logits), np.float64) for logits in (teacher, student))
        divergence = (np.exp(p) * (p - q)).sum(-1)[read["mask"]].mean()
        assert divergence > 1e-3
        np.testing.assert_allclose(found[number], divergence, rtol=1e-4)
    turned = Batch(**{name: array[::-1] for name, array in read.items()})
    again = passes.replacement_costs(graphdef, params, turned)
    np.testing.assert_allclose(again, found, rtol=1e-5)
    assert rank((0, 2), again) == rank((0, 2), found)


def test_a_perfect_copy_costs_nothing():
    """A LoLCATs window as long as the text is softmax attention."""
    graphdef, params = build(TINY, AttentionConfig(kind="lolcats", window_size=16))
    read = batch()
    assert np.abs(passes.replacement_costs(graphdef, params, read)).max() < 1e-6
    assert np.abs(passes.relative_errors(params, read, graphdef=graphdef)).max() < 1e-10


def test_states_in_chunks_are_those_of_one_pass():
    graphdef, params = build(TINY, LAWCAT)
    read = tokens(2, 11)
    positions, norms = passes.state_norms(graphdef, params, read, 4)
    assert positions == [4, 8, 11]

    @jit
    def after(params, lengths):
        model = models.bind(graphdef, params)
        return model(read, lengths=lengths, recurrent=model.init_recurrent(2))[1]["linear"]["S"]

    for position, found in zip(positions, norms, strict=True):
        S = np.asarray(after(params, np.full(2, position, np.int32)), np.float64)
        np.testing.assert_allclose(found, np.sqrt((S**2).sum((-1, -2))).mean(1), rtol=1e-4)


def test_effective_rank_of_the_gates():
    assert weights.effective_rank(np.ones(7)) == pytest.approx(7)
    assert weights.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert weights.effective_rank(np.zeros(3)) == 0
    _, params = build(TINY, LAWCAT)
    mixers = params["mixers"]
    found = weights.gate_singular_values(mixers)
    dense = mixers["gate_down"]["kernel"].astype(np.float64) @ mixers["gate_up"]["kernel"]
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False)[:, :4], rtol=1e-6)
    _, full = build(TINY, dataclasses.replace(LAWCAT, gate_rank=0))
    assert weights.gate_singular_values(full["mixers"]).shape == (3, 16)
    _, none = build(TINY, dataclasses.replace(LAWCAT, gate_kind="none"))
    assert weights.gate_singular_values(none["mixers"]) is None


def test_drift_of_taps():
    taps = identity_taps(None, (3, 4, 4, 8), np.float32)
    mixers = {"conv_q": taps, "conv_k": taps, "feature_map": np.ones((3, 4, 8, 4))}
    assert all(not drift.any() for drift in weights.tap_drift(mixers, LAWCAT).values())
    spread = np.zeros(taps.shape)
    spread[1, 2, 0, :4] = 0.5
    moved = {**mixers, "conv_k": np.asarray(taps) + spread}
    drift = weights.tap_drift(moved, LAWCAT)
    assert set(drift) == {"conv_q", "conv_k"}
    assert drift["conv_k"][1, 2] == pytest.approx(1.0)  # sqrt(4 * 0.25)
    assert np.count_nonzero(drift["conv_k"]) == 1
    assert weights.tap_drift(mixers, dataclasses.replace(LAWCAT, init="normal")) == {}


def test_rankings():
    assert rank([0, 2, 3], [1.0, 5.0, 1.0]) == [2, 0, 3]
    assert hybrids([2, 0, 3], kept=[1]) == {
        "1": "--config.attention.softmax_layers=1,2",
        "2": "--config.attention.softmax_layers=0,1,2",
    }
    assert hybrids([2], kept=[]) == {}


def write_student(folder, attention: AttentionConfig, layers: int = 2):
    model = ModelConfig(
        vocab_size=420,
        hidden_size=32,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_size=48,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    save_model(
        folder / "student",
        model=model,
        attention=attention,
        params=drawn(models.abstract(model, attention)[1]),
        tokenizer_source=save_tokenizer(small.byte_level(), folder / "tokenizer"),
        extra={"training_length": 128},
    )
    return str(folder / "student")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("attention", "shown", "absent"),
    [
        (AttentionConfig(gate_rank=4), {"half_life", "effective_gate_rank", "denominator", "conv_k_drift"}, set()),
        pytest.param(
            AttentionConfig(kind="lolcats", window_size=8),
            {"entropy_q", "window_share"},
            {"half_life", "effective_gate_rank", "conv_q_drift", "denominator"},
            marks=SLOW,
        ),
        pytest.param(
            AttentionConfig(kind="window", window_size=8, sinks=2),
            {"sink_share"},
            {"half_life", "effective_gate_rank", "conv_q_drift", "denominator"},
            marks=SLOW,
        ),
        pytest.param(AttentionConfig(gate_rank=4, softmax_layers=(1,)), {"half_life"}, {"window_share"}, marks=SLOW),
        pytest.param(
            AttentionConfig(gate_kind="none", conv="off", window_size=8, init="normal"),
            {"denominator", "window_share"},
            {"half_life", "effective_gate_rank", "conv_q_drift"},
            marks=SLOW,
        ),
    ],
    ids=["lawcat", "lolcats", "window", "hybrid", "no gate"],
)
def test_report_of_a_student(attention, shown, absent, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("The grass is green, and nobody asks why. " * 60)
    student = write_student(tmp_path, attention, layers=3 if attention.softmax_layers else 2)
    options = {"text": str(text), "samples": 2, "length": 32, "max_length": 300, "output": str(tmp_path / "report")}
    found = inspect_checkpoint(student, **options)
    stored = json.loads((tmp_path / "report" / "inspection.json").read_text())
    assert stored == json.loads(json.dumps(found))
    layers = [layer for layer in range(3 if attention.softmax_layers else 2) if layer not in attention.softmax_layers]
    assert [row["layer"] for row in stored["layers"]] == layers
    for row in stored["layers"]:
        assert shown | {"relative_mse", "kl"} <= set(row)
        assert not absent & set(row)
    if attention.kind == "window":  # whose state are the rows themselves
        assert stored["state_norm"] is None
    else:
        assert stored["state_norm"]["positions"] == [300]
        assert set(stored["state_norm"]["layers"]) == {str(layer) for layer in layers}
    assert sorted(stored["rankings"]["kl"]) == layers
    markdown = (tmp_path / "report" / "inspection.md").read_text()
    assert markdown in capsys.readouterr().out
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[: len(layers) + 2]}) == 1
    assert stored["hybrids"]["kl"]["1"] in markdown
    assert (tmp_path / "report" / "inspection.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_shows_what_a_student_without_gates_has(tmp_path):
    rows = [{"layer": n, "relative_mse": 0.5, "kl": 0.0, "entropy_q": [1.5], "entropy_k": [1.0]} for n in (0, 3)]
    found = {"checkpoint": "some/student", "text": "a book", "samples": 1, "length": 8, "training_length": None}
    found |= {"layers": [{**row, "window_share": [0.25, 0.75]} for row in rows]}
    found |= {"state_norm": {"positions": [8], "layers": {"0": [[1.0]], "3": [[2.0]]}}}
    found |= {"rankings": {"kl": [0, 3]}, "hybrids": {"kl": {"1": "--config.attention.softmax_layers=0"}}}
    markdown = as_markdown(found)
    assert "| layer | entropy of q features | window share | relative MSE | KL if replaced |" in markdown
    assert "| 3 | 1.50 | 0.500 | 0.5000 | 0.00e+00 |" in markdown
    assert "rank" not in markdown.split("## States")[0]
    assert "## States" in markdown
    assert "## States" not in as_markdown({**found, "state_norm": None})
    for states in (None, found["state_norm"]):
        draw(tmp_path / "page.png", {**found, "state_norm": states})
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_inspected(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The sky is blue. " * 20)
    (tmp_path / "file").write_text("x")
    student = write_student(tmp_path, AttentionConfig(gate_rank=4))
    with pytest.raises(UserError, match="asset:tiny_llama has no linearised layers to inspect"):
        inspect_checkpoint("asset:tiny_llama")
    with pytest.raises(UserError, match="--checkpoint is missing"):
        inspect_checkpoint("")
    with pytest.raises(UserError, match=r"tokens, 65536 are needed: give more text"):
        inspect_checkpoint(student, text=str(text))
    with pytest.raises(UserError, match="--length=300 does not fit the teacher, which has 256 positions"):
        inspect_checkpoint(student, length=300)
    with pytest.raises(UserError, match="too short for its frame"):
        inspect_checkpoint(student, length=16)
    with pytest.raises(UserError, match="exists and is not a directory"):
        inspect_checkpoint(student, output=str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("inspect", [], "--checkpoint is missing"),
        ("inspect", ["--checkpoint=asset:tiny_llama"], "has no linearised layers to inspect"),
        ("inspect", ["--checkpoint=x", "--max_length=3"], "max_length"),
        ("edit", ["--checkpoint=x", "--target=y", "--softmax_layers=one"], "'one' is not the number of a layer"),
        ("edit", ["--checkpoint=x", "--target=y"], "nothing to do"),
        ("teacher_logits", ["--config=configs/tiny.py"], "--target is missing"),
        ("teacher_logits", ["--config=configs/tiny.py", "--target=y", "--k=100000"], "--k=100000: the vocabulary has"),
    ],
)
def test_error_lines(module, arguments, message, tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"lawcat_jax.{module}",
            *(item.replace("=configs", f"={root}/configs") for item in arguments),
        ],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_that_are_no_numbers(tmp_path):
    spoilt = write_student(tmp_path, AttentionConfig(gate_rank=4))
    bundle = load_model(spoilt)
    bundle.params["mixers"]["feature_map"][1, 0, 0, 0] = np.nan
    save_model(
        spoilt,
        model=bundle.model,
        attention=bundle.attention,
        params=bundle.params,
        tokenizer_source=bundle.tokenizer_path,
        overwrite=True,
    )
    with pytest.raises(UserError, match=r"output of layer 1 .*mixers/feature_map\[1\]"):
        inspect_checkpoint(spoilt, samples=1, length=128, max_length=256, output=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
