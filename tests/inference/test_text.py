"""Continued texts, conversations and batch files on a small random student with a chat template."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.data.tokenize import decode
from lawcat_jax.errors import UserError
from lawcat_jax.inference import batch, text
from lawcat_jax.inference.generation import generate
from lawcat_jax.inference.loading import load_for_inference
from lawcat_jax.inference.sampling import Sampling
from tests.checkpoints import students
from tests.data import tokenizers as small

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}END\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")


def tokenizer_with(template, tokenizer=None):
    """A copy, because tokenizers are shared."""
    tokenizer = copy.deepcopy(tokenizer or small.byte_level())
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The model directory of a recurrent student that never ends by itself."""
    folder = tmp_path_factory.mktemp("student")
    config = dataclasses.replace(
        students.MODEL, vocab_size=421, num_layers=1, max_position_embeddings=96, eos_token_ids=(420,)
    )
    bundle = load_model(students.write_student(folder / "bare", model=config), dtype="float32")
    tokenizer_with(TEMPLATE).save_pretrained(folder / "tokenizer")
    save_model(
        folder / "student",
        model=bundle.model,
        attention=bundle.attention,
        lora=bundle.lora,
        params=bundle.params,
        tokenizer_source=folder / "tokenizer",
    )
    return folder / "student"


@pytest.fixture(scope="module")
def model(source):
    return load_for_inference(str(source), dtype="float32")


def continued(model, tokens, count, **options):
    (answer,) = generate(model.graphdef, model.params, [tokens], max_new_tokens=count, batch_size=1, **options)
    return answer


def test_text_before_a_stop_string_whatever_the_pieces():
    draw = random.Random(0)
    for _ in range(300):
        whole = "".join(draw.choice("abc") for _ in range(30))
        stop = tuple("".join(draw.choice("abc") for _ in range(draw.randrange(1, 5))) for _ in range(2))
        cuts = [0, *sorted(draw.sample(range(31), 6)), 30]
        pieces = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        ends = [match.start() for word in stop if (match := re.search(word, whole))]
        shown = list(text.before_stop(iter(pieces), stop))
        assert "".join(shown) == text.cut(whole, stop) == whole[: min(ends, default=30)]
        assert all(shown)


def test_the_default_length_is_what_the_model_has_room_for(model):
    prompt = "The sky is blue. " * 8
    count = len(text.prompt_tokens(model, prompt))
    assert 96 - text.NEW_TOKENS < count < 96
    teacher = text.Request(teacher=True)
    assert teacher.new_tokens(model, count) == 96 - count
    assert text.Request().new_tokens(model, 10_000) == text.NEW_TOKENS
    with pytest.raises(UserError, match=f"up to {count} \\+ {97 - count} tokens.*trained for 96 positions"):
        text.continue_text(model, prompt, text.Request(97 - count, teacher=True))
    with pytest.raises(UserError, match="trained for 96 positions"):
        teacher.new_tokens(model, 96)
    answer = text.continue_text(model, prompt, teacher)
    assert answer.made == 0  # nothing ran yet
    shown = "".join(answer)
    assert answer.text == shown
    assert (answer.read, answer.made) == (count, 96 - count)
    assert re.fullmatch(rf"{count} tokens read, {96 - count} made, [\d.]+ tokens/s, state [\d.]+ KB", answer.summary())


def test_a_conversation_is_not_read_again_and_goes_on_as_if_it_was(model):
    request = text.Request(max_new_tokens=9)
    talk = text.Conversation(model, request, system="Be brief.")
    said, read = [], []
    for question in ("The sky?", "And the grass?", "Here we go."):
        answer = talk.ask(question)
        session = answer._session
        given = list(session.tokens)
        said.append("".join(answer))
        assert session.tokens[len(given) :] == continued(model, given, 9)  # from all of it, read at once
        read.append(answer.read)
    assert talk.reread == 0
    talk._finish()
    assert [m["content"] for m in talk.messages if m["role"] == "assistant"] == said
    assert (
        decode(model.tokenizer, session.tokens)
        == text.chat_text(model.tokenizer, talk.messages)[: -len("END\nassistant: ")]
    )
    assert read[1] < read[0]  # the system prompt and the first turn are in the state


def test_an_end_token_is_the_end_mark_of_the_template(model):
    prompt = text.prompt_tokens(model, text.chat_text(model.tokenizer, [{"role": "user", "content": "The sky?"}]))
    tokens = continued(model, prompt, 6)
    end = tokens[3]
    first = tokens.index(end)
    mark = model.tokenizer.decode([end])
    ends = "{{ 'END' if m['role'] == 'user' else '" + mark + "' }}"
    tokenizer = tokenizer_with(TEMPLATE.replace("END", ends), model.tokenizer)
    ending = dataclasses.replace(model, eos_ids=(end,), tokenizer=tokenizer)
    talk = text.Conversation(ending, text.Request(max_new_tokens=9))
    assert "".join(talk.ask("The sky?")) == decode(tokenizer, tokens[: first + 1])
    answer = talk.ask("More")
    next(answer)
    assert talk.reread == 0
    assert decode(tokenizer, answer._session.tokens[len(prompt) + first + 1 :]).startswith(
        "\nuser: MoreEND\nassistant: "
    )


