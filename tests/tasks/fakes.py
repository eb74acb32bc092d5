"""Models under evaluation that need no weights."""

from __future__ import annotations

import re

from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.tasks.task import Model

NEEDLES = (r"The pass key is (\d+)\. Remember",)
"""What an oracle looks for in the prompts of the tasks there are."""


class Oracle:
    """Reads the answer off the prompt, as a perfect model would; with a reach, only from that many last tokens."""

    def __init__(self, tokenizer, reach=None):
        self.tokenizer, self.reach, self.calls = tokenizer, reach, []

    def __call__(self, prompts, max_new_tokens):
        self.calls.append((len(prompts), max_new_tokens, {len(prompt) for prompt in prompts}))
        outputs = []
        for prompt in prompts:
            text = decode(self.tokenizer, prompt if self.reach is None else prompt[-self.reach :])
            found = next((match for needle in NEEDLES if (match := re.search(needle, text))), None)
            answer = found.group(1) if found else "00000"
            continued = encode(self.tokenizer, decode(self.tokenizer, prompt).rstrip(" ") + f" {answer}. Yes, it is")
            start = len(encode(self.tokenizer, decode(self.tokenizer, prompt)))
            outputs.append(continued[start:][:max_new_tokens])
        return outputs


def constant(tokenizer, text=" 00000. I think."):
    """Gives the same answer whatever it is asked."""
    tokens = encode(tokenizer, text)
    return lambda prompts, max_new_tokens: [tokens[:max_new_tokens] for _ in prompts]


def unused(*_):
    raise AssertionError("this model was not to be asked")


def model(tokenizer, generate=unused, nll=unused, *, label="student", name="some/model", **fields):
    """A :class:`Model` with what a test needs of it."""
    fields = {"role": "teacher" if label == "teacher" else "student", "fingerprint": label, **fields}
    return Model(label=label, name=name, tokenizer=tokenizer, generate=generate, nll=nll, **fields)
