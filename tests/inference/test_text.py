"""Continued texts, conversations and batch files on a small random student with a chat template."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.checkpoints.model_dir import load_model, save_model
from lawcat_jax.data.tokenize import decode, decode_behind
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


def marked():
    """The byte-level tokenizer with a special token that is not its end."""
    tokenizer = copy.deepcopy(small.byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


TOKENIZERS = {
    "byte_level": marked,
    "metaspace": small.metaspace,
    "metaspace_first": small.metaspace_first,
    "prepending": small.prepending,
}


def drawn(tokenizer, draw, count):
    """Random tokens, one in eight of them special."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    known = [i for i in range(len(tokenizer)) if i not in special and "\ufffd" not in tokenizer.decode([i])]
    return [draw.choice([*special] if draw.random() < 1 / 8 else known) for _ in range(count)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_end_before_the_stop_strings_of_transformers(name):
    """In the text with special tokens, wherever the strings begin and end; shown is the text without."""
    torch = pytest.importorskip("torch")
    stopping = pytest.importorskip("transformers").StopStringCriteria
    tokenizer, draw = TOKENIZERS[name](), random.Random(1)
    prompt, stops = drawn(tokenizer, draw, 12), 0
    before, before_all = decode(tokenizer, prompt), tokenizer.decode(prompt)
    assert tokenizer.decode(prompt, skip_special_tokens=False) == before_all
    for _ in range(40):
        tokens = drawn(tokenizer, draw, 24)
        spelt = tokenizer.decode([*prompt, *tokens])[len(before_all) :]
        start = draw.randrange(2, len(spelt) - 3)
        stop = (spelt[start : start + draw.randrange(1, 7)], "q#~")
        answer = text.AnswerText(tokenizer, prompt, stop)
        pieces = [piece for token in tokens if (piece := answer.push(token))]
        pieces.append(answer.finish())
        assert "".join(pieces) == answer.text
        plain = decode(tokenizer, [*prompt, *tokens])[len(before) :]
        assert plain.startswith(answer.text)
        criteria = stopping(tokenizer, list(stop))
        ends = [k for k in range(1, 25) if criteria(torch.tensor([tokens[:k]]), None).item()]
        assert answer.stopped
        assert answer.made == ends[0]
        stops += ends[0] < 24
        made = tokenizer.decode([*prompt, *tokens[: ends[0]]])[len(before_all) :]
        hidden = made[: made.index(stop[0])]
        for mark in tokenizer.all_special_tokens:
            hidden = hidden.replace(mark, "")
        assert answer.text == hidden or (hidden.startswith(answer.text) and "<" in hidden[len(answer.text) :])
        assert text.AnswerText(tokenizer, prompt, stop).extend(tokens)
        free = text.AnswerText(tokenizer, prompt, ("q#~",))
        assert "".join([*map(free.push, tokens), free.finish()]) == plain == decode_behind(tokenizer, tokens, prompt)
    assert stops > 20


@pytest.mark.parametrize(
    ("stop", "shown", "made"),
    [
        (("<|im_end|>",), "the cat", 2),
        (("cat<|im_",), "the ", 2),
        (("<|im_end|> sat",), "the cat", 3),
        ((" sat",), "the cat", 3),
        (("cat", "the cat"), "the ", 1),
        (("nowhere",), "the cat sat on", 4),
    ],
)
def test_stop_strings_with_special_tokens_in_them(stop, shown, made):
    tokenizer = small.metaspace_first()
    ids = tokenizer.convert_tokens_to_ids(["▁cat", "<|im_end|>", "▁sat", "▁on"])
    answer = text.AnswerText(tokenizer, tokenizer.encode("the", add_special_tokens=False), stop)
    pieces = [*map(answer.push, ids), answer.finish()]
    shown = shown.removeprefix("the")
    if stop == ("cat", "the cat"):  # a stop string begins in the answer
        shown = " "
    assert "".join(pieces) == answer.text == shown
    assert (answer.made, answer.stopped) == (made, stop != ("nowhere",))


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
    model = dataclasses.replace(model, tokenizer=tokenizer_with(TEMPLATE, small.characters()))
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
    assert [m["content"] for m in talk.messages if m["role"] == "assistant"] == said[:2]
    talk.messages.append({"role": "assistant", "content": said[2]})
    assert (
        decode(model.tokenizer, session.tokens)
        == text.chat_text(model.tokenizer, talk.messages)[: -len("END\nassistant: ")]
    )
    assert read[1] < read[0]  # the system prompt and the first turn are in the state


CHATS = {
    "byte_level": marked,
    "characters": small.characters,
    "metaspace": small.metaspace,
    "metaspace_first": small.metaspace_first,
    "prepending": small.prepending,
}


@pytest.mark.parametrize("name", CHATS)
def test_answers_follow_the_tokens_of_the_whole_conversation(model, name):
    """Those that transformers gives, whatever was read before; messages are what was shown."""
    end = "</s>" if name != "byte_level" else "<|im_end|>"
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + end + "{% endfor %}[assistant]"
    tokenizer = tokenizer_with(template, CHATS[name]())
    model = dataclasses.replace(model, tokenizer=tokenizer)
    for stop in ((), ("e",), (" ", "s")):
        talk, shown, kept = text.Conversation(model, text.Request(5, stop=stop)), [], 0
        for question in ("the cat", "sat", "on a mat"):
            before = [] if talk._answer is None else list(talk._session.tokens)
            answer = talk.ask(question)
            asked = tokenizer.apply_chat_template(
                talk.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            if name == "byte_level":  # it begins texts with bos, which the template does not
                asked = [tokenizer.bos_token_id, *asked]
            kept += bool(before) and asked[: len(before)] == before
            assert answer.read == len(asked) - (len(before) if asked[: len(before)] == before else 0)
            shown.append("".join(answer))
            assert answer._session.tokens[: len(asked)] == asked
            assert answer._session.tokens[len(asked) :] == continued(model, asked, 5)[: answer.made]
        assert talk.reread == 2 - kept
        assert [m["content"] for m in talk.messages if m["role"] == "assistant"] == shown[:2]
        assert not any(word in answer for word in stop for answer in shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metaspace_first", "prepending"])
def test_rows_and_single_prompts_have_the_same_answers_with_their_first_space(model, name, tmp_path):
    model = dataclasses.replace(model, tokenizer=CHATS[name](), eos_ids=())
    prompts = [" ".join(("the", "cat", "sat", "on", "a", "mat")[: 1 + i % 6]) + "bcd"[i % 3] for i in range(18)]
    for stop in ((), (" ", "<|im_end|>")):
        request, file, compared = text.Request(6, stop=stop), tmp_path / f"{len(stop)}.jsonl", 0
        asked = [{"prompt": prompt} for prompt in prompts]
        batch.answer_file(model, [batch.Row(json.dumps(row), row) for row in asked], file, request)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            prompt = text.prompt_tokens(model, row["prompt"])
            whole = continued(model, prompt, 6)
            both = decode(model.tokenizer, [*prompt, *whole])[len(row["prompt"]) :]
            assert row["answer"] == "".join(text.continue_text(model, row["prompt"], request))
            if "\ufffd" in both or any(mark in model.tokenizer.all_special_ids for mark in whole):
                continue
            compared += both.startswith(" ")
            assert row["answer"] == (both.split(" ")[0] if stop else both)
            assert (row["finish"] == "stop") == (bool(stop) and " " in both)
        assert compared


def test_a_line_goes_on_behind_what_was_made(model):
    model = dataclasses.replace(model, tokenizer=small.metaspace_first())
    session = text.new_session(model, text.PLAIN)
    list(text.continue_text(model, "the c", text.Request(1), session=session))
    before = decode(model.tokenizer, session.tokens)
    answer = text.continue_text(model, "at", text.Request(1), session=session)
    assert decode(model.tokenizer, session.tokens) == before + "at"
    assert answer.read == 1


def test_an_end_token_is_the_end_mark_of_the_template(model):
    model = dataclasses.replace(model, tokenizer=tokenizer_with(TEMPLATE, small.characters()))
    prompt = text.prompt_tokens(model, text.chat_text(model.tokenizer, [{"role": "user", "content": "The sky?"}]))
    tokens = continued(model, prompt, 6)
    end = tokens[3]
    first = tokens.index(end)
    mark = model.tokenizer.decode([end])
    tokenizer = tokenizer_with(TEMPLATE.replace("END", "{{ 'END' if m['role'] == 'user' else '' }}"), model.tokenizer)
    ending = dataclasses.replace(model, eos_ids=(end,), tokenizer=tokenizer)
    talk = text.Conversation(ending, text.Request(max_new_tokens=9))
    assert "".join(talk.ask("The sky?")) == decode(tokenizer, tokens[: first + 1])
    assert decode(tokenizer, tokens[: first + 1]).endswith(mark)  # it is no special token here, so it is in the text
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
    assert [{k: row[k] for k in ("prompt", "id", "messages") if k in row} for row in written] == [
        row.fields for row in rows
    ]
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

    monkeypatch.setattr(batch.json, "dumps", fails)
    with pytest.raises(RuntimeError):
        batch.answer_file(model, rows, tmp_path / "half.jsonl", request, batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "in.jsonl"
    for row in ('{"prompt": "a", "prompt": "b"}', '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'):
        path.write_text('{"prompt": "a"}\n' + row)
        with pytest.raises(UserError, match=r"line 2: not valid JSON .*stands twice in an object"):
            batch.read_rows(path)


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
    (row,) = batch.read_rows(path)
    assert row.fields == {"prompt": "a", "id": 7, "stop": None}


def test_rows_are_written_back_as_they_were(model, tmp_path):
    """Numbers that no float holds, long ones, half a character, escapes and spaces: the text of each row is the same."""
    long = "9" * 5000
    extra = (
        '"a": 1e400, "b": 1e-400, "c": 0.1234567890123456789012345, "d": ' + long,
        r'"half": "\ud83d", "\udc00": ["\ud83d", "\/", "\u00e9é"]',
        '"e":-0.0 ,"f":1.50E+07,  "g": {"h": 18446744073709551617}  ',
    )
    lines = [f'{{"prompt": "The sky", {part}}}' for part in extra]
    (tmp_path / "in.jsonl").write_bytes("\r\n".join([*lines, '  {"prompt": "a",\r"id": 1} ']).encode())
    batch.answer_file(model, batch.read_rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", text.Request(3))
    written = (tmp_path / "out.jsonl").read_bytes().decode().split("\n")
    assert written.pop() == ""
    for line, before in zip(written, [*lines, '{"prompt": "a", "id": 1}'], strict=True):
        assert line.startswith(before.removesuffix("}").rstrip() + ', "answer": ')
        assert "\r" not in line
        row = json.loads(line, parse_int=str)
        assert list(row)[-3:] == ["answer", "tokens", "finish"]
        assert (row["tokens"], row["finish"]) == ("3", "length")
        assert row["answer"] == "".join(text.continue_text(model, row["prompt"], text.Request(3)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "x": NaN}', "not valid JSON .NaN is no number of JSON"),
        ('{"prompt": "a", "x": [-Infinity]}', "not valid JSON .-Infinity is no number of JSON"),
        ('{"prompt": 12}', "expected an object with either prompt"),
        ('{"messages": []}', "expected an object with either prompt"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "the last message is the assistant's",
        ),
        (r'{"prompt": "a\ud83d"}', r"half a character \('\\ud83d'\) in what is asked"),
        (r'{"messages": [{"role": "user", "content": "\udc00"}]}', r"half a character \('\\udc00'\)"),
        (r'{"messages": [{"role": "\ud83d", "content": "a"}]}', r"half a character \('\\ud83d'\)"),
    ],
)
def test_rows_that_are_no_json_or_no_text_are_refused(tmp_path, row, message):
    path = tmp_path / "in.jsonl"
    path.write_text(r'{"prompt": "\ud83d\ude00"}' + "\n" + row)
    with pytest.raises(UserError, match=f"in.jsonl, line 2: {message}"):
        batch.read_rows(path)


def test_a_file_that_cannot_be_written_is_refused_before_answers_are_made(model, tmp_path, monkeypatch):
    def too_late(*_, **__):
        raise AssertionError("answers were made")

    monkeypatch.setattr(batch, "generate", too_late)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        batch.answer_file(model, [batch.Row('{"prompt": "a"}', {"prompt": "a"})], tmp_path / "file" / "out.jsonl")


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
