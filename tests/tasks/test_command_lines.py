"""evaluate and generate on a small random student, and their error lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.config import AttentionConfig, EvalConfig, LoraConfig, ModelConfig
from lawcat_jax.data.tokenize import decode, encode_prompt, stream_text
from lawcat_jax.data.train_tokenizer import save_tokenizer
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A model directory as a run leaves it: <run>/student, with a manifest beside."""
    from lawcat_jax import models
    from lawcat_jax.checkpoints.model_dir import save_model

    run = tmp_path_factory.mktemp("run")
    model = ModelConfig(
        vocab_size=420,
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        mlp_size=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    attention, lora = AttentionConfig(gate_rank=4), LoraConfig()
    save_model(
        run / "student",
        model=model,
        attention=attention,
        lora=lora,
        params=models.init_params(model, attention, lora, seed=0),
        tokenizer_source=save_tokenizer(small.byte_level(), run / "tokenizer"),
        extra={"training_length": 200, "eval": {"lengths": [200], "samples": 3, "batch_size": 2}},
    )
    (run / "manifest.json").write_text("{}")
    return run / "student"


def _run(module, *arguments, cwd):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", f"lawcat_jax.{module}", *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _evaluate(model, output, **options):
    from lawcat_jax.tasks.runner import evaluate_model

    return evaluate_model(
        model.graphdef,
        model.params,
        model.tokenizer,
        EvalConfig(lengths=(150,), samples=3, batch_size=2, **options),
        model="tiny",
        output=output,
        is_student=True,
        training_length=150,
    )


def test_evaluation_of_a_loaded_student(student, tmp_path):
    from lawcat_jax.inference.loading import load_for_inference

    model = load_for_inference(str(student.parent))  # the folder of the run finds its student
    assert model.is_student
    assert model.directory == student.parent
    assert model.eos_ids == (1,)
    results = _evaluate(model, tmp_path / "eval", teacher=False)
    assert results["passkey"]["student"][150].n == 3
    assert {file.name for file in (tmp_path / "eval").iterdir()} == {"passkey.json", "passkey.png"}


@pytest.mark.slow
def test_every_task_with_the_teacher_and_generation(student, tmp_path):
    from lawcat_jax.inference.generation import generate, stream
    from lawcat_jax.inference.loading import load_for_inference

    model = load_for_inference(str(student))
    assert model.directory == student.parent
    (tmp_path / "book.txt").write_text("The sky is blue. Here we go. " * 100)
    results = _evaluate(
        model, tmp_path / "eval", teacher=True, tasks=("passkey", "perplexity"), text=str(tmp_path / "book.txt")
    )
    assert 5.5 < results["perplexity"]["student"][150].nats < 6.5  # a random model: about log 420 = 6.04
    assert {file.name for file in (tmp_path / "eval").iterdir()} == {
        "passkey.json",
        "passkey_teacher.json",
        "passkey.png",
        "perplexity.json",
        "perplexity_teacher.json",
    }
    prompt = encode_prompt(model.tokenizer, "The sky is")
    options = {"max_new_tokens": 12, "eos_ids": model.eos_ids}
    (whole,) = generate(model.graphdef, model.params, [prompt], **options)
    pieces = list(stream_text(model.tokenizer, stream(model.graphdef, model.params, prompt, **options), context=prompt))
    assert "The sky is" + "".join(pieces) == decode(model.tokenizer, prompt + whole)


@pytest.mark.slow
def test_evaluate_command(student, tmp_path):
    done = _run("evaluate", f"--checkpoint={student}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((student.parent / "eval" / "passkey.json").read_text())
    assert written["task"] == "passkey"
    assert set(written["results"]) == {"200"}  # lengths and samples from the checkpoint
    assert written["results"]["200"]["n"] == 3
    assert "passkey student: 200 tokens, 3/3 samples" in done.stderr
    assert "tokens" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_generate_command(student, tmp_path):
    done = _run("generate", f"--checkpoint={student}", "--prompt=The sky is", "--max_new_tokens=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The sky is")
    assert len(done.stdout) > len("The sky is") + 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        pytest.param(
            "evaluate",
            ["--checkpoint=/no/such/place", "--lengths=200"],
            "/no/such/place",
            marks=pytest.mark.slow,
        ),
        ("evaluate", ["--checkpoint=x", "--lengths=many"], "--lengths: 'many' is not a number of tokens"),
        ("generate", ["--checkpoint=x"], "--prompt is missing"),
        ("train_tokenizer", ["--input=none/*.txt", "--target=t"], "no such file"),
    ],
)
def test_error_lines(module, arguments, message, tmp_path):
    done = _run(module, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_loading_errors(student, tmp_path):
    from lawcat_jax.inference.loading import load_for_inference

    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        load_for_inference(str(tmp_path / "file"))
    with pytest.raises(UserError, match="--checkpoint is missing"):
        load_for_inference("")
    with pytest.raises(UserError, match="not a model directory"):
        load_for_inference(str(tmp_path))
