"""Generated sentences for the bundled model's training text: indirect objects, and people in other sentences.

Sentences with an indirect object use training names and training templates alone. The other sentences use all
names: from them the model learns that the held-out ones are names too, and that a name that was read comes again.
"""

import random
from collections.abc import Sequence

from moe_lens.indirect_object import HELD_OUT_NAMES, TRAIN_NAMES, indirect_object_prompts

_THINGS = (
    "tea",
    "music",
    "cats",
    "books",
    "trains",
    "bread",
    "maps",
    "snow",
    "games",
    "flowers",
    "coffee",
    "tennis",
)
_JOBS = ("teacher", "doctor", "writer", "farmer", "singer", "driver", "painter", "student", "nurse", "cook")
_TOWNS = ("Paris", "London", "Rome", "Boston", "Berlin", "Madrid", "Chicago", "Dublin")

_OTHER_TEMPLATES = (
    "My friend {a} is a {job}. Every morning {a} reads about {thing}.",
    "There lives a {job} in {town}. The {job} is called {a}. We think that {a} likes {thing}.",
    "The {job} {a} and the {job2} {b} are friends. Of the two, {a} likes {thing} and {b} likes {thing2}.",
    "In {town} people know {a}, because {a} sings about {thing}.",
    "Here are {a}, {b} and {c}. It is said that {a} was born in {town}, {b} in {town2} and {c} in {town3}.",
    "I saw {a} in {town}. Is {a} a {job}? No, {a} is a {job2}.",
    "Ask {a} about {thing} and ask {b} about {thing2}: nobody but {a} knows {thing}, nobody but {b} {thing2}.",
    "Names on the list: {a}, {b}, {c}, {d}. Again: {a}, {b}, {c}, {d}.",
    "A letter from {town} says that {a} is well. Yours, {a}.",
    "The {job} spoke of {thing}. This {job} was {a}, and {a} came from {town}.",
    "Who is the {job}? It is {a}. Who is the {job2}? It is {b}. So {a} is the {job} and {b} is the {job2}.",
    "Once upon a time a {job} named {a} lived near {town}. One day {a} learned about {thing}.",
)


def indirect_object_sentences(count: int, seed: int) -> list[str]:
    """Complete indirect-object sentences of training names in training templates, as in "... to Mary."."""
    prompts = indirect_object_prompts(count, names="train", templates="train", seed=seed)
    return [f"{prompt.text}{prompt.indirect_object}." for prompt in prompts]


def name_sentences(count: int, seed: int, names: Sequence[str] = TRAIN_NAMES + HELD_OUT_NAMES) -> list[str]:
    """Sentences about people without an indirect object, of all names."""
    generator = random.Random(seed)
    sentences = []
    for _ in range(count):
        people = generator.sample(names, 4)
        things = generator.sample(_THINGS, 2)
        jobs = generator.sample(_JOBS, 2)
        towns = generator.sample(_TOWNS, 3)
        fields = dict(zip("abcd", people, strict=True))
        fields |= {"thing": things[0], "thing2": things[1], "job": jobs[0], "job2": jobs[1]}
        fields |= {"town": towns[0], "town2": towns[1], "town3": towns[2]}
        sentences.append(generator.choice(_OTHER_TEMPLATES).format(**fields))
    return sentences
