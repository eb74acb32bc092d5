"""BABILong prompts character by character, lengths, the metric, bAbI files and training samples."""

from __future__ import annotations

import numpy as np
import pytest

from lawcat_jax.data import babi, babilong
from lawcat_jax.data.haystack import Haystack
from lawcat_jax.data.samples import EvalSample, sample_rng
from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import prose, write_babi

BOOKS = Haystack("made up", (prose(12_000), prose(6_000, 1)))
FACTS = "Mary moved to the bathroom. John went to the hallway."
ITEM_RULES = (
    "You need to answer the question based only on the information from the facts.\nIf a person got an item in the first "
    "location and travelled to the second location the item is also in the second location. If a person dropped an item "
    "in the first location and moved to the second location the item remains in the first location."
)
# the official prompts around a context and a question, spelt out
OFFICIAL = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts. If a person was in "
        "different locations, use the latest location to answer the question.\n"
        "\n<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. Where is "
        "Charlie?\nAnswer: The most recent location of Charlie is balcony.\n</example>\n"
        "\n<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
        "balcony. Where is Alan?\nAnswer: The most recent location of Alan is shop.\n</example>\n"
        "\nAlways return your answer in the following format: The most recent location of \u2019person\u2019 is "
        "\u2019location\u2019. Do not write anything else after that.\n"
    ),
    "qa2": (
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question.{ITEM_RULES}\n"
        "\n<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the "
        "bottle?\nAnswer: The bottle is in the balcony.\n</example>\n"
        "<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw "
        "driver?\nAnswer: The screw driver is in the kitchen.\n</example>\n"
        "\nAlways return your answer in the following format: The \u2019item\u2019 is in \u2019location\u2019. Do not "
        "write anything else after that.\n"
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question. {ITEM_RULES}\n"
        "\n<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel "
        "journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the apple before "
        "the kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.\n</example>\n"
        "<example>\nJohn went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra "
        "took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the football "
        "before the bedroom?\nAnswer: Before the bedroom the football was in the garden.\n</example>\n"
        "\nAlways return your answer in the following format: Before the $location_1$ the $item$ was in the $location_2$. "
        "Do not write anything else after that.\n"
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        "random text and a question. You need to answer the question based only on the information from the facts.\n"
        "\n<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south "
        "of?\nAnswer: bedroom\n</example>\n"
        "<example>\nThe garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\n"
        "Answer: garden\n</example>\n"
        "\nYour answer should contain only one word - location. Do not write anything else after that.\n"
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts.\n"
        "\n<example>\nMary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took "
        "the milk there. Who did Mary give the apple to?\nAnswer: Fred\n</example>\n"
        "<example>\nJeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill "
        "travelled to the bedroom. Who gave the football?\nAnswer: Jeff\n</example>\n"
        "<example>\nFred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff "
        "went back to the garden. What did Fred give to Bill?\nAnswer: apple\n</example>\n"
        "\nYour answer should contain only one word. Do not write anything else after that. Do not explain your answer.\n"
    ),
}


@pytest.fixture
def directory(tmp_path):
    return write_babi(tmp_path)


@pytest.mark.parametrize("task", babi.TASKS)
def test_prompts_without_noise_are_the_official_ones(directory, task):
    stories = babi.load_stories(directory, task, "test")
    samples = babilong.eval_samples(small.byte_level(), task, 0, len(stories), facts=directory)
    expected = {
        f"{OFFICIAL[task]}\n<context>\n{' '.join(story.facts)}\n</context>\n\nQuestion: {story.question}"
        for story in stories
    }
    assert {sample.prompt for sample in samples} == expected
    assert {sample.haystack for sample in samples} == {"none"}
    assert {sample.max_new_tokens for sample in samples} == {20}


@pytest.mark.parametrize("name", small.ALL)
def test_lengths_are_filled_to_one_percent(directory, name):
    tokenizer = small.ALL[name]()
    for task in babi.TASKS:
        for length in (1600, 4096):
            for sample in babilong.eval_samples(tokenizer, task, length, 2, facts=directory, noise=BOOKS):
                assert 0.99 * length <= len(sample.tokens) + 20 <= length
                assert sample.tokens.tolist() == [tokenizer.bos_token_id, *encode(tokenizer, sample.prompt)]


