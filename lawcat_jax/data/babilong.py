"""BABILong (arXiv 2406.10149): facts of bAbI stories scattered in book text. Evaluation prompts, the strict metric, and
training samples.

Evaluation takes the facts from bAbI's *test* files, where the published sets take train facts; prompts are the official
ones to the character. A length counts the whole prompt and its 20 new tokens. Training samples are those of the LAWCAT authors
("paper": bare tokens, no template), or framed by templates of our own ("varied", "selection").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.babi import PLACES, TASKS, Story, TrainingStories, load_stories
from lawcat_jax.data.haystack import Haystack
from lawcat_jax.data.samples import EvalSample, Sample, check_eos, fit, in_threads, sample_rng, text_sample
from lawcat_jax.data.tokenize import Tokenizer, decode, encode, encode_many, encode_prompt, opening
from lawcat_jax.errors import UserError

MAX_NEW_TOKENS = 20
FRAME = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
_LEAST_SENTENCE = 10  # tokens of a background sentence


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The parts of a task's official prompt."""

    instruction: str
    examples: str
    post_prompt: str


_ITEM_RULES = (
    "You need to answer the question based only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in "
    "the first location."
)
_ITEMS = (
    "I give you context with the facts about locations and actions of different persons hidden in some random text and "
    "a question."
)
PROMPTS = {
    "qa1": Prompt(
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts. If a person was in "
        "different locations, use the latest location to answer the question.",
        "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
        "Where is Charlie?\nAnswer: The most recent location of Charlie is balcony.\n</example>\n\n"
        "<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
        "balcony. Where is Alan?\nAnswer: The most recent location of Alan is shop.\n</example>",
        "Always return your answer in the following format: The most recent location of ’person’ is ’location’. "
        "Do not write anything else after that.",
    ),
    "qa2": Prompt(
        _ITEMS + _ITEM_RULES,
        "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the "
        "bottle?\nAnswer: The bottle is in the balcony.\n</example>\n"
        "<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw "
        "driver?\nAnswer: The screw driver is in the kitchen.\n</example>",
        "Always return your answer in the following format: The ’item’ is in ’location’. "
        "Do not write anything else after that.",
    ),
    "qa3": Prompt(
        f"{_ITEMS} {_ITEM_RULES}",
        "<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel "
        "journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the apple "
        "before the kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.\n</example>\n"
        "<example>\nJohn went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra "
        "took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the football "
        "before the bedroom?\nAnswer: Before the bedroom the football was in the garden.\n</example>",
        "Always return your answer in the following format: Before the $location_1$ the $item$ was in the "
        "$location_2$. Do not write anything else after that.",
    ),
    "qa4": Prompt(
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        "random text and a question. You need to answer the question based only on the information from the facts.",
        "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south "
        "of?\nAnswer: bedroom\n</example>\n"
        "<example>\nThe garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the "
        "bedroom?\nAnswer: garden\n</example>",
        "Your answer should contain only one word - location. Do not write anything else after that.",
    ),
    "qa5": Prompt(
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts.",
        "<example>\nMary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took "
        "the milk there. Who did Mary give the apple to?\nAnswer: Fred\n</example>\n"
        "<example>\nJeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill "
        "travelled to the bedroom. Who gave the football?\nAnswer: Jeff\n</example>\n"
        "<example>\nFred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff "
        "went back to the garden. What did Fred give to Bill?\nAnswer: apple\n</example>",
        "Your answer should contain only one word. Do not write anything else after that. Do not explain your answer.",
    ),
}
LABELS = dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES) | {
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk")
}


def prompt_text(task: str, context: str, question: str) -> str:
    """The official prompt."""
    parts = dataclasses.asdict(PROMPTS[task])
    return FRAME.format(**parts, context=context.strip(), question=question).strip()


