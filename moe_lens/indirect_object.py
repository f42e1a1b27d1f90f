"""Indirect-object sentences: prompts whose next token a known kind of circuit decides.

In "When Mary and John went to the store, John gave a drink to" the next token is " Mary": of the two names, the
one that is not repeated. The task is that of Wang et al. 2023, "Interpretability in the Wild: a Circuit for
Indirect Object Identification in GPT-2 Small" (arXiv:2211.00593). A = indirect object, B = subject; the order of
the names is ABBA when the indirect object is named first and BABA when the subject is.

Names and templates are divided into a training part and a held-out part. The bundled model was trained on
sentences made of training names in training templates alone. Held-out names occur in its training text, in
sentences of another kind, so that the model knows them as names; held-out templates occur nowhere.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "heldout", "all"]
Order = Literal["ABBA", "BABA"]

TRAIN_NAMES: tuple[str, ...] = tuple(
    [
        "Mary",
        "John",
        "James",
        "Robert",
        "Michael",
        "David",
        "William",
        "Richard",
        "Joseph",
        "Thomas",
        "Daniel",
        "Matthew",
        "Mark",
        "Paul",
        "Steven",
        "Andrew",
        "George",
        "Kevin",
        "Brian",
        "Edward",
        "Jason",
        "Ryan",
        "Jacob",
        "Gary",
        "Eric",
        "Adam",
        "Peter",
        "Henry",
        "Carl",
        "Arthur",
        "Roger",
        "Keith",
        "Jeremy",
        "Terry",
        "Sean",
        "Albert",
        "Jesse",
        "Louis",
        "Billy",
        "Bruce",
        "Philip",
        "Harry",
        "Vincent",
        "Bobby",
        "Johnny",
        "Linda",
        "Susan",
        "Karen",
        "Lisa",
        "Nancy",
        "Betty",
        "Sandra",
        "Ashley",
        "Kim",
        "Emily",
        "Donna",
        "Michelle",
        "Carol",
        "Amanda",
        "Melissa",
        "Laura",
        "Amy",
        "Angela",
        "Anna",
        "Ruth",
        "Brenda",
        "Nicole",
        "Helen",
        "Samantha",
        "Rachel",
        "Carolyn",
        "Janet",
        "Maria",
        "Heather",
        "Diane",
        "Julie",
        "Joyce",
        "Kelly",
        "Joan",
        "Lauren",
        "Judith",
        "Olivia",
        "Martha",
        "Alice",
        "Jean",
        "Denise",
        "Amber",
        "Marilyn",
        "Sara",
        "Grace",
        "Rose",
        "Theresa",
        "Diana",
        "Julia",
        "Jane",
        "Lori",
        "Kathy",
        "Tina",
        "Sophie",
        "Clara",
        "Oscar",
        "Leo",
        "Hugo",
    ]
)
"""Names in indirect-object sentences of the bundled model's training text."""

HELD_OUT_NAMES: tuple[str, ...] = tuple(
    [
        "Simon",
        "Frank",
        "Jack",
        "Patrick",
        "Walter",
        "Ralph",
        "Roy",
        "Eugene",
        "Russell",
        "Wayne",
        "Victor",
        "Martin",
        "Sarah",
        "Margaret",
        "Emma",
        "Alan",
        "Rebecca",
        "Cynthia",
        "Virginia",
        "Hannah",
        "Gloria",
        "Teresa",
        "Megan",
        "Lucy",
    ]
)
"""Names that the bundled model's training text never has in an indirect-object sentence."""

_PLACES = (
    "store", "park", "school", "office", "market", "library", "station", "garden", "beach", "restaurant",
    "hospital", "museum", "kitchen", "theater", "river", "farm",
)  # fmt: skip
_OBJECTS = (
    "drink", "book", "ring", "letter", "ball", "cake", "key", "ticket", "present", "bag", "picture", "cup",
    "flower", "map", "box", "coat",
)  # fmt: skip

