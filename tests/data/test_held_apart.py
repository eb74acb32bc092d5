"""What is evaluated never trains: frames of evaluation prompts, and bAbI's test stories.

The paper's own training wordings share sentences with Landmark's and RULER's prompts by the paper's design; they are
listed here, one by one, and nothing else may. The varied, composed and selection wordings share nothing.

``LAWCAT_DATA=<directory>`` (with books/ and babi/en-10k/ in it) runs the last tests on real files too.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lawcat_jax.data import babi, babilong, niah, passkey, retrieval, wordings
from lawcat_jax.data.haystack import Haystack, load_haystack
from lawcat_jax.data.samples import sample_rng
from lawcat_jax.data.sentences import split_sentences
from tests.data import tokenizers as small
from tests.data.texts import prose, write_babi

BOOKS = Haystack("made up", (prose(12_000),))
LANDMARK = (
    "There is an important info hidden inside a lot of irrelevant text.",
    "Find it and memorize them.",
    "I will quiz you about the important information there.",
    "The pass key is",
    "Remember it.",
    "is the pass key.",
    "What is the pass key?",
)
RULER = (
    "A special magic",
    "is hidden within the following text.",
    "Make sure to memorize it.",
    "I will quiz you about the",
    "One of the special magic",
    "What is the special magic",
    "special magic",
    "mentioned in the provided text",
)
# instructions and post-prompts sentence by sentence, and the marks around context and question
BABILONG = (
    *sorted(
        {
            sentence
            for prompt in babilong.PROMPTS.values()
            for part in (prompt.instruction, prompt.post_prompt)
            for sentence in split_sentences(part)
        }
    ),
    "<context>",
    "</context>",
    "<example>",
    "Question: ",
    "The most recent location of",
)
# by the paper's design
PAPER_PASSKEY = {
    "I will quiz you about the important information there.",
    "The pass key is",
    "Remember it.",
    "What is the pass key?",
    "I will quiz you about the",
}
PAPER_NIAH = {
    "I will quiz you about the important information there.",
    "I will quiz you about the",
    "One of the special magic",
    "What is the special magic",
    "special magic",
    "mentioned in the provided text",
}


def _found(texts):
    return {phrase for phrase in (*LANDMARK, *RULER, *BABILONG) for text in texts if phrase in text}


def _templates(wording):
    parts = [*wording.tasks, *wording.needles, *wording.named_needles]
    parts += [f"{question}\n{lead} " for question, lead in (*wording.questions, *wording.named_questions)]
    parts += [f"{question} {lead} " for question, lead in (*wording.questions, *wording.named_questions)]
    whats = [what for group in wording.whats.values() for what in group]
    return parts + [part.format(what=what, name="amber-anchor", value="12345") for part in parts for what in whats]


def test_the_phrases_are_those_of_the_prompts():
    prompt, _ = passkey.landmark_prompt(3072, 0)
    assert all(phrase in prompt for phrase in LANDMARK)
    frame = niah.FRAME.format(t="number", key="a-b", context=niah.NEEDLE.format(t="number", key="a-b", value="1"))
    assert all(phrase in frame for phrase in RULER)
    official = [babilong.prompt_text(task, "c", "q") for task in babi.TASKS]
    assert all(any(phrase in text for text in official) for phrase in BABILONG)
    assert len(BABILONG) > 12


@pytest.mark.parametrize("name", ["varied", "composed", "selection"])
def test_no_template_has_a_phrase_of_an_evaluation_prompt(name):
    texts = [*_templates(wordings.WORDINGS[name]), *babilong.INTROS[name], *wordings.FILLERS]
    texts += [*wordings.REMINDERS, *wordings.TASK_ENDINGS, *babilong.EXAMPLES]
    seconds = [second for group in wordings.WHAT_SECOND.values() for second in group]
    texts += [f"{first} {second}" for first in wordings.WHAT_FIRST for second in seconds]
    texts += [ask.format(question="Where is Mary?") for ask in babilong.ASKS[name]]
    assert _found(texts) == set()


def _samples(count=40, books=BOOKS, facts=""):
    """(texts of training samples, phrases they may have) for every generator and wording."""
    tokenizer = small.byte_level()
    out = {}
    for task in ("passkey", "niah"):
        for wording in ("varied", "composed", "selection"):
            generator = retrieval.RetrievalGenerator(tokenizer, task=task, wording=wording, hay="mixed", haystack=books)
            out[task, wording] = (generator, set())
    generator = retrieval.RetrievalGenerator(tokenizer, task="niah", wording="paper", hay="mixed", haystack=books)
    out["niah", "paper"] = (generator, PAPER_NIAH)
    out["passkey", "paper"] = (passkey.PasskeyGenerator(tokenizer), PAPER_PASSKEY)
    for wording in ("paper", "varied", "composed", "selection"):
        tasks = ("qa1", "qa2", "qa3") if facts else ("qa3",)
        generator = babilong.BabilongGenerator(tokenizer, tasks=tasks, wording=wording, facts=facts, noise=books)
        out["babilong", wording] = (generator, set())
    for name, (generator, allowed) in out.items():
        texts = [generator.sample_tokens(sample_rng("train", 0, index), 700).text for index in range(count)]
        yield name, texts, allowed


def test_no_generated_sample_has_a_phrase_of_an_evaluation_prompt(tmp_path):
    pytest.importorskip("wonderwords")
    for name, texts, allowed in _samples(12, facts=write_babi(tmp_path)):
        assert _found(texts) == allowed, name  # the paper's wordings have theirs, the others none


def test_babi_test_stories_do_not_train(tmp_path):
    directory = write_babi(tmp_path)
    for task in ("qa1", "qa2", "qa4", "qa5"):
        tested = babi.test_texts(directory, task)
        train = babi.read_stories(next(tmp_path.glob(f"{task}_*_train.txt")))
        assert tested & {story.text for story in train}, "the files share a story"
        if task == "qa5":  # no story of its own is left
            with pytest.raises(ValueError, match="holds no question"):
                babi.load_stories(directory, task, "train")
            continue
        source = babi.TrainingStories(directory, task)
        drawn = {source.draw(np.random.default_rng(seed), 100).text for seed in range(100)}
        assert drawn
        assert not drawn & tested


@pytest.fixture
def real():
    if not os.environ.get("LAWCAT_DATA"):
        pytest.skip("LAWCAT_DATA names no directory")
    return Path(os.environ["LAWCAT_DATA"])


def test_real_babi_stories(real):
    directory = str(real / "babi" / "en-10k")
    for task in ("qa1", "qa2", "qa3"):
        tested = babi.test_texts(directory, task)
        assert len(tested) > 900
        source = babi.TrainingStories(directory, task)
        drawn = [source.draw(np.random.default_rng(seed), 150).text for seed in range(3000)]
        assert not set(drawn) & tested
        assert len(set(drawn)) > 1500


def test_real_books(real):
    books = load_haystack(str(real / "books" / "train"))
    for name, texts, allowed in _samples(100, books, str(real / "babi" / "en-10k")):
        assert _found(texts) <= allowed | {"Remember it."}, name  # somebody in a novel may say so
