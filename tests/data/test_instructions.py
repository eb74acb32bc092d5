"""Instruction data: what rows may hold, what of it counts in the loss, and one line for everything else."""

from __future__ import annotations

import copy
import datetime
import json

import numpy as np
import pytest

from lawcat_jax.config import Config, ConfigError, DataConfig, StageConfig
from lawcat_jax.data import conversations, instructions
from lawcat_jax.data.conversations import Turn, read_row
from lawcat_jax.data.pipeline import Samples
from lawcat_jax.data.tokenize import decode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small

CHATML = (
    "{% for m in messages %}{{'<|' + m['role'] + '|>' + m['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|assistant|>'}}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}" + CHATML
PAIR = {"instruction": "Add.", "input": "1 2", "output": "3"}
USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def templated(template: str = CHATML):
    tokenizer = copy.copy(small.byte_level_merged_digits())
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer, row, **options):
    return instructions.encode_conversation(tokenizer, read_row(row), **options)


def counted(row, template: str = CHATML) -> str:
    """The text of the tokens that count."""
    tokenizer = templated(template)
    found = encoded(tokenizer, row)
    return decode(tokenizer, found.tokens[found.weights > 0])


def write(path, *rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_chat_template_marks_every_answer():
    turns = [
        ("system", "Be short."),
        ("human", "What now?"),
        ("gpt", "Sleep."),
        ("human", "And then?"),
        ("gpt", "Wake up."),
        ("human", "Not answered"),
    ]
    row = {"conversations": [{"from": speaker, "value": said} for speaker, said in turns]}
    tokenizer = templated()
    tokens, answers, weights = encoded(tokenizer, row)
    assert decode(tokenizer, tokens) == (
        "<|system|>Be short.<|end|>\n<|user|>What now?<|end|>\n<|assistant|>Sleep.<|end|>\n"
        "<|user|>And then?<|end|>\n<|assistant|>Wake up.<|end|>\n"
    )
    assert tokens[0] == tokenizer.bos_token_id
    assert decode(tokenizer, tokens[answers]) == "Sleep.<|end|>Wake up.<|end|>"
    assert np.array_equal(weights, answers.astype(np.float32))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template.*instruction data row"):
        encoded(tokenizer, row)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encoded(templated("{{ messages|length }}" + CHATML), row)


def test_alpaca_prompt_without_a_template():
    tokenizer = small.byte_level()
    tokens, answers, _ = encoded(tokenizer, PAIR)
    assert decode(tokenizer, tokens) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    assert tokens[answers].tolist() == [*tokenizer.encode("3", add_special_tokens=False), tokenizer.eos_token_id]
    for more in ({"system": "Be short."}, {"history": [["Hm?", "Yes."]]}):
        with pytest.raises(UserError, match="rows with a system or history, need one"):
            encoded(tokenizer, PAIR | more)


@pytest.mark.parametrize("said", ["smile 😀", "é", "日本語", "a😀b", "😀 smile"])
def test_all_tokens_of_an_answers_characters_count(said):
    """A character that the vocabulary lacks is several tokens, which share its place in the text."""
    tokenizer = small.byte_level()
    alone = encoded(tokenizer, {"instruction": "Say", "output": said})
    assert decode(tokenizer, alone.tokens[alone.answers]) == said
    plain = (
        "{% for m in messages %}{{m['role'] + ': ' + m['content'] + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'assistant: '}}{% endif %}"
    )
    chat = templated(plain)
    row = [USER, ANSWER | {"content": said}, USER, ANSWER | {"content": said + "!"}]
    found = encoded(chat, {"messages": row})
    text = decode(chat, found.tokens[found.answers])  # the space in front may be of the first word's token
    assert text.replace(" ", "") == (said + said + "!").replace(" ", "")


def test_weights_of_messages_and_rows():
    first, second = ({"role": "assistant", "content": text} for text in ("One.", "Two."))
    for off in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}):
        assert counted({"messages": [USER, first | off, USER, second]}) == "Two.<|end|>"
        assert counted({"messages": [USER, first, USER, second | off]}) == "One.<|end|>"
    for on in ({"weight": 1}, {"weight": None}, {"train": True}):
        assert counted({"messages": [USER | {"weight": 0}, first | on]}) == "One.<|end|>"
    found = read_row({"messages": [USER, first | {"weight": 0.5}, USER, second], "weight": 3})
    assert [turn.weight for turn in found.turns] == [0.0, 1.5, 0.0, 3.0]


