"""Wordings of retrieval samples to train with: the paper's, many of our own ("varied", and "composed" of more parts), and one
for validation ("selection").

No varied, composed or selection template has a distinctive phrase of an evaluation prompt (Landmark's, RULER's, BABILong's): those
stay unseen, and ``tests/data/test_held_apart.py`` checks it. The paper's training wording has some of them by the
paper's design (``The pass key is``, ``special magic``, ``I will quiz you``). "selection" shares no template with "varied" and is
neither trained on nor reported: it chooses checkpoints.

"composed" has the templates of "varied" and puts them together more freely: what is hidden has a name of two parts, a needle is
stated again in other words or followed by a reminder, any question goes with any lead of an answer or is left out, and filler is
drawn sentence by sentence. So hardly a sample repeats the frame of another.

Templates are filled with ``{what}`` (what is hidden: "access code"), ``{name}`` (whose: "amber-falcon") and ``{value}``.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wording:
    """Templates that are drawn independently. ``questions`` are (question, lead of the answer); the answer follows the
    lead after ``" "``, or directly where the lead ends in white space. ``named`` ones mention ``{name}``."""

    tasks: tuple[str, ...]
    needles: tuple[str, ...]
    named_needles: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    named_questions: tuple[tuple[str, str], ...]
    whats: dict[str, tuple[str, ...]]  # by kind of value: "digits", "word", "uuid"


VARIED = Wording(
    tasks=(
        "Somewhere in the text below there is one {what}. Read everything, then answer the question at the end.",
        "Read the passage. It mentions one {what}, and you will need it later.",
        "The following pages are mostly filler, but they contain one {what}. Keep it in mind.",
        "Below is a long text. One line of it gives a {what}; note it down.",
        "Task: look for the {what} in this document and report it when asked.",
        "A {what} was slipped into this text by the editor. Can you spot it?",
        "You are reading a long document. Only one fact in it matters: a {what}.",
        "Please go through the text carefully, because a question about a {what} follows it.",
        "Here is some text with a single useful detail, a {what}.",
        "Pay attention to any {what} that you come across while reading.",
        "Document with an inserted {what}:",
        "In this exercise a {what} is mixed into unrelated sentences. Extract it.",
        "Long reading exercise. After the text you will be asked for a {what}.",
        "The text contains noise and a {what}. Ignore the noise.",
        "Scan the material that follows and keep track of the {what}.",
        "Someone left a {what} between these lines. Your job is to recall it.",
        "Most of what follows can be skipped. The {what} cannot.",
        "Memory test: one {what}, many distractions.",
        "Context for a question about a {what}:",
        "Consider the text below as your only source. It states a {what} once.",
        "Text first, question second. The question concerns a {what}.",
        "Study this text. At some point it tells you a {what}.",
        "Search problem: where in the text is the {what}, and what does it say?",
        "The archive below was searched for a {what}. There is exactly one.",
    ),
    needles=(
        "The {what} is {value}.",
        "Note: the {what} is {value}.",
        "Please write this down: the {what} is {value}.",
        "{value} is the {what}.",
        "By the way, {value} is the {what} that was asked for.",
        "We agreed on {value} as the {what}.",
        "The {what} has been set to {value}.",
        "The {what}: {value}.",
        "Here is the {what}: {value}.",
        "You should know that the {what} is {value}.",
        "The {what} reads {value}.",
        "For the record, the {what} was {value}.",
        "They chose {value} for the {what}.",
        "On the back of the card stood the {what}, {value}.",
        "Keep this {what} safe: {value}.",
        "As the {what}, use {value}.",
        "The {what} that you are looking for is {value}.",
        "It turned out that the {what} was {value}.",
        "The only valid {what} is {value}.",
        "Do not lose the {what}. It is {value}.",
        "A new {what} was issued today: {value}.",
        "The office confirmed {value} as the {what}.",
        "The {what} equals {value}.",
        "If anyone asks for the {what}, say {value}.",
    ),
    named_needles=(
        "The {what} of {name} is {value}.",
        "The {what} for {name} is {value}.",
        "For {name}, the {what} is {value}.",
        "{name} has the {what} {value}.",
        "{name}'s {what} is {value}.",
        "Note that {name} was given the {what} {value}.",
        "The {what} assigned to {name} reads {value}.",
        "{value} is the {what} of {name}.",
        "Entry {name}: {what} {value}.",
        "To reach {name}, use the {what} {value}.",
        "In the register, {name} is listed with the {what} {value}.",
        "We noted {value} as the {what} for {name}.",
        "Under {name} you will find the {what} {value}.",
        "{name} = {value} ({what}).",
        "Whoever asks about {name} gets the {what} {value}.",
        "The {what} that belongs to {name} is {value}.",
        "{name} keeps {value} as its {what}.",
        "The label on {name} shows the {what} {value}.",
        "Record for {name}. {what}: {value}.",
        "It was decided that the {what} for {name} should be {value}.",
        "Concerning {name}: its {what} is {value}.",
        "Today {name} received {value} as a {what}.",
    ),
    questions=(
        ("What is the {what}?", "The {what} is"),
        ("Which {what} did the text give?", "It gave"),
        ("Query: what was the {what}?", "Reply:"),
        ("Tell me the {what}.", "{what}:"),
        ("Now state the {what} from the text.", "The text says"),
        ("Q: {what}?", "A:"),
        ("Repeat the {what}.", "Sure, it is"),
        ("Can you recall the {what}?", "Yes, the {what} was"),
        ("What {what} appeared above?", "The {what} above was"),
        ("Fill in the blank.", "The {what} is"),
        ("Which value did the {what} have?", "Value:"),
        ("So, what is the {what}?", "It is"),
        ("Based on the text, give the {what}.", "Result:"),
        ("I forgot the {what}. What was it?", "It was"),
        ("Write only the {what}.", "\n"),
        ("Look up the {what}.", "Found:"),
        ("The {what}, please.", "Here you are:"),
        ("Finally: what did it say about the {what}?", "It said that the {what} is"),
        ("Do you remember the {what}?", "I remember:"),
        ("End of text. Required: the {what}.", "Output:"),
        ("Complete the sentence about the {what}.", "According to the document, the {what} is"),
        ("What should I enter as the {what}?", "Enter"),
    ),
    named_questions=(
        ("What is the {what} of {name}?", "The {what} of {name} is"),
        ("Which {what} belongs to {name}?", "{name} has"),
        ("Query: what was the {what} for {name}?", "Reply:"),
        ("Give the {what} of {name}.", "{name}:"),
        ("Look up {name}. What is its {what}?", "Its {what} is"),
        ("Q: {what} of {name}?", "A:"),
        ("What does the text list for {name}?", "It lists"),
        ("{name} was mentioned above. With which {what}?", "With"),
        ("Tell me {name}'s {what}.", "It is"),
        ("Which {what} would you use for {name}?", "I would use"),
        ("Find the {what} for {name}.", "Found:"),
        ("Now state the {what} of {name}.", "The text says"),
        ("I need the {what} of {name}.", "Here it is:"),
        ("Report on {name}.", "{what}:"),
        ("Can you recall the {what} of {name}?", "Yes, it was"),
        ("According to the text, what {what} has {name}?", "According to the text,"),
        ("Write only the {what} of {name}.", "\n"),
        ("Complete the entry for {name}.", "{name}, {what}"),
        ("What value goes with {name}?", "Value:"),
        ("Finish this line about {name}.", "For {name} the {what} is"),
        ("Search result for {name}?", "{what} ="),
        ("End of text. Required: {what} of {name}.", "Output:"),
    ),
    whats={
        "digits": (
            "access code",
            "locker number",
            "secret number",
            "room code",
            "PIN",
            "passkey",
            "reference number",
            "door code",
            "ticket number",
            "account number",
        ),
        "word": ("code word", "password", "secret word", "watchword", "safe word", "hidden word"),
        "uuid": ("identifier", "serial id", "device id", "session id", "record id", "token"),
    },
)

SELECTION = Wording(
    tasks=(
        "An envoy hid one {what} among these remarks; hold on to it until you reach the last line.",
        "What comes next is long and dull, apart from a certain {what}.",
        "Keep your eyes open for the {what}: later nobody will tell it to you again.",
        "Please skim the log below and bear its {what} in mind.",
    ),
    needles=(
        "Let it be known that {value} serves as the {what}.",
        "Listen closely, our {what} shall be {value}.",
        "A messenger whispered the {what}, namely {value}.",
        "Engraved on the gate one saw {value}, the {what}.",
    ),
    named_needles=(
        "Let it be known that {value} serves as the {what} at {name}.",
        "Listen closely, the {what} over at {name} shall be {value}.",
        "A messenger from {name} whispered the {what}, namely {value}.",
        "Engraved at {name} one saw {value}, the {what}.",
    ),
    questions=(
        ("Which {what} was it, then?", "Then it was"),
        ("Kindly name the {what}.", "Gladly, that would be"),
        ("How does the {what} go?", "It goes"),
        ("Time to reveal the {what}!", "Revealed:"),
    ),
    named_questions=(
        ("Which {what} was it at {name}, then?", "Then it was"),
        ("Kindly name the {what} kept at {name}.", "Gladly, that would be"),
        ("How does the {what} at {name} go?", "It goes"),
        ("Time to reveal the {what} used at {name}!", "Revealed:"),
    ),
    whats={
        "digits": ("entry number", "vault combination", "call sign"),
        "word": ("parole", "slogan", "motto"),
        "uuid": ("fingerprint", "trace handle", "batch key"),
    },
)

WORDINGS = {"varied": VARIED, "composed": VARIED, "selection": SELECTION}

WHAT_FIRST = """
secret hidden private new old main second spare temporary daily current official lucky final internal personal valid
""".split()  # noqa: SIM905
WHAT_SECOND = {
    "digits": ("number", "code", "key", "PIN", "figure", "pass code", "serial number", "ID number", "extension"),
    "word": ("word", "name", "keyword", "alias", "nickname", "code name", "label"),
    "uuid": ("identifier", "hash", "key", "code", "reference", "ID"),
}
"""What a composed sample hides, by kind of value: one of the first and one of the second."""

REMINDERS = (
    "Do not forget it.",
    "This matters later.",
    "Nothing else here matters.",
    "You may need it soon.",
    "That is all there is to know.",
    "It will not be repeated.",
    "Learn it by heart.",
    "Remember this one.",
    "Keep that in mind.",
    "Write it on your hand.",
    "Be sure to note it.",
    "Everything depends on it.",
)
"""Said after the needle of a composed sample, or before it."""

TASK_ENDINGS = (
    "You will be asked for it at the end.",
    "A question follows.",
    "Answer with the value alone.",
    "Everything else is noise.",
    "Take your time.",
    "Let us begin.",
    "The document starts here.",
    "It may stand anywhere.",
    "Do not guess.",
    "There is a test afterwards.",
)
"""Said after the task line of a composed sample."""

QUOTED = ("{value}", "{value}", "{value}", "{value}", '"{value}"', "'{value}'", "[{value}]", "({value})")
"""How a composed needle writes its value."""

FILLERS = (
    "The rain fell on the roof. The cat slept by the fire. Nobody was in a hurry. The clock went on ticking.",
    "One wave follows another. The sand is warm. Gulls cross the bay. A boat comes in and a boat goes out.",
    "The train is late again. People read their papers. A child counts the pigeons. The signal stays red.",
    "Bread is in the oven. Tea is on the table. The window is open. Someone hums an old song in the yard.",
    "Snow lies on the hills. The river is frozen. Smoke rises from the village. The day is short and still.",
    "The list goes on. This item is not important. Neither is this one. Please continue with the next line.",
    "Leaves turn in the wind. The path bends to the left. A gate stands open. Beyond it the field begins.",
    "The market opens at nine. Apples lie beside pears. A dog waits at the corner. Coins change hands all day.",
)
"""Noise of the varied and selection wordings, besides RULER's, which the paper trains with too."""

ADJECTIVES = """
amber ancient bold brisk calm clever copper crimson dusty eager early faint gentle golden hollow humble icy ivory
jolly keen lively lunar mellow misty noble northern olive pale patient quiet rapid rustic scarlet silent silver
solar steady stone swift tidy velvet violet wild winter
""".split()  # noqa: SIM905
NOUNS = """
anchor badger beacon bridge canyon castle cedar comet cottage cricket dolphin ember falcon feather forest garden
glacier harbor heron island jasmine kettle lantern maple meadow meteor mirror otter pebble pepper pilot quartz
raven river saddle sparrow spruce station thistle tiger tunnel valley walnut willow
""".split()  # noqa: SIM905
"""Names and code words of the varied and selection wordings."""
