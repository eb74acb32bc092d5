"""bAbI stories: reading the task files, and a small world that makes stories of three supporting facts.

Source of the format and vocabulary: bAbI (arXiv 1502.05698), sets ``en-10k``. Files are read at run time from a directory
that the user names; none is shipped.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from lawcat_jax.errors import UserError

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
_GO = ("went to", "moved to", "went back to", "journeyed to", "travelled to")
_TAKE = ("got", "took", "picked up", "grabbed")
_DROP = ("dropped", "put down", "left", "discarded")


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts in order, one question, its one-word answer, and which facts (indices, from 0) the answer rests on."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]

    @property
    def text(self) -> str:
        """Facts and question as one line: what makes two stories the same."""
        return " ".join([*self.facts, self.question])


def read_stories(file: Path) -> list[Story]:
    """Every question of a bAbI file as a story of its own: the facts before it, earlier questions left out.

    Raises:
      UserError: for a file that is not in bAbI's format.
    """
    stories: list[Story] = []
    facts: dict[int, str] = {}
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"bAbI file {str(file)!r}: not UTF-8 at byte {problem.start}") from problem
    except OSError as problem:
        raise UserError(f"bAbI file {str(file)!r}: cannot be read ({problem.strerror or problem})") from problem
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        head, _, rest = line.partition(" ")
        fields = rest.split("\t")
        if not head.isdigit() or len(fields) not in (1, 3):
            raise UserError(f"bAbI file {str(file)!r}, line {number}: not '<number> <fact>' or a question with 2 tabs")
        if head == "1":
            facts = {}
        if len(fields) == 1:
            facts[int(head)] = rest.strip()
            continue
        question, answer, support = (field.strip() for field in fields)
        order = list(map(str, facts))
        if not question or not answer or not support or not set(support.split()) <= set(order):
            raise UserError(
                f"bAbI file {str(file)!r}, line {number}: a question needs an answer, and numbers of facts before it that support "
                f"it, not {support!r}"
            )
        places = tuple(order.index(place) for place in support.split())
        stories.append(Story(tuple(facts.values()), question, answer, places))
    return stories


@functools.lru_cache(maxsize=16)
def load_stories(directory: str, task: str, split: str) -> tuple[Story, ...]:
    """Stories of ``<task>_*_<split>.txt`` (split "train" or "test") in a directory.

    Training stories that a test file of the directory holds too are left out.

    Raises:
      UserError: when there is no such directory or file, or nothing is left.
    """
    if task not in TASKS:
        raise UserError(f"bAbI task {task!r} is not one of {', '.join(TASKS)}")
    file = _file(directory, task, split)
    if file is None:
        raise UserError(
            f"bAbI directory {directory!r}: no file {task}_*_{split}.txt; name the directory of the en-10k files"
        )
    stories = read_stories(file)
    if split == "train":
        tested = test_texts(directory, task)
        stories = [story for story in stories if story.text not in tested]
    if not stories:
        raise UserError(f"bAbI file {str(file)!r}: it holds no question")
    return tuple(stories)


@functools.lru_cache(maxsize=16)
def test_texts(directory: str, task: str) -> frozenset[str]:
    """Texts of the test stories of a task; empty where the directory has no test file."""
    file = _file(directory, task, "test")
    return frozenset(story.text for story in read_stories(file)) if file is not None else frozenset()


def _file(directory: str, task: str, split: str) -> Path | None:
    if not directory:
        return None
    files = sorted(Path(directory).expanduser().glob(f"{task}_*_{split}.txt"))
    if len(files) > 1:
        raise UserError(
            f"bAbI directory {directory!r}: {files[0].name} and {files[1].name} are both {task}'s; leave one"
        )
    return files[0] if files else None


class TrainingStories:
    """Draws training stories of one task: from its train file, or (qa3 without one) from :func:`simulate`.

    Raises:
      UserError: when the task has neither.
    """

    def __init__(self, directory: str, task: str):
        self._task, self._tested = task, test_texts(directory, task)
        simulated = task == "qa3" and _file(directory, task, "train") is None
        self._stories = () if simulated else load_stories(directory, task, "train")

    def draw(self, rng: np.random.Generator, max_facts: int) -> Story:
        """A story of at most ``max_facts`` facts.

        Raises:
          UserError: when none of 1,000 draws is that short.
        """
        for _ in range(1000):
            if self._stories:
                story = self._stories[int(rng.integers(len(self._stories)))]
            else:
                story = simulate(rng, max_facts)
            if len(story.facts) <= max_facts and story.text not in self._tested:
                return story
        raise UserError(f"bAbI {self._task}: found no story of at most {max_facts} facts; samples need more tokens")


def simulate(rng: np.random.Generator, max_facts: int) -> Story:
    """A story of task 3, "Where was the apple before the kitchen?": people walk, take objects along and drop them.

    The answer is the place where the object was before its last stay at the place asked about. Lengths spread evenly
    in their logarithm from 6 to ``max_facts`` facts.
    """
    wanted = int(np.exp(rng.uniform(np.log(6), np.log(max(7, min(max_facts, 120) + 1)))))
    while True:
        world = _World(rng)
        while len(world.facts) < wanted:
            world.act()
        asked = [(thing, stay) for thing in OBJECTS for stay in world.askable(thing)]
        if asked:
            thing, stay = asked[int(rng.integers(len(asked)))]
            return world.ask(thing, stay)


class _World:
    """Who and what is where. A place is None until a fact tells it."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self.facts: list[str] = []
        self._place: dict[str, str | None] = dict.fromkeys(PEOPLE)
        self._came: dict[str, int] = {}  # person -> fact of their last walk
        self._owner: dict[str, str | None] = dict.fromkeys(OBJECTS)
        self._taken: dict[str, int] = {}
        self._stays: dict[str, list[tuple[str, tuple[int, ...]]]] = {thing: [] for thing in OBJECTS}

    def act(self) -> None:
        person = self._pick(PEOPLE)
        place = self._place[person]
        there = [thing for thing in OBJECTS if self._owner[thing] is None and self._at(thing) in (None, place)]
        carried = [thing for thing in OBJECTS if self._owner[thing] == person]
        draw = self._rng.random()
        if place is not None and there and draw < 0.35:
            thing = self._pick(there)
            self._owner[thing], self._taken[thing] = person, len(self.facts)
            if self._at(thing) is None:
                self._stay(thing, place, (self._came[person],))
            self._tell(f"{person} {self._pick(_TAKE)} the {thing}{self._pick(('', '', '', ' there'))}.")
        elif carried and draw < 0.5:
            thing = self._pick(carried)
            self._owner[thing] = None
            self._tell(f"{person} {self._pick(_DROP)} the {thing}{self._pick(('', '', '', ' there'))}.")
        else:
            new = self._pick([other for other in PLACES if other != place])
            self._place[person], self._came[person] = new, len(self.facts)
            for thing in carried:
                self._stay(thing, new, (len(self.facts),))
            self._tell(f"{person} {self._pick(_GO)} the {new}.")

    def askable(self, thing: str) -> list[int]:
        """Stays of ``thing``, not the first, whose place it has not come back to since."""
        places = [place for place, _ in self._stays[thing]]
        return [stay for stay in range(1, len(places)) if places[stay] not in places[stay + 1 :]]

    def ask(self, thing: str, stay: int) -> Story:
        (before, earlier), (place, later) = self._stays[thing][stay - 1 : stay + 1]
        support = tuple(sorted({*earlier, *later, self._taken[thing]}))
        return Story(tuple(self.facts), f"Where was the {thing} before the {place}?", before, support)

    def _at(self, thing: str) -> str | None:
        return self._stays[thing][-1][0] if self._stays[thing] else None

    def _stay(self, thing: str, place: str, facts: tuple[int, ...]) -> None:
        if self._at(thing) != place:
            self._stays[thing].append((place, facts))

    def _tell(self, fact: str) -> None:
        self.facts.append(fact)

    def _pick(self, options):
        return options[int(self._rng.integers(len(options)))]
