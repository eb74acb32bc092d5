"""Generation equals a plain loop that recomputes the whole prefix for every token."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lawcat_jax.errors import UserError
from lawcat_jax.inference import generation
from lawcat_jax.inference import session as session_module
from lawcat_jax.inference.sampling import Sampling
from lawcat_jax.inference.session import Session
from lawcat_jax.tasks import decoder_model
from tests.models.helpers import LAWCAT, TINY, build, forward

CONFIG = dataclasses.replace(TINY, num_layers=2)
HYBRID = dataclasses.replace(LAWCAT, softmax_layers=(1,))
NEW = 5


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, HYBRID)


def naive(graphdef, params, prompt, as_teacher=False):
    """Greedy continuation; one padded shape, so that it compiles once."""
    row = list(prompt)
    for _ in range(NEW):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(row)] = row
        logits = forward(params, padded, graphdef=graphdef, as_teacher=as_teacher)
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    return row[len(prompt) :]


def prompts():
    generator = np.random.default_rng(5)
    return [generator.integers(0, CONFIG.vocab_size, length).tolist() for length in (21, 1, 33, 18, 40)]


@pytest.mark.parametrize("as_teacher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_batches_equal_full_recomputation(model, as_teacher):
    graphdef, params = model
    options = dict(max_new_tokens=NEW, as_teacher=as_teacher)
    expected = [naive(graphdef, params, prompt, as_teacher) for prompt in prompts()]
    got = generation.generate(graphdef, params, prompts(), **options, batch_size=2, prefill_chunk=16)
    assert got == expected
    if not as_teacher:
        streamed = Session(graphdef, params, prefill_chunk=16).stream(prompts()[2], max_new_tokens=NEW)
        assert list(streamed) == expected[2]


def test_stops_at_the_end_token_and_compiles_once(model):
    graphdef, params = model
    full = [naive(graphdef, params, prompt) for prompt in prompts()]
    eos = full[0][2]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    options = dict(max_new_tokens=NEW, eos_ids=(eos,), batch_size=2, prefill_chunk=16)
    assert generation.generate(graphdef, params, prompts(), **options) == cut
    compiled = generation.prefill_chunk._cache_size(), generation._decode_loop._cache_size()
    shorter = [prompt[:length] for prompt, length in zip(prompts(), (20, 1, 30, 17, 38), strict=True)]
    generation.generate(graphdef, params, shorter, **options)
    assert (generation.prefill_chunk._cache_size(), generation._decode_loop._cache_size()) == compiled


def test_prompts_are_read_in_whole_chunks_while_all_go_on():
    plan = generation.prefill_plan
    assert plan(300, 300, 1024) == [(0, 512)]
    assert plan(900, 1020, 1024) == [(0, 1024)]
    assert plan(2100, 2300, 1024) == [(0, 1024), (1024, 1024), (2048, 1024)]
    long = plan(20_000, 20_100, 8192)
    assert [size for _, size in long] == [8192, 8192, 1024, 1024, 1024, 1024]
    assert plan(64, 64, 16) == [(0, 16), (16, 16), (32, 16), (48, 16)]
    for shortest, longest, chunk in ((1, 1, 16), (5, 3000, 4096), (8192, 8192, 8192), (1024, 1025, 2048)):
        found = plan(shortest, longest, chunk)
        ends = [start + size for start, size in found]
        assert [start for start, _ in found] == [0, *ends[:-1]]  # no gap
        assert ends[-1] >= longest > found[-1][0]
    assert generation.default_chunk(1) == 8192
    assert generation.default_chunk(10) == 1024
    assert generation.default_chunk(5) == 2048


@pytest.mark.parametrize("as_teacher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_session_goes_on_as_if_everything_was_read_again(model, as_teacher):
    """Three turns, the second left off in the middle; buffers of softmax layers grow on the way."""
    graphdef, params = model
    sampling = Sampling(0.9, top_p=0.9, repetition_penalty=1.3)
    session = Session(graphdef, params, as_teacher=as_teacher, prefill_chunk=16)
    read, sizes = [], []
    for number, turn in enumerate(prompts()[:3]):
        before = len(session.tokens)
        made = session.stream(turn, max_new_tokens=NEW, sampling=sampling if number < 2 else Sampling())
        answer = list(itertools.islice(made, NEW - 2 * (number == 1)))
        assert session.tokens[before:] == [*turn, *answer]
        read.append([*session.tokens[: before + len(turn)]])
        sizes.append(session.nbytes)
    options = dict(max_new_tokens=NEW, as_teacher=as_teacher, batch_size=1, prefill_chunk=16)
    assert [answer] == generation.generate(graphdef, params, [read[2]], **options)
    (first,) = generation.generate(graphdef, params, [read[0]], sampling=sampling, **options)
    assert read[1][: len(read[0]) + NEW] == read[0] + first
    assert sizes[0] < sizes[2]  # of the hybrid's softmax layer too
    consumed = []
    read_prompts = session_module.read_prompts
    session_module.read_prompts = lambda **given: consumed.append(given["prompts"]) or read_prompts(**given)
    try:
        list(session.stream([3, 4], max_new_tokens=1))
    finally:
        session_module.read_prompts = read_prompts
    assert consumed == [[[answer[-1], 3, 4]]]  # nothing that was read before


@pytest.mark.slow
def test_answers_end_soon_after_a_stop(model):
    graphdef, params = model
    options = dict(max_new_tokens=80, batch_size=2, prefill_chunk=16)
    whole = generation.generate(graphdef, params, prompts(), **options)
    word = whole[0][3]
    asked = []

    def stop(number, tokens):
        assert list(tokens) == whole[number][: len(tokens)]
        asked.append(len(tokens))
        return word in tokens

    for full, cut in zip(whole, generation.generate(graphdef, params, prompts(), stop=stop, **options), strict=True):
        end = full.index(word) if word in full else 80
        assert cut == full[: min(80, -(-(end + 1) // generation.STOP_EVERY) * generation.STOP_EVERY)]
    assert set(asked) <= {32, 64, 80}


def test_sampling_depends_on_seed_and_prompt_only(model):
    graphdef, params = model
    options = dict(max_new_tokens=NEW, batch_size=2, prefill_chunk=16)
    one, two = (Sampling(1.5, top_k=20, repetition_penalty=1.2, seed=seed) for seed in (1, 2))
    first = generation.generate(graphdef, params, prompts(), sampling=one, **options)
    assert first == generation.generate(graphdef, params, prompts(), sampling=one, **options)
    assert first != generation.generate(graphdef, params, prompts(), sampling=two, **options)
    assert first[:2] == generation.generate(graphdef, params, prompts()[:2], sampling=one, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[40]]}, "vocabulary of 40"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [[1]], "batch_size": 0}, "batch_size"),
        ({"prompts": [[1]], "sampling": Sampling(float("nan"))}, "temperature: nan"),
        ({"prompts": [[1]], "sampling": Sampling(seed=2**70)}, "seed"),
    ],
)
def test_bad_requests_are_refused(model, arguments, message):
    with pytest.raises(UserError, match=message):
        generation.generate(*model, **{"max_new_tokens": NEW, **arguments})


@pytest.mark.parametrize(
    ("path", "index", "message"),
    [
        (
            ("layers", "mlp", "down_proj"),
            1,
            r"output of layer 1 .*softmax attention.*layers/mlp/down_proj/kernel\[1\] hold",
        ),
        (
            ("layers", "attention", "o_proj"),
            0,
            r"output of layer 0 .*linear attention.*layers/attention/o_proj/kernel\[0\]",
        ),
    ],
)
def test_logits_that_are_not_finite_name_the_first_such_layer(model, path, index, message):
    graphdef, params = model
    broken = jax.tree.map(np.array, params)
    leaf = broken[path[0]][path[1]][path[2]]["kernel"]
    leaf[index, 2, 3] = np.nan
    options = dict(max_new_tokens=NEW, prefill_chunk=16)
    with pytest.raises(UserError, match=message):
        generation.generate(graphdef, broken, prompts(), batch_size=2, **options)
    with pytest.raises(UserError, match=message):
        list(Session(graphdef, broken, prefill_chunk=16).stream(prompts()[2], max_new_tokens=NEW))
    nll = decoder_model.model_nll(graphdef, broken, as_teacher=False)
    tokens = np.asarray([prompts()[2][:16]] * 2, np.int32)
    batch = {"tokens": tokens, "targets": tokens, "loss_weights": np.ones((2, 16), np.float32)}
    with pytest.raises(UserError, match=message):
        nll(batch | {"lengths": np.asarray([0, 16], np.int32)})


@pytest.mark.slow
def test_a_value_that_overflows_names_its_layer(model):
    graphdef, params = model
    broken = jax.tree.map(np.array, params)
    broken["layers"]["mlp"]["up_proj"]["kernel"][1] = 1e38
    with pytest.raises(UserError, match=r"output of layer 1 .*all weights are finite"):
        generation.generate(graphdef, broken, prompts(), max_new_tokens=1, batch_size=2, prefill_chunk=16)
    broken = jax.tree.map(np.array, params)
    broken["embed"]["embedding"][7] = np.inf
    with pytest.raises(UserError, match=r"output of the embedding; the weights embed/embedding hold"):
        generation.generate(graphdef, broken, [[1, 7, 2]], max_new_tokens=1, batch_size=2, prefill_chunk=16)