# {first} and {second} are the two names in the order of their first mention, {subject} the repeated one.
_SUBORDINATE_OPENINGS = (
    "When {first} and {second} got to the {place}",
    "After {first} and {second} left the {place}",
    "As {first} and {second} were leaving the {place}",
    "Once {first} and {second} had found the {place}",
    "The day that {first} and {second} opened the {place}",
    "Although {first} did not like {second} at the {place}",
    "Just before the {place} opened for {first} and {second}",
    "If {first} and {second} ever come to the {place}",
)
_SUBORDINATE_ENDINGS = (
    ", {subject} gave a {object} to",
    ", {subject} gave the {object} to",
    ", {subject} handed the {object} to",
    ", {subject} offered a {object} to",
    ", {subject} showed the {object} to",
    ", {subject} will sell a {object} to",
    ", {subject} could lend the {object} to",
    ", {subject} took a {object} and passed it to",
)
_MAIN_OPENINGS = (
    "One evening {first} and {second} walked past the {place}",
    "At noon {first} met {second} in front of the {place}",
    "During a visit to the {place}, {first} spoke with {second}",
    "Near the old {place}, {first} ran into {second}",
    "This morning {first} called {second} from the {place}",
    "Last summer {first} and {second} worked at the {place}",
    "Every week {first} and {second} cleaned the {place}",
    "Tired of the {place}, {first} and {second} went home",
    "On Sunday {first} took {second} to the {place}",
    "For an hour {first} and {second} sat in the {place}",
    "Outside the {place} it was cold, and {first} waited with {second}",
    "At the new {place}, {first} and {second} looked around",
    "With a {object}, {first} and {second} were at the {place}",
)
_MAIN_ENDINGS = (
    ", and {subject} gave a {object} to",
    ", and {subject} handed the {object} to",
    ". Then {subject} gave the {object} to",
    ". Then {subject} passed a {object} to",
    ". There {subject} offered the {object} to",
    ", and then {subject} passed a {object} to",
    ". Later {subject} showed a {object} to",
    ", so {subject} brought the {object} to",
    ". In the end {subject} sold a {object} to",
    ", but {subject} sent the {object} to",
    ". After a while {subject} lent a {object} to",
    ", where {subject} returned the {object} to",
    ". Soon {subject} threw the {object} to",
    ". Of course {subject} had a {object} and gave it to",
)
_WHOLE_SENTENCES = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to",
    "Then, {first} and {second} went to the {place}. After that, {subject} gave a {object} to",
    "After {first} and {second} had lunch at the {place}, {subject} handed a {object} to",
    "While {first} and {second} were working at the {place}, {subject} gave the {object} to",
    "Yesterday {first} and {second} met at the {place}, and {subject} showed a {object} to",
    "Once {first} met {second} at the {place}. There {subject} sold the {object} to",
    "The friends {first} and {second} walked to the {place}. On the way {subject} offered a {object} to",
    "When {first} saw {second} at the {place}, {subject} brought a {object} to",
    "At the {place}, {first} sat beside {second}. Later {subject} passed the {object} to",
    "In the morning {first} and {second} drove to the {place}, where {subject} sent a {object} to",
    "Because {first} and {second} were late for the {place}, {subject} lent a {object} to",
    "Last week {first} visited {second} near the {place}. In the end {subject} returned the {object} to",
    "It was raining when {first} and {second} left the {place}, so {subject} gave a {object} to",
    "Before {first} and {second} closed the {place}, {subject} promised a {object} to",
    "There was a party at the {place} for {first} and {second}, and then {subject} handed the {object} to",
    "As soon as {first} and {second} came back from the {place}, {subject} showed the {object} to",
    "On Monday {first} was with {second} at the {place}. That evening {subject} wrote about a {object} to",
    "Both {first} and {second} liked the {place}. One day {subject} brought the {object} to",
    "Since {first} and {second} wanted to see the {place}, {subject} offered the {object} to",
    "Every day {first} waited for {second} at the {place}, until {subject} gave a {object} to",
    "This time {first} and {second} stayed at the {place}, but {subject} mailed a {object} to",
    "After a long day at the {place}, {first} talked to {second}. Then {subject} passed a {object} to",
    "While {first} and {second} were at the {place}, {subject} found a {object} and gave it to",
    "When {first} and {second} found a {object} at the {place}, {subject} gave it to",
)
TRAIN_TEMPLATES: tuple[str, ...] = (
    *_WHOLE_SENTENCES,
    *(opening + ending for opening in _SUBORDINATE_OPENINGS for ending in _SUBORDINATE_ENDINGS),
    *(opening + ending for opening in _MAIN_OPENINGS for ending in _MAIN_ENDINGS),
)
"""Sentences with an indirect object, up to it, in the bundled model's training text."""

HELD_OUT_TEMPLATES: tuple[str, ...] = (
    "Afterwards {first} and {second} went to the {place}, and {subject} gave the {object} to",
    "While {first} was talking with {second} near the {place}, {subject} handed a {object} to",
    "On the way to the {place}, {first} met {second}. Then {subject} offered a {object} to",
    "In the evening {first} and {second} came to the {place}. There {subject} showed the {object} to",
    "When the {place} was closed, {first} and {second} went back, and {subject} passed the {object} to",
    "Today {first} and {second} had a {object} at the {place}, but {subject} gave it to",
)
"""Sentences with an indirect object that occur nowhere in the bundled model's training text."""


