"""Models under evaluation that need no weights."""

from __future__ import annotations

import re

from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.tasks.task import Model

NEEDLES = (r"The pass key is (\d+)\. Remember", r"One of the special magic \w+s for [\w-]+ is: ([\w-]+)\.")
"""What an oracle looks for in the prompts of the retrieval tasks."""


_FACTS = re.compile(
    r"(?P<who>\w+) (?:moved|went|went back|travelled|journeyed) to the (?P<where>\w+)\."
    r"|(?P<taker>\w+) (?:got|picked up) the (?P<taken>\w+)( there)?\."
    r"|(?P<giver>\w+) gave the (?P<given>\w+) to (?P<to>\w+)\."
    r"|The (?P<one>\w+) is (?P<side>\w+) of the (?P<other>\w+)\."
)
_OPPOSITE = {"east": "west", "west": "east", "north": "south", "south": "north"}


def babi_answer(text):
    """The answer to a BABILong prompt, from the story in its context; None for any other text."""
    found = re.search(r"<context>\n(.*)\n</context>\n\nQuestion: (.*)", text, re.DOTALL)
    if not found:
        return None
    story, question = found.groups()
    places, holders, gifts, sides = {}, {}, {}, {}
    for fact in _FACTS.finditer(story):
        if fact["who"]:
            places.setdefault(fact["who"], []).append(fact["where"])
        elif fact["taker"]:
            holders[fact["taken"]] = fact["taker"]
        elif fact["giver"]:
            gifts[fact["giver"], fact["to"]] = fact["given"]
        else:
            sides[fact["one"], fact["side"]] = fact["other"]
            sides[fact["other"], _OPPOSITE[fact["side"]]] = fact["one"]
    if asked := re.match(r"Where is (\w+)\?", question):
        return places[asked[1]][-1]
    if asked := re.match(r"Where is the (\w+)\?", question):
        return places[holders[asked[1]]][-1]
    if asked := re.match(r"Where was the (\w+) before the (\w+)\?", question):
        visited = places[holders[asked[1]]]
        return visited[visited.index(asked[2]) - 1]
    if asked := re.match(r"What did (\w+) give to (\w+)\?", question):
        return gifts[asked[1], asked[2]]
    asked = re.match(r"What is the (\w+) (\w+) of\?", question)
    return sides[asked[1], asked[2]]


class Oracle:
    """Reads the answer off the prompt, as a perfect model would; with a reach, only from that many last tokens."""

    def __init__(self, tokenizer, reach=None):
        self.tokenizer, self.reach, self.calls = tokenizer, reach, []

    def __call__(self, prompts, max_new_tokens, ends=False):
        self.calls.append((len(prompts), max_new_tokens, {len(prompt) for prompt in prompts}))
        outputs = []
        for prompt in prompts:
            text = decode(self.tokenizer, prompt if self.reach is None else prompt[-self.reach :])
            found = next((match for needle in NEEDLES if (match := re.search(needle, text))), None)
            answer = found.group(1) if found else babi_answer(text) or "00000"
            continued = encode(self.tokenizer, decode(self.tokenizer, prompt).rstrip(" ") + f" {answer}. Yes, it is")
            start = len(encode(self.tokenizer, decode(self.tokenizer, prompt)))
            outputs.append(continued[start:][:max_new_tokens])
        return outputs


def constant(tokenizer, text=" 00000. I think."):
    """Gives the same answer whatever it is asked."""
    tokens = encode(tokenizer, text)
    return lambda prompts, max_new_tokens, ends: [tokens[:max_new_tokens] for _ in prompts]


def unused(*_):
    raise AssertionError("this model was not to be asked")


def model(tokenizer, generate=unused, nll=unused, position_nll=unused, *, label="student", name="some/model", **fields):
    """A :class:`Model` with what a test needs of it."""
    fields = {"role": "teacher" if label == "teacher" else "student", "fingerprint": label, **fields}
    return Model(
        label=label, name=name, tokenizer=tokenizer, generate=generate, nll=nll, position_nll=position_nll, **fields
    )