def test_weights_reach_the_loss(tmp_path):
    """Beside the configuration's own; an answer of weight 0 does not count where prompts do."""
    answers = [
        {"role": "assistant", "content": text, "weight": weight} for text, weight in (("One.", 0), ("Two.", 0.5))
    ]
    source = write(tmp_path / "a.jsonl", *[{"messages": [USER, answers[0], USER, answers[1]]}] * 11)
    data = DataConfig(kind="instruction", source=source, answer_weight=4.0, prompt_weight=0.25, validation_samples=1)
    tokenizer = templated()
    row = Samples(data, tokenizer, seq_length=120, seed=0, split="train")[0]
    by_weight = {w: decode(tokenizer, row["targets"][row["loss_weights"] == w]) for w in (0.0, 0.25, 2.0)}
    assert by_weight[0.0].startswith("One.<|end|>")
    assert "Why?" in by_weight[0.25]
    assert by_weight[2.0] == "Two.<|end|>"


def test_system_and_history_of_alpaca_rows():
    row = PAIR | {"system": "Be short.", "history": [["Hm?", "Yes."], ["So?", "No."]]}
    assert read_row(row).turns == (
        Turn("system", "Be short.", 0.0),
        Turn("user", "Hm?", 0.0),
        Turn("assistant", "Yes.", 1.0),
        Turn("user", "So?", 0.0),
        Turn("assistant", "No.", 1.0),
        Turn("user", "Add.\n\n1 2", 0.0),
        Turn("assistant", "3", 1.0),
    )
    chat = {"messages": [USER, ANSWER]}
    assert read_row(chat | {"system_prompt": "Be short."}).turns[0] == Turn("system", "Be short.", 0.0)
    twice = {"messages": [{"role": "system", "content": "Be short."}, USER, ANSWER], "system": "Be short."}
    assert [turn.role for turn in read_row(twice).turns] == ["system", "user", "assistant"]


def test_what_says_nothing_is_ignored():
    plain = read_row(PAIR)
    notes = {"id": 7, "source": "web", "Category": "maths", "metadata": {"chosen": 1}, "tools": "[]", "images": None}
    assert read_row(PAIR | notes | {"system": "", "history": [], "weight": None, "train_on_inputs": False}) == plain
    assert read_row(PAIR | {"text": "Do this: Add.\nInput: 1 2\nResponse: 3", "prompt": "Add.\n\n1 2"}) == plain
    assert read_row(PAIR | {"odd": 3}, notes=("odd",)) == plain
    parts = {"role": "user", "content": [{"type": "text", "text": "Wh", "image": None}, {"type": "text", "text": "y?"}]}
    chat = {"messages": [USER, ANSWER]}
    assert read_row({"messages": [parts, ANSWER | {"tool_calls": None, "id": 3}], "prompt": "Why?"}) == read_row(chat)
    assert read_row({"messages": [{"role": "developer", "content": "a"}, USER, ANSWER]}).turns[0].role == "system"