def test_noisy_context_holds_the_facts_in_order_between_sentences_of_the_books(directory):
    samples = babilong.eval_samples(small.byte_level(), "qa1", 4096, 6, facts=directory, noise=BOOKS)
    stories = {story.text: story for story in babi.load_stories(directory, "qa1", "test")}
    for sample in samples:
        context = sample.prompt.split("<context>\n")[1].split("\n</context>")[0]
        at, found = 0, []
        facts = {fact for story in stories.values() for fact in story.facts}
        while True:
            hits = [(context.find(fact, at), fact) for fact in facts if context.find(fact, at) >= 0]
            if not hits:
                break
            start, fact = min(hits)
            found.append(fact)
            at = start + len(fact)
            assert start == 0 or context[start - 1] == " "
        story = stories[" ".join([*found, sample.question])]
        assert sample.answer == story.answer
        end = context.index(story.facts[max(story.support)]) + len(story.facts[max(story.support)])
        assert sample.depth == pytest.approx(100 * end / len(context))
        assert sample.haystack == "made up"
    again = babilong.eval_samples(small.byte_level(), "qa1", 4096, 6, facts=directory, noise=BOOKS)
    assert [sample.prompt for sample in again] == [sample.prompt for sample in samples]


def test_an_oracle_scores_all_and_a_constant_nothing(directory):
    for length in (0, 2048):
        for sample in babilong.eval_samples(small.byte_level(), "qa2", length, 3, facts=directory, noise=BOOKS):
            context = sample.prompt.split("<context>\n")[1]
            place = context.split("Mary travelled to the ")[1].split(".")[0]
            assert babilong.score(sample, f"The milk is in the {place}. And") == 1
            assert babilong.score(sample, "The milk is in the cellar.") == 0