def draw_eval_samples(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    samples: int,
    *,
    facts: str,
    noise: Haystack | None = None,
    seed: int = 42,
    add_bos: bool | Bos = True,
) -> Iterator[EvalSample]:
    """BABILong prompts one by one: prompt and 20 new tokens take at most ``length`` tokens and at least 99 % of it.

    Args:
      task: "qa1" ... "qa5".
      length: tokens; 0 gives the facts alone, without noise.
      facts: directory of the bAbI en-10k files.
      noise: book text between the facts; may be None at length 0.

    The stories come in a random order that ``seed`` fixes, the same at every length; a story whose facts alone are longer
    than ``length`` is passed over.

    Raises:
      UserError: for an unknown task, missing files or noise, or fewer than ``samples`` stories that fit.
    """
    if task not in TASKS:
        raise UserError(f"BABILong task {task!r} is not one of {', '.join(TASKS)}")
    if length and noise is None:
        raise UserError(f"BABILong at {length} tokens needs noise: name books (a path, hf:..., or tfds:...)")
    stories = load_stories(facts, task, "test")
    least = _least_tokens(tokenizer, task, facts, add_bos)
    fitting = [not length or tokens <= length - MAX_NEW_TOKENS for tokens in least]
    if sum(fitting) < samples:
        raise UserError(
            f"BABILong {task} at {length} tokens: {sum(fitting)} of {samples} stories fit with the prompt around them "
            f"(the shortest takes {min(least) + MAX_NEW_TOKENS} tokens); raise the length or ask for fewer samples"
        )
    order = [int(index) for index in np.random.default_rng(seed).permutation(len(stories)) if fitting[index]]

    def make(index: int) -> EvalSample:
        return _eval_sample(tokenizer, task, length, stories[index], index, noise, seed, add_bos)

    yield from in_threads(make, order[:samples])


def eval_samples(*args: Any, **kwargs: Any) -> list[EvalSample]:
    """All of :func:`draw_eval_samples`."""
    return list(draw_eval_samples(*args, **kwargs))


@functools.lru_cache(maxsize=32)
def _least_tokens(tokenizer: Tokenizer, task: str, facts: str, add_bos: bool | Bos) -> list[int]:
    """Tokens of the prompt of every test story without noise."""
    stories = load_stories(facts, task, "test")
    texts = [prompt_text(task, " ".join(story.facts), story.question) for story in stories]
    bos = len(encode_prompt(tokenizer, "", add_bos=add_bos))
    return [bos + len(ids) for ids in encode_many(tokenizer, texts)]


def _eval_sample(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    story: Story,
    index: int,
    noise: Haystack | None,
    seed: int,
    add_bos: bool | Bos,
) -> EvalSample:
    rng = sample_rng("eval", seed, index)
    places = np.sort(rng.random(len(story.facts)))

    @functools.cache  # the last measurement is the sample
    def prompt(context: str) -> list[int]:
        return encode_prompt(tokenizer, prompt_text(task, context, story.question), add_bos=add_bos)

    least = len(prompt(" ".join(story.facts)))
    background = _Background(tokenizer, noise if length else None, rng, length - MAX_NEW_TOKENS - least)
    budget = length - MAX_NEW_TOKENS
    words = 0
    if length:
        words = fit(
            lambda count: len(prompt(background.scatter(story.facts, places, count)[0])),
            budget,
            low=0,
            high=background.words,
            start=background.guess,
            slack=length // 200,
        )
    context, ends = background.scatter(story.facts, places, words)
    depth = 100 * ends[max(story.support, default=len(ends) - 1)] / len(context)
    text = prompt_text(task, context, story.question)
    tokens = np.asarray(prompt(context), np.int32)
    name = noise.name if noise is not None and length else "none"
    return EvalSample(tokens, text, story.answer, depth, story.question, MAX_NEW_TOKENS, name, task)