REFUSED = [
    ({"text": "a"}, "expected instruction and output, or messages.*it has text"),
    ({}, "it has nothing"),
    ({"instruction": "a", "context": "b", "response": "c"}, "expected instruction and output.*it has instruction, context"),
    ({"messages": [USER]}, "it has no answer"),
    ({"messages": [{"role": "user"}, 3]}, "message 1: a message needs role and content"),
    ({"messages": [USER, 3]}, "message 2 is 3 .*needs role and content"),
    ({"messages": [USER, ANSWER | {"content": None}]}, "message 2: a message needs role and content"),
    ({"messages": "[]x"}, r"field 'messages' holds \"\[\]x\" \(of type str\), not a list"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "message 2: field 'tool_calls': calls of tools are not"),
    ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "calls of tools"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "field 'tools': calls of tools"),
    ({"messages": [USER, ANSWER], "functions": '[{"name": "f"}]'}, "field 'functions': calls of tools"),
    ({"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]}, "message 2: role 'tool' is not supported"),
    ({"messages": [USER, ANSWER | {"role": "narrator"}]}, "role 'narrator' is not supported"),
    ({"messages": [USER | {"name": "Ann"}, ANSWER]}, "message 1: field 'name' is not known"),
    ({"messages": [USER, ANSWER | {"loss_mask": [0, 1]}]}, "message 2: field 'loss_mask' is not known"),
    ({"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}, "field 'reasoning_content' is not known"),
    ({"messages": [USER, ANSWER | {"from": "human"}]}, "message 2: role and from differ"),
    ({"messages": [USER, ANSWER | {"value": "Not."}]}, "message 2: content and value differ"),
    ({"messages": [USER, ANSWER | {"content": 3}]}, r"message 2 holds 3 \(of type int\), not text"),
    ({"messages": [USER | {"content": [{"type": "image", "url": "x"}]}, ANSWER]}, "part that is no text .image"),
    ({"messages": [USER | {"content": ["Why?"]}, ANSWER]}, "of type list., not text"),
    ({"messages": [USER, ANSWER | {"weight": "1"}]}, "message 2: 'weight' is \"1\""),
    ({"messages": [USER, ANSWER | {"weight": -1}]}, "'weight' is -1"),
    ({"messages": [USER, ANSWER | {"weight": float("nan")}]}, "'weight' is NaN"),
    ({"messages": [USER, ANSWER | {"train": "no"}]}, "'train' is \"no\""),
    ({"messages": [USER | {"weight": 1}, ANSWER]}, "message 1: a user message has a weight of 1"),
    ({"messages": [USER | {"train": True}, ANSWER]}, "message 1: a user message has a weight"),
    ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "both 'conversations' and 'messages'"),
    ({"messages": [USER, ANSWER], **PAIR}, "both 'instruction' and 'messages'"),
    ({"messages": [USER, ANSWER], "output": "x"}, "both 'output' and 'messages'"),
    ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, "'history' goes with instruction and output"),
    ({"messages": [USER, ANSWER], "prompt": "What?"}, "field 'prompt' is no copy"),
    ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "'system' differs"),
    (PAIR | {"system": "a", "system_prompt": "b"}, "system and system_prompt differ"),
    (PAIR | {"system": 3}, r"field 'system' holds 3 \(of type int\)"),
    (PAIR | {"text": "Something else"}, "field 'text' is no copy"),
    (PAIR | {"instruction": 3}, r"field 'instruction' holds 3 \(of type int\), not text"),
    (PAIR | {"input": ["a"]}, r"field 'input' holds \[\"a\"\] \(of type list\), not text"),
    (PAIR | {"input": 0}, "field 'input' holds 0"),
    (PAIR | {"output": {"a": 1}}, "field 'output' holds .*of type dict"),
    (PAIR | {"output": None}, "field 'output' holds null, not text"),
    (PAIR | {"instruction": " ", "input": ""}, "field 'instruction' is empty"),
    (PAIR | {"history": ["a", "b"]}, "field 'history': entry 1 is \"a\""),
    (PAIR | {"history": [["a"]]}, "field 'history': entry 1"),
    (PAIR | {"train_on_inputs": True}, "'train_on_inputs' is true: set the stage's data.prompt_weight"),
    (PAIR | {"train_on_input": "yes"}, "'train_on_input' is \"yes\""),
    (PAIR | {"weight": True}, "'weight' is true"),
    (PAIR | {"weight": 10**400}, "'weight' is 1000.* not a number from 0 to 1e.09"),
    (PAIR | {"chosen": "3", "rejected": "4"}, "field 'chosen' is not known.*data.ignored_fields"),
    (PAIR | {"label": False}, "field 'label' is not known"),
    (PAIR | {"images": ["a.png"]}, "field 'images' is not known"),
    (PAIR | {"loss_mask": [1]}, "field 'loss_mask' is not known"),
    (PAIR | {"split": "test"}, "field 'split' is not known"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_understood_is_refused(number, tmp_path):
    """By file, row and field."""
    row, message = REFUSED[number]
    source = write(tmp_path / "x.jsonl", PAIR, row)
    with pytest.raises(UserError, match=rf"x\.jsonl', line 2: .*{message}"):
        list(conversations.conversations(source))


def test_files_that_hold_no_rows(tmp_path):
    (tmp_path / "x.jsonl").write_text("[1]")
    with pytest.raises(UserError, match="a list, not an object"):
        list(conversations.conversations(str(tmp_path / "x.jsonl")))
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=r"come from .jsonl or .parquet"):
        list(conversations.conversations(str(tmp_path / "x.txt")))


def test_rows_with_nothing_to_learn_are_counted(tmp_path, capsys):
    quiet = {"messages": [USER, ANSWER | {"weight": 0}]}
    source = write(tmp_path / "x.jsonl", PAIR, PAIR | {"output": " "}, quiet, PAIR | {"weight": 0}, PAIR)
    assert [found.where[-6:] for found in conversations.conversations(source)] == ["line 1", "line 5"]
    assert "3 rows passed over, with an empty answer or none of a weight above 0" in (said := capsys.readouterr().err)
    assert "x.jsonl', line 2)" in said
    data = DataConfig(kind="instruction", source=write(tmp_path / "y.jsonl", quiet), validation_samples=0)
    with pytest.raises(UserError, match="no rows with an answer to learn from"):
        Samples(data, templated(), seq_length=64, seed=0, split="train")


def test_conversations_that_are_cut_are_told(tmp_path, capsys):
    rows = [PAIR, PAIR | {"instruction": "Add. " * 400}, PAIR | {"output": "3 " * 400}]
    data = DataConfig(kind="instruction", source=write(tmp_path / "x.jsonl", *rows), validation_samples=0)
    said = Samples(data, templated(), seq_length=64, seed=0, split="train").described()
    cut = "3 conversations (2 of the first 3 are longer than 64 tokens and cut, 1 of them before any answer"
    assert cut in said
    assert cut in capsys.readouterr().err
    assert Samples(data, templated(), seq_length=4096, seed=0, split="train").described().startswith("3 conversations;")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation"])
def test_conversations_of_which_nothing_is_left_are_refused(tmp_path, split):
    """Their loss would be 0, as that of a perfect student."""
    long = [PAIR | {"instruction": f"Add. {number} " * 400} for number in range(3)]
    files = {"train": [PAIR] * 3, "validation": [PAIR] * 3} | {split: long}
    paths = {name: write(tmp_path / f"{name}.jsonl", *rows) for name, rows in files.items()}
    data = DataConfig(
        kind="instruction", source=paths["train"], validation_source=paths["validation"], validation_samples=3
    )
    with pytest.raises(UserError, match="seq_length 64 ends before the answer of each of the 3 conversations"):
        Samples(data, templated(), seq_length=64, seed=0, split=split)


def test_what_a_template_refuses_shows_at_the_start(tmp_path):
    """Of every order of speakers, not only of the first row's."""
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}" + CHATML
    source = write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]}, {"messages": [ANSWER, USER, ANSWER]})
    data = DataConfig(kind="instruction", source=source, validation_samples=0)
    with pytest.raises(UserError, match=r"its chat template refuses .*line 2: a user begins"):
        Samples(data, templated(strict), seq_length=64, seed=0, split="train")
    assert counted({"messages": [ANSWER, USER, ANSWER]}) == "Because.<|end|>Because.<|end|>"