def test_a_template_that_rewrites_earlier_turns_is_read_again(model):
    tokenizer = tokenizer_with(REWRITES, model.tokenizer)
    talk = text.Conversation(dataclasses.replace(model, tokenizer=tokenizer), text.Request(max_new_tokens=5))
    list(talk.ask("The sky?"))
    answer = talk.ask("And the grass?")
    shown = "".join(answer)
    assert talk.reread == 1
    rendered = text.chat_text(tokenizer, talk.messages)
    assert rendered == "user: ...END\nassistant: ...END\nuser: And the grass?END\nassistant: "
    tokens = text.prompt_tokens(model, rendered)
    assert shown == decode(tokenizer, [*tokens, *continued(model, tokens, 5)])[len(decode(tokenizer, tokens)) :]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="refuses this conversation: no"):
        talk.ask("?")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        talk.ask("?")


def test_rows_of_a_file_are_answered_as_they_are_alone(model, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "The sky", "id": 7}\n\n{"messages": [{"role": "user", "content": "Hé"}]}\n{"prompt": "Here we go again"}\n'
    )
    rows = batch.read_rows(tmp_path / "in.jsonl")
    free = "".join(text.continue_text(model, "The sky", text.Request(40)))
    request = text.Request(40, Sampling(repetition_penalty=1.1), stop=(free[5:7],))
    made = batch.answer_file(model, rows, tmp_path / "out.jsonl", request, system="S", batch_size=2)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: row[k] for k in ("prompt", "id", "messages") if k in row} for row in written] == rows
    assert sum(row["tokens"] for row in written) == made
    prompts = ["The sky", "system: SEND\nuser: HéEND\nassistant: ", "Here we go again"]
    for row, prompt in zip(written, prompts, strict=True):
        assert row["answer"] == "".join(text.continue_text(model, prompt, request))
        whole = "".join(text.continue_text(model, prompt, dataclasses.replace(request, stop=())))
        assert row["finish"] == ("stop" if request.stop[0] in whole else "length")
        shorter = (dataclasses.replace(request, max_new_tokens=count, stop=()) for count in range(1, 41))
        texts = ["".join(text.continue_text(model, prompt, one)) for one in shorter]
        assert row["tokens"] == next((count for count, x in enumerate(texts, 1) if request.stop[0] in x), 40)
    assert {"stop", "length"} >= {row["finish"] for row in written} >= {"stop"}
    assert min(row["tokens"] for row in written) < 10  # fewer than are made before the text is looked at

    def fails(*_, **__):
        raise RuntimeError("full")

    monkeypatch.setattr(batch, "cut", fails)
    with pytest.raises(RuntimeError):
        batch.answer_file(model, rows, tmp_path / "half.jsonl", request, batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "max_new_tokens": 3}, "line 1: field 'max_new_tokens' would have no effect"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "field 'tools' would have no effect"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "a message has 'tool_calls'"),
    ],
)
def test_fields_of_rows_that_would_do_nothing_are_refused(tmp_path, row, message):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        batch.read_rows(path)
    path.write_text(json.dumps({"prompt": "a", "id": 7, "stop": None}))
    assert batch.read_rows(path) == [{"prompt": "a", "id": 7, "stop": None}]


def test_rows_that_have_an_answer_already_are_refused(tmp_path):
    file = tmp_path / "in.jsonl"
    for name, value in (("answer", "blue"), ("tokens", 3), ("finish", None)):
        file.write_text('{"prompt": "first"}\n' + json.dumps({"prompt": "The sky", "id": 7, name: value}))
        with pytest.raises(UserError, match=f"in.jsonl, line 2: has {name} already, .* rename or remove it"):
            batch.read_rows(file)


@pytest.mark.slow
def test_the_command_keeps_text_apart_from_what_is_told(model, source, tmp_path):
    def run(*arguments, stdin="", status=0):
        done = subprocess.run(
            [sys.executable, "-m", "lawcat_jax.generate", f"--checkpoint={source}", "--dtype=float32", *arguments],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == status, done.stderr
        return done.stdout, done.stderr

    out, err = run("--prompt=The sky", "--max_new_tokens=6")
    assert out == "The sky" + "".join(text.continue_text(model, "The sky", text.Request(6))) + "\n"
    note, summary = err.splitlines()
    assert note.startswith("this model has a chat template: --chat")
    assert re.match(r"\d+ tokens read, 6 made", summary)
    assert "chat template" not in run("--prompt=The sky", "--max_new_tokens=6", "--nochat")[1]
    talk = text.Conversation(model, text.Request(6), system="S")
    spoken = ["".join(talk.ask("The sky?")), "".join(talk.ask("So?"))]
    out, err = run("--interactive", "--system=S", "--max_new_tokens=6", stdin="The sky?\n\nSo?\n")
    assert out == "".join(f"{answer}\n" for answer in spoken)
    assert len(err.splitlines()) == 2
    (tmp_path / "in.jsonl").write_text('{"prompt": "The sky?"}\n')
    out, err = run("--input=in.jsonl", "--output=out.jsonl", "--chat", "--system=S", "--max_new_tokens=6")
    assert out == ""
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == spoken[0]
    out, err = run("--input=in.jsonl", "--output=out.jsonl", status=2)
    assert "is there already" in err
    out, err = run("--teacher", "--prompt=The sky", "--max_new_tokens=96", status=2)
    assert out == ""  # no echo before the checks
    assert "trained for 96 positions" in err