@dataclass(frozen=True)
class IndirectObjectPrompt:
    """One prompt and its two candidates for the next token.

    Attributes:
        text: The sentence up to its indirect object, without a space at its end.
        indirect_object: The right next token, a name with its leading space.
        subject: The wrong one: the repeated name, with its leading space.
        order: ABBA when the indirect object is named first, BABA when the subject is.
        template: The template that the sentence was made from.
    """

    text: str
    indirect_object: str
    subject: str
    order: Order
    template: str


def _part(part: str, train: tuple[str, ...], held_out: tuple[str, ...], what: str) -> tuple[str, ...]:
    parts = {"train": train, "heldout": held_out, "all": train + held_out}
    if part not in parts:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, parts))}, not {part!r}")
    return parts[part]


def indirect_object_prompts(
    n: int,
    *,
    names: Part = "heldout",
    templates: Part | Sequence[str] = "heldout",
    seed: int = 0,
) -> list[IndirectObjectPrompt]:
    """Generate indirect-object prompts, half of them ABBA and half BABA.

    Args:
        n: How many. Prompts are drawn independently, so that equal ones may occur among many.
        names: Which names: those of the bundled model's training sentences, held-out ones, or all.
        templates: Which templates, likewise; or templates of your own, with the fields `{first}`, `{second}`
            and `{subject}`, and `{place}` and `{object}` where they are wanted.
        seed: The same seed gives the same prompts.

    Returns:
        The prompts: ABBA at even places and BABA at odd ones.

    Raises:
        ValueError: `n` is negative, a part is unknown, or a template lacks one of the three name fields.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, and is {n}")
    candidates = _part(names, TRAIN_NAMES, HELD_OUT_NAMES, "names")
    if isinstance(templates, str):
        chosen = _part(templates, TRAIN_TEMPLATES, HELD_OUT_TEMPLATES, "templates")
    else:
        chosen = tuple(templates)
        if not chosen:
            raise ValueError("templates is empty")
        for template in chosen:
            missing = [field for field in ("{first}", "{second}", "{subject}") if field not in template]
            if missing:
                raise ValueError(f"the template {template!r} lacks {', '.join(missing)}")
    generator = random.Random(seed)
    prompts = []
    for index in range(n):
        order: Order = "BABA" if index % 2 else "ABBA"
        indirect_object, subject = generator.sample(candidates, 2)
        first, second = (indirect_object, subject) if order == "ABBA" else (subject, indirect_object)
        template = generator.choice(chosen)
        text = template.format(
            first=first,
            second=second,
            subject=subject,
            place=generator.choice(_PLACES),
            object=generator.choice(_OBJECTS),
        )
        prompts.append(IndirectObjectPrompt(text, f" {indirect_object}", f" {subject}", order, template))
    return prompts


def corrupted_prompts(
    prompts: Sequence[IndirectObjectPrompt], *, names: Part = "heldout", seed: int = 0
) -> list[str]:
    """The same sentences about three other people: every mention of a name becomes a name of its own.

    "When Mary and John went to the store, John gave a drink to" becomes "When Simon and Frank went to the store, Jack
    gave a drink to". Nobody is repeated, so nothing says who receives; all else is as it was. It is the distribution
    pABC of Wang et al. 2023, section 3.

    Args:
        prompts: from `indirect_object_prompts`.
        names: which names are drawn from, as there; neither of the prompt's own names is taken.
        seed: The same seed gives the same prompts.

    Raises:
        ValueError: an unknown part; a prompt that does not hold its names three times.
    """
    candidates = _part(names, TRAIN_NAMES, HELD_OUT_NAMES, "names")
    generator = random.Random(seed)
    texts = []
    for prompt in prompts:
        own = [prompt.indirect_object.strip(), prompt.subject.strip()]
        pieces = re.split(rf"\b(?:{'|'.join(map(re.escape, own))})\b", prompt.text)
        if len(pieces) != 4:
            raise ValueError(
                f"{prompt.text!r} mentions {' and '.join(own)} {len(pieces) - 1} times, not three times"
            )
        others = generator.sample([name for name in candidates if name not in own], 3)
        texts.append("".join(piece + name for piece, name in zip(pieces, [*others, ""], strict=True)))
    return texts