def test_one_of_several_templates_is_the_default():
    tokenizer, row = templated(), {"messages": [USER, ANSWER]}
    expected = encoded(tokenizer, row).tokens.tolist()
    tokenizer.chat_template = {"default": CHATML, "rag": "{{ documents }}"}
    assert encoded(tokenizer, row).tokens.tolist() == expected
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match=r"its chat template cannot be used \(This model has multiple chat templates"):
        encoded(tokenizer, row)
    with pytest.raises(UserError, match=r"its chat template refuses row: Expected an expression"):
        encoded(templated("{% if %}"), row)


def test_a_template_that_leaves_messages_out_is_refused():
    silent = CHATML.replace("{{'<|'", "{% if m.role != 'system' %}{{'<|'").replace("\n'}}", "\n'}}{% endif %}", 1)
    assert counted({"messages": [USER, ANSWER]}, silent) == "Because.<|end|>"
    with pytest.raises(UserError, match="leaves out the system message of instruction data row"):
        counted({"messages": [USER, ANSWER], "system": "Be short."}, silent)
    thoughtless = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    with pytest.raises(UserError, match="leaves out part of an answer"):
        counted({"messages": [USER, ANSWER | {"content": "<think>Hm.</think>Because."}]}, thoughtless)


FRONT = "<|system|>You are an assistant. I am here.<|end|>\n"
PREAMBLE = (
    f"{{% for m in messages %}}{{% if loop.first and m['role'] != 'system' %}}{{{{'{FRONT}'}}}}{{% endif %}}"
    "{{'<|' + m['role'] + '|>' + (m['content'] | trim) + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|assistant|>'}}{% endif %}"
)