def test_reading_files(directory, tmp_path):
    stories = babi.load_stories(directory, "qa1", "test")
    assert len(stories) == 6
    assert stories[0] == babi.Story(tuple(f"{f}." for f in FACTS[:-1].split(". ")), "Where is Mary?", "bathroom", (0,))
    assert stories[1].facts[2:] == ("Daniel went back to the kitchen.", "Sandra moved to the garden.")
    assert stories[1].support == (2,)  # line 4 is the third fact
    with pytest.raises(UserError, match=r"no file qa3_\*_train.txt"):
        babi.load_stories(directory, "qa3", "train")
    with pytest.raises(UserError, match="'qa6' is not one of"):
        babi.load_stories(directory, "qa6", "test")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "qa1_x_test.txt").write_text("1 A.\nnonsense\n")
    with pytest.raises(UserError, match=r"line 2: not '<number> <fact>'"):
        babi.load_stories(str(tmp_path / "sub"), "qa1", "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 Mary moved.\n2 Where is Mary?\tcaf\xe9\t1\n", "not UTF-8 at byte"),
        (
            b"1 Mary moved.\n2 Where is Mary?\thall\tone\n",
            "line 2: a question needs an answer, and numbers .* not 'one'",
        ),
        (b"1 Mary moved.\n2 Where is Mary?\thall\t7\n", "line 2: .* not '7'"),
        (b"1 Mary moved.\n2 Where is Mary?\t\t1\n", "line 2: a question needs an answer"),
    ],
)
def test_files_that_say_too_little(content, message, tmp_path):
    (tmp_path / "qa1_a_test.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"qa1_a_test\.txt'.*{message}"):
        babi.load_stories(str(tmp_path), "qa1", "test")


def test_a_mark_of_the_encoding_is_no_text_and_two_files_of_a_task_are_one_too_many(tmp_path):
    story = "1 Mary moved to the hall.\n2 Where is Mary?\thall\t1\n"
    (tmp_path / "qa1_a_test.txt").write_text(story, encoding="utf-8-sig")
    assert babi.load_stories(str(tmp_path), "qa1", "test")[0].facts == ("Mary moved to the hall.",)
    (tmp_path / "qa2_a_test.txt").write_text(story)
    (tmp_path / "qa2_b_test.txt").write_text(story)
    with pytest.raises(UserError, match=r"qa2_a_test\.txt and qa2_b_test\.txt are both qa2's"):
        babi.load_stories(str(tmp_path), "qa2", "test")


def test_bad_requests(directory):
    make = babilong.eval_samples
    with pytest.raises(UserError, match="'qa9' is not one of"):
        make(small.byte_level(), "qa9", 0, 1, facts=directory)
    with pytest.raises(UserError, match="needs noise"):
        make(small.byte_level(), "qa1", 1024, 1, facts=directory)
    with pytest.raises(UserError, match=r"0 of 2 stories fit.*takes \d+ tokens"):
        make(small.byte_level(), "qa1", 300, 2, facts=directory, noise=BOOKS)
    with pytest.raises(UserError, match="6 of 7 stories"):
        make(small.byte_level(), "qa1", 0, 7, facts=directory)


@pytest.mark.parametrize("wording", ["paper", "varied", "composed", "selection"])
def test_training_samples(directory, wording):
    tokenizer = small.byte_level()
    generator = babilong.BabilongGenerator(
        tokenizer, tasks=("qa1", "qa2", "qa3"), wording=wording, facts=directory, noise=BOOKS
    )
    for index in range(12):
        sample = generator.sample_tokens(sample_rng("train", 0, index), 1200)
        assert 1185 <= len(sample.tokens) <= 1200
        tokens = sample.tokens
        assert decode(tokenizer, tokens[sample.answer_start : sample.answer_end]).strip() == sample.answer
        assert tokens[-1] == tokenizer.eos_token_id
        assert decode(tokenizer, tokens[: sample.needle_end]).endswith(".")
        assert decode(tokenizer, tokens[sample.question_start :]).count("?") >= 1
        if wording == "paper":
            assert len(tokens) == 1200
            assert tokens[sample.answer_start - 1] == tokenizer.bos_token_id  # the separator
            assert tokens[0] != tokenizer.bos_token_id
            assert sample.label_span == (sample.answer_start - 1, len(tokens))  # len(answer) + 2 labels
        again = generator.sample_tokens(sample_rng("train", 0, index), 1200)
        assert np.array_equal(tokens, again.tokens)


def test_training_needs_room_and_files(directory):
    make = lambda **o: babilong.BabilongGenerator(small.byte_level(), noise=BOOKS, **o)  # noqa: E731
    with pytest.raises(UserError, match=r"no file qa1_\*_train"):
        make(tasks=("qa1",), wording="paper", facts="")
    with pytest.raises(UserError, match="'landmark' of babilong"):
        make(tasks=("qa1",), wording="landmark", facts=directory)
    with pytest.raises(UserError, match="found no story of at most"):
        make(tasks=("qa1",), wording="paper", facts=directory).sample_tokens(sample_rng("train", 0, 0), 8)
    assert make(tasks=("qa3",), wording="paper", facts="").sample_tokens(sample_rng("train", 0, 0), 900).answer


def _solve(story):
    """An independent reading of a story of task 3."""
    place, holder, known = {}, {}, {}
    for fact in story.facts:
        words = fact.rstrip(".").replace(" there", "").split()
        person, target = words[0], words[-1]
        if target in babi.PLACES:
            place[person] = target
            for thing, who in holder.items():
                if who == person:
                    known.setdefault(thing, []).append(target)
        elif words[1] in ("got", "took", "picked", "grabbed"):
            holder[target] = person
            if person in place and known.get(target, [None])[-1] != place[person]:
                known.setdefault(target, []).append(place[person])
        else:
            assert holder.pop(target) == person, "only who has a thing can drop it"
    thing, there = story.question.split()[3], story.question.rstrip("?").split()[-1]
    last = len(known[thing]) - 1 - known[thing][::-1].index(there)
    return known[thing][last - 1]


def test_simulated_stories_are_right():
    sizes = []
    for seed in range(300):
        story = babi.simulate(np.random.default_rng(seed), 80)
        assert story.answer == _solve(story)
        assert story.answer in babi.PLACES
        assert len(story.facts) <= 80
        assert f"before the {story.answer}?" not in story.question
        assert 2 <= len(story.support) <= 3
        assert max(story.support) < len(story.facts)
        sizes.append(len(story.facts))
    assert min(sizes) <= 8
    assert max(sizes) >= 60


BATH, MILK = "Where is Mary?", "Where was the milk before the garden?"
# (task, question, target, output, score)
TABLE = [
    ("qa1", BATH, "bathroom", "The most recent location of Mary is bathroom.", 1),
    ("qa1", BATH, "bathroom", "bathroom", 1),
    ("qa1", BATH, "bathroom", "BATHROOM", 1),
    ("qa1", BATH, "bathroom", " Bathroom.", 1),
    ("qa1", BATH, "bathroom", "the bathroom. Not the kitchen.", 1),
    ("qa1", BATH, "bathroom", "bathroom\n<context>\nkitchen", 1),
    ("qa1", BATH, "bathroom", "bathroom <example> garden", 1),
    ("qa1", BATH, "bathroom", "bathroom bathroom", 1),
    ("qa1", BATH, "bathroom", "Mary is in the \u2019bathroom\u2019", 1),
    ("qa1", BATH, "bathroom", "bathrooms", 1),
    ("qa1", BATH, "bathroom", "", 0),
    ("qa1", BATH, "bathroom", ".bathroom", 0),
    ("qa1", BATH, "bathroom", "kitchen", 0),
    ("qa1", BATH, "bathroom", "bathroom or kitchen", 0),
    ("qa1", BATH, "bathroom", "bathroom\nkitchen", 0),
    ("qa1", BATH, "bathroom", "kitchen. bathroom", 0),
    ("qa1", BATH, "bathroom", "Mr. Bathroom", 0),
    ("qa1", BATH, "bathroom", "<context> bathroom", 0),
    ("qa1", BATH, "bathroom", "<EXAMPLE>bathroom", 0),
    ("qa1", BATH, "bathroom", "bath room", 0),
    ("qa1", BATH, "bathroom", "I do not know", 0),
    ("qa2", "Where is the milk?", "office", "The milk is in the office.", 1),
    ("qa2", "Where is the milk?", "office", "The apple is in the office", 1),
    ("qa2", "Where is the milk?", "office", "The milk is in the hallway.", 0),
    ("qa2", "Where is the milk?", "office", "bathroom, bedroom, garden, hallway, kitchen, office", 0),
    ("qa3", MILK, "kitchen", "Before the garden the milk was in the kitchen.", 1),
    ("qa3", MILK, "kitchen", "kitchen, then garden", 1),
    ("qa3", MILK, "kitchen", "garden", 0),
    ("qa3", MILK, "kitchen", "Before the garden the milk was in the office and the kitchen", 0),
    ("qa3", MILK, "kitchen", "Before the garden it was unknown", 0),
    ("qa4", "What is the bathroom east of?", "bedroom", "bedroom", 1),
    ("qa4", "What is the bathroom east of?", "bedroom", "The bathroom is east of the bedroom", 1),
    ("qa4", "What is the bathroom east of?", "bedroom", "bathroom", 0),
    ("qa4", "What is the bathroom east of?", "bedroom", "bedroom and hallway", 0),
    ("qa5", "What did Fred give to Jeff?", "football", "football", 1),
    ("qa5", "What did Fred give to Jeff?", "football", "Fred gave Jeff the Football.", 1),
    ("qa5", "What did Fred give to Jeff?", "football", "apple football", 0),
    ("qa5", "Who gave the milk?", "Bill", "Bill", 1),
    ("qa5", "Who gave the milk?", "Bill", "bill gave the milk", 1),
    ("qa5", "Who gave the milk?", "Bill", "Mary gave it to Bill", 0),
    ("qa5", "Who gave the milk?", "Bill", "milk", 0),
]


def test_metric_on_answers_made_by_hand():
    assert len(TABLE) >= 40
    for task, question, target, output, expected in TABLE:
        sample = EvalSample(np.zeros(0, np.int32), "", target, 0.0, question, 20, "none", task)
        assert babilong.score(sample, output) == expected, (task, output)
