"""Frequencies that follow the length are those of the whole text, in however many pieces it is read: against one pass of
transformers without a cache, and its greedy text.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.config import AttentionConfig, RopeScaling
from lawcat_jax.inference.generation import empty_cache, generate, read_prompts
from lawcat_jax.inference.likelihood import log_likelihoods
from lawcat_jax.inference.session import Session
from lawcat_jax.tasks.decoder_model import position_nll
from tests.checkpoints import hf_models
from tests.models.helpers import TINY, build, forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ORIGINAL, NEW, FOLLOWING = 32, 6, 4  # tokens
LENGTHS = (15, 37, 45, 58)  # growing: transformers' dynamic frequencies never shrink above the original length
GROWING = (28, 30, 31)  # prompts whose answers pass the original length
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.5, 4.0, 7.0],
    "original_max_position_embeddings": ORIGINAL,
}
PHI3 = dict(original_max_position_embeddings=ORIGINAL, rope_parameters=LONGROPE, pad_token_id=0)
KINDS = {
    "longrope": ("phi3", {**PHI3, "max_position_embeddings": 128}),
    "longrope_window": ("phi3", {**PHI3, "max_position_embeddings": 128, "sliding_window": 20}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
}


@dataclasses.dataclass
class Case:
    """One random checkpoint: ours, and what transformers says of each prompt alone."""

    family: str
    graphdef: object
    params: dict
    prompts: list[list[int]]
    log_p: list[np.ndarray]  # [T, V] of each prompt
    greedy: list[list[int]]
    growing: list[list[int]]  # other prompts, and their greedy texts
    grown: list[list[int]]


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module", params=["longrope", "dynamic", *slow("longrope_window")])
def case(request, tmp_path_factory):
    family, values = KINDS[request.param]
    directory = hf_models.make_random(tmp_path_factory.mktemp("model"), family, values)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 96, length).tolist() for length in LENGTHS]
    growing = [random.integers(3, 96, length).tolist() for length in GROWING]

    def log_p(prompt):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt]), use_cache=False).logits
        return torch.log_softmax(logits[0].double(), -1).numpy()

    def greedy(prompt):
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        return reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()

    log_ps, texts = [log_p(prompt) for prompt in prompts], [greedy(prompt) for prompt in (*growing, *prompts)]
    grown, texts = texts[: len(growing)], texts[len(growing) :]
    bundle = model_dir.load_model(str(directory), dtype="float32")
    graphdef, _ = models.abstract(bundle.model)
    return Case(family, graphdef, bundle.params, prompts, log_ps, texts, growing, grown)


@pytest.mark.parametrize("chunk", [16, *slow(0, 24)])
def test_prompts_of_a_batch(case, chunk):
    cache, logits = empty_cache(case.params, graphdef=case.graphdef, batch=len(LENGTHS), length=64)
    _, logits = read_prompts(case.graphdef, case.params, cache, logits, case.prompts, chunk=chunk)
    ours = np.asarray(logits, np.float64)
    ours -= np.log(np.exp(ours).sum(-1, keepdims=True))
    np.testing.assert_allclose(ours, [rows[-1] for rows in case.log_p], atol=1e-4)


@pytest.mark.parametrize("chunk", [16, *slow(0)])
def test_greedy_text(case, chunk):
    options = dict(max_new_tokens=NEW, batch_size=len(LENGTHS), prefill_chunk=chunk)
    assert generate(case.graphdef, case.params, case.prompts, **options) == case.greedy


def test_answers_that_pass_the_original_length(case):
    """Each at another token, beside one that began above it. Phi-3 is read anew there, Llama keeps its keys."""
    options = dict(max_new_tokens=NEW, batch_size=4, prefill_chunk=16)
    made = generate(case.graphdef, case.params, [*case.growing, case.prompts[1]], **options)
    assert made == [*case.grown, case.greedy[1]]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 16])
def test_session(case, chunk):
    for prompt, text in ((case.prompts[-1], case.greedy[-1]), (case.growing[1], case.grown[1])):
        session = Session(case.graphdef, case.params, prefill_chunk=chunk)
        assert list(session.stream(prompt, max_new_tokens=NEW)) == text
    if case.family == "phi3":  # where more text makes it longer, the whole is read anew as well
        session = Session(case.graphdef, case.params, prefill_chunk=chunk)
        list(session.stream(case.growing[0][:20], max_new_tokens=1))
        whole = [*session.tokens, *case.prompts[0]]
        expected = generate(case.graphdef, case.params, [whole], max_new_tokens=NEW, batch_size=1)
        assert [list(session.stream(case.prompts[0], max_new_tokens=NEW))] == expected


def picked(case):
    """log p of each next token of each prompt but the last, where the last token is not read."""
    return [rows[np.arange(len(row) - 1), row[1:]] for rows, row in zip(case.log_p, case.prompts, strict=True)]


@pytest.mark.parametrize("chunk", [16, *slow(0, 24)])
def test_likelihoods(case, chunk):
    """Of tokens that follow the prompts: those that transformers gives after the same tokens."""
    last = [int(rows[-1].argmin()) for rows in case.log_p]  # not read, so that the tokens read are the prompts
    rows = [
        (prompt[:-FOLLOWING], [*prompt[-FOLLOWING:], token]) for prompt, token in zip(case.prompts, last, strict=True)
    ]
    expected = [
        inner[-FOLLOWING:].sum() + log_p[-1, token]
        for inner, log_p, token in zip(picked(case), case.log_p, last, strict=True)
    ]
    found = log_likelihoods(case.graphdef, case.params, rows, batch_size=len(rows), prefill_chunk=chunk)
    np.testing.assert_allclose([total for total, _ in found], expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [16, *slow(0)])
def test_likelihoods_by_position(case, chunk):
    batch = {name: np.zeros((len(LENGTHS), max(LENGTHS)), np.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = np.zeros((len(LENGTHS), max(LENGTHS)), np.float32)
    batch["lengths"] = np.array(LENGTHS, np.int32)
    expected = np.zeros(max(LENGTHS))
    for row, (prompt, inner) in enumerate(zip(case.prompts, picked(case), strict=True)):
        batch["tokens"][row, : len(prompt)] = prompt
        batch["targets"][row, : len(inner)], batch["loss_weights"][row, : len(inner)] = prompt[1:], 1.0
        expected[: len(inner)] -= inner
    totals, _ = position_nll(case.graphdef, case.params, as_teacher=True, chunk=chunk)(batch)
    np.testing.assert_allclose(totals, expected, atol=4e-4)  # a sum of four rows


def test_windows_and_softmax_layers_of_a_student():
    """A student that rotates in some layers reads in pieces what it reads in one pass."""
    scaling = RopeScaling(kind="dynamic", factor=3.0)
    config = dataclasses.replace(TINY, num_layers=2, max_position_embeddings=ORIGINAL, rope_scaling=scaling)
    attention = AttentionConfig(gate_rank=4, window_size=8, softmax_layers=(1,))
    graphdef, params = build(config, attention)
    prompts = [np.random.default_rng(7).integers(0, 40, length).tolist() for length in LENGTHS]
    padded = np.zeros((len(prompts), max(LENGTHS)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    whole = forward(params, padded, graphdef=graphdef, lengths=jnp.array(LENGTHS))
    cache, logits = empty_cache(params, graphdef=graphdef, batch=len(prompts), length=64)
    _, logits = read_prompts(graphdef, params, cache, logits, prompts, chunk=16)
    np.testing.assert_allclose(logits, whole[np.arange(len(prompts)), np.array(LENGTHS) - 1], atol=1e-4)