@pytest.mark.parametrize(
    "said", ["I", "am", "You", "assistant", "<|assistant|>", "<|end|>", "message", "Why?", "", " I\n"]
)
def test_answers_that_stand_elsewhere_too_are_found_at_their_own_place(said):
    """In the text that a template puts in front (as SmolLM2's), in its marks, or in another message."""
    own = {"role": "assistant", "content": said}
    question = USER | {"content": f"{said} {said}x"}
    for template, front in ((PREAMBLE, FRONT), (PREAMBLE.replace(FRONT, ""), "")):
        tokenizer = templated(template)
        for turns in ([own, USER, ANSWER], [own, own, USER, own], [question, own, USER, own], [own, question, own]):
            expected, inside = (
                front,
                [False] * len(front),
            )  # what the template writes, and which characters of it are answers
            for turn in turns:
                head, text = f"<|{turn['role']}|>", turn["content"].strip() + "<|end|>"
                expected += head + text + "\n"
                inside += [False] * len(head) + [turn["role"] == "assistant"] * len(text) + [False]
            tokens, answers, weights = encoded(tokenizer, {"messages": turns})
            assert decode(tokenizer, tokens) == expected
            ends = [len(decode(tokenizer, tokens[: k + 1])) for k in range(len(tokens))]
            assert answers.tolist() == [any(inside[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
            assert np.array_equal(weights, answers.astype(np.float32))


def test_answers_that_cannot_be_placed_are_refused():
    first = {"messages": [{"role": "assistant", "content": "I"}, USER, ANSWER]}
    twice = "{{ 'It says ' + messages[0]['content'] }}" + PREAMBLE
    counts = "{{ messages[0]['content'] | length }}" + PREAMBLE
    for template in (twice, counts):
        with pytest.raises(UserError, match=r"it cannot be told from the prompt \(instruction data row\)"):
            counted(first, template)


@pytest.mark.parametrize(("role", "what"), [("system", "the system message"), ("user", "part of a question")])
def test_messages_left_out_are_missed_though_their_words_stand_elsewhere(role, what):
    silent = PREAMBLE.replace("{{'<|' + m", f"{{% if m.role != '{role}' %}}{{{{'<|' + m").replace(
        "'<|end|>\n'}}{% endfor", "'<|end|>\n'}}{% endif %}{% endfor"
    )
    row = {"messages": [{"role": "user", "content": "assistant"}, ANSWER]}
    assert counted(row) == "Because.<|end|>"
    with pytest.raises(UserError, match=f"leaves out {what} of instruction data row"):
        counted(row | ({"system": "assistant"} if role == "system" else {}), silent)


def test_todays_date_is_not_trained_on(tmp_path):
    row, tokenizer = {"messages": [USER, ANSWER]}, templated(DATED)
    with pytest.raises(UserError, match=r"writes today's date.*data\.chat_date"):
        encoded(tokenizer, row)
    found = encoded(tokenizer, row, date="2024-02-09")
    assert decode(tokenizer, found.tokens).startswith("Today is 09 Feb 2024.<|user|>")
    assert decode(tokenizer, found.tokens[found.answers]) == "Because.<|end|>"
    # Llama's and SmolLM3's way of asking; a date that is not written is not asked for.
    optional = (
        "{% if strftime_now is defined %}{% set d = strftime_now('%A %-d %B') %}{% else %}{% set d = 'x' %}{% endif %}"
    )
    text = decode(tokenizer, encoded(templated(optional + "{{ d }}" + CHATML), row, date="2024-02-09").tokens)
    assert text.startswith(datetime.date(2024, 2, 9).strftime("%A %-d %B"))
    unused = "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    assert counted(row, unused) == "Because.<|end|>"
    newline = "\n{% if tools %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    assert decode(tokenizer, encoded(templated(newline), row).tokens).startswith("\n<|user|>")
    data = DataConfig(kind="instruction", source=write(tmp_path / "x.jsonl", row), chat_date="2024-02-09")
    Config(stage1=StageConfig(data=data)).validate()
    assert len(Samples(data, tokenizer, seq_length=64, seed=0, split="train")) == 1
    for unread in (templated(), small.byte_level()):
        with pytest.raises(UserError, match=r"data\.chat_date: 2024-02-09 is read by nothing"):
            Samples(data, unread, seq_length=64, seed=0, split="train")
    for wrong in ("today", "2024-2-9", "20240209"):
        data.chat_date = wrong
        with pytest.raises(ConfigError, match=r"chat_date: '.*' is no date such as"):
            Config(stage1=StageConfig(data=data)).validate()