class _Background:
    """Sentences of at least 10 tokens from a random place, somewhat more than ``budget`` tokens of them."""

    def __init__(self, tokenizer: Tokenizer, noise: Haystack | None, rng: np.random.Generator, budget: int):
        self.sentences: list[list[str]] = []
        self.tokens: list[list[int]] = []
        total, characters = 0, 5 * budget + 500
        while noise is not None and total <= budget:
            sentences = noise.passage(rng, characters)
            for sentence, ids in zip(sentences, encode_many(tokenizer, [" " + s for s in sentences]), strict=True):
                if len(ids) < _LEAST_SENTENCE or total > budget + len(ids):
                    continue
                self.sentences.append(sentence.split())
                self.tokens.append(ids)
                total += len(ids)
            characters = max(500, characters // 2)
        self.words = sum(map(len, self.sentences))
        self.guess = int(self.words * max(0, budget) / max(1, total))

    def scatter(self, facts: tuple[str, ...], places: np.ndarray, words: int) -> tuple[str, list[int]]:
        """(context, end of each fact in characters): facts in order between the first ``words`` words' sentences."""
        kept: list[str] = []
        for sentence in self.sentences:
            if words <= 0:
                break
            kept.append(" ".join(sentence[:words]))
            words -= len(sentence)
        gaps = (places * (len(kept) + 1)).astype(int)
        parts, ends, at, fact = [], [], 0, 0
        for gap in range(len(kept) + 1):
            here = [facts[number] for number in range(fact, len(facts)) if gaps[number] == gap]
            for text in [*here, *kept[gap : gap + 1]]:
                parts.append(text)
                at += len(text) + 1
                if len(ends) < fact + len(here):
                    ends.append(at - 1)
            fact += len(here)
        return " ".join(parts), ends


def score(sample: EvalSample, output: str) -> float:
    """The strict metric: 1.0 where the answer's first sentence names the target and no other label, else 0.0.

    Labels that the question names do not count (they are never the target).
    """
    output = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    asked = sample.question.lower()
    found = {label for label in LABELS[sample.task] if label in output and label not in asked}
    return float(found == {sample.answer.lower()})


INTROS = {
    "varied": (
        "People move about in this text. Keep track of them.",
        "Some sentences below tell where people and things are. The rest comes from a book.",
        "Read on and follow what Mary, John and the others do.",
        "A little story is spread over these pages.",
        "Between the lines of a novel somebody walks around a house.",
        "The following mixes a story with other prose. The order of the story is kept.",
        "Story and book, shuffled together:",
        "Watch the persons and the objects.",
        "Only short plain sentences matter here.",
        "Follow the moves, then reply in one word.",
    ),
    "selection": (
        "Whom do you meet in this house, and with what?",
        "A stroll through rooms, interrupted by literature:",
    ),
}
ASKS = {
    "varied": (
        "{question}\n",
        "{question} ",
        "Q: {question}\nA: ",
        "Now tell me: {question} ",
        "{question}\nReply: ",
        "One more thing. {question}\n",
        "{question} In one word: ",
        "Please reply. {question}\n> ",
        "Quiz: {question} Solution: ",
        "{question}\nIt is: ",
    ),
    "selection": ("So, {question} Well: ", "{question}\nVerdict: "),
}
INTROS["composed"] = INTROS["varied"]
ASKS["composed"] = tuple(
    opening + "{question}" + lead
    for opening in (
        "", "Q: ", "Now tell me: ", "One more thing. ", "Please reply. ", "Quiz: ", "This is what is asked: ", "By the text alone, ",
        "Next: ", "Somebody wonders: ",
    )
    for lead in ("\n", " ", "\nA: ", "\nReply: ", " In one word: ", "\n> ", " Solution: ", "\nIt is: ", "\nBest guess: ")
)  # fmt: skip
EXAMPLES = (
    "For example:",
    "A short one first:",
    "This is how it works.",
    "Here is one that is solved:",
    "To begin with:",
)
"""Headings of solved stories before the story of a composed sample."""
EXAMPLE_SHARE, EXAMPLE_FACTS = 0.4, 10


class BabilongGenerator:
    """Draws training samples: a training story of one of ``tasks``, its facts scattered in book text.

    Args:
      tasks: any of "qa1", "qa2" (and others with a train file) and "qa3" (simulated where there is no train file).
      wording: "paper": context, question, a separator (bos, or the first id of "GEN"), answer and eos, as token ids without a
        leading bos, trained on separator, answer and eos; "varied" or "selection": text with an intro and a question
        form, trained on the answer; "composed": with question forms of two parts, and 4 samples in 10 have one or two short
        stories of the task, with their answers, before the story.
      facts: directory of the bAbI en-10k files ("" is enough for simulated stories).
      noise: book text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tasks: tuple[str, ...],
        wording: str,
        facts: str,
        noise: Haystack,
        add_bos: bool | Bos = True,
    ):
        if wording not in ("paper", *ASKS):
            raise UserError(f"wording {wording!r} of babilong samples is not one of paper, {', '.join(ASKS)}")
        if not tasks:
            raise UserError("babilong samples: name at least one bAbI task")
        check_eos(tokenizer, "babilong")
        self._tokenizer, self._wording, self._noise = tokenizer, wording, noise
        self._add_bos: bool | Bos = add_bos
        self._stories = [TrainingStories(facts, task) for task in tasks]

    def sample_tokens(self, rng: np.random.Generator, max_tokens: int, *, target_tokens: int | None = None) -> Sample:
        """A sample of at most ``target_tokens`` (default ``max_tokens``) tokens, filled with book text.

        A story has at most an eighth as many facts as the sample has tokens (the authors' rule).

        Raises:
          UserError: when no story fits.
        """
        target = max_tokens if target_tokens is None else min(target_tokens, max_tokens)
        make = self._bare if self._wording == "paper" else self._framed
        for _ in range(20):
            stories = self._stories[int(rng.integers(len(self._stories)))]
            sample = make(rng, stories, target)
            if sample is not None:
                return sample
        raise UserError(f"a babilong sample of {target} tokens is too short for its facts: raise the length")

    def _bare(self, rng: np.random.Generator, stories: TrainingStories, target: int) -> Sample | None:
        tokenizer, story = self._tokenizer, stories.draw(rng, target // 8)
        facts = encode_many(tokenizer, [" " + fact for fact in story.facts])
        question, answer = encode(tokenizer, story.question), encode(tokenizer, story.answer)
        bos = tokenizer.bos_token_id
        separator = encode(tokenizer, "GEN")[0] if bos is None else bos
        budget = target - sum(map(len, facts)) - len(question) - len(answer) - 2
        if budget < 0:
            return None
        sentences = _Background(tokenizer, self._noise, rng, budget).tokens
        kept: list[list[int]] = []
        for ids in sentences:
            if budget <= 0:
                break
            kept.append(ids[:budget])
            budget -= len(ids)
        gaps = np.sort(rng.integers(len(kept) + 1, size=len(facts)))
        context, needle_end, fact = [], 0, 0
        for gap in range(len(kept) + 1):
            while fact < len(facts) and gaps[fact] == gap:
                context += facts[fact]
                if fact == max(story.support, default=len(facts) - 1):
                    needle_end = len(context)
                fact += 1
            context += kept[gap] if gap < len(kept) else []
        start = len(context) + len(question) + 1
        tokens = np.asarray([*context, *question, separator, *answer, tokenizer.eos_token_id], np.int32)
        text = decode(tokenizer, tokens)
        end = start + len(answer)
        return Sample(tokens, start, end, story.answer, text, needle_end, len(context), (start - 1, end + 1))

    def _framed(self, rng: np.random.Generator, stories: TrainingStories, target: int) -> Sample | None:
        story = stories.draw(rng, target // 8)
        intros, asks = INTROS[self._wording], ASKS[self._wording]
        intro = intros[int(rng.integers(len(intros)))]
        form = asks[int(rng.integers(len(asks)))]
        ask = form.format(question=story.question)
        if self._wording == "composed" and rng.random() < EXAMPLE_SHARE:
            for _ in range(int(rng.integers(1, 3))):
                example = stories.draw(rng, max(EXAMPLE_FACTS, target // 40))
                heading = EXAMPLES[int(rng.integers(len(EXAMPLES)))]
                solved = form.format(question=example.question) + example.answer
                intro += f"\n{heading}\n{' '.join(example.facts)}\n{solved}\n"
        places = np.sort(rng.random(len(story.facts)))
        specials = 1 + len(opening(self._tokenizer, self._add_bos))

        def text(context: str) -> str:
            return f"{intro}\n{context}\n{ask}{story.answer}"

        budget = target - specials
        least = len(encode(self._tokenizer, text(" ".join(story.facts))))
        if least > budget:
            return None
        background = _Background(self._tokenizer, self._noise, rng, budget - least)
        words = fit(
            lambda count: len(encode(self._tokenizer, text(background.scatter(story.facts, places, count)[0]))),
            budget,
            low=0,
            high=background.words,
            start=background.guess,
            slack=max(3, budget // 200),
        )
        if words < 0:
            return None
        context, ends = background.scatter(story.facts, places, words)
        whole = text(context)
        return text_sample(
            self._tokenizer,
            whole,
            story.answer,
            needle_end=len(intro) + 1 + ends[max(story.support, default=len(ends) - 1)],
            question_start=len(intro) + 1 + len(context) + 1,
            add_bos=self._add_bos,
        )
