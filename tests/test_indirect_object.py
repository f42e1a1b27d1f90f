"""Indirect-object prompts: the right name, both orders, and parts that stay apart."""

from collections import Counter

import pytest

from moe_lens.indirect_object import (
    HELD_OUT_NAMES,
    HELD_OUT_TEMPLATES,
    TRAIN_NAMES,
    TRAIN_TEMPLATES,
    IndirectObjectPrompt,
    corrupted_prompts,
    indirect_object_prompts,
)


def names_in(text):
    words = (word.strip(".,") for word in text.split())
    return [word for word in words if word in TRAIN_NAMES + HELD_OUT_NAMES]


def test_there_are_enough_names_and_templates_and_no_part_shares_any():
    assert len(TRAIN_NAMES) >= 100
    assert 20 <= len(HELD_OUT_NAMES) <= 30
    assert len(set(TRAIN_NAMES + HELD_OUT_NAMES)) == len(TRAIN_NAMES) + len(HELD_OUT_NAMES)
    assert len(set(TRAIN_TEMPLATES + HELD_OUT_TEMPLATES)) == len(TRAIN_TEMPLATES) + len(HELD_OUT_TEMPLATES)


@pytest.mark.parametrize("names", ["train", "heldout", "all"])
@pytest.mark.parametrize("templates", ["train", "heldout", "all"])
def test_the_repeated_name_is_the_subject_and_the_other_one_is_the_answer(names, templates):
    for prompt in indirect_object_prompts(300, names=names, templates=templates, seed=3):
        counts = Counter(names_in(prompt.text))
        assert counts == {prompt.subject.strip(): 2, prompt.indirect_object.strip(): 1}
        assert prompt.indirect_object.startswith(" ")
        assert prompt.subject.startswith(" ")
        assert not prompt.text.endswith(" ")
        assert "{" not in prompt.text


def test_the_order_says_which_name_comes_first_and_both_orders_come_equally_often():
    prompts = indirect_object_prompts(400, names="all", templates="all", seed=5)
    assert Counter(prompt.order for prompt in prompts) == {"ABBA": 200, "BABA": 200}
    for prompt in prompts:
        first = prompt.indirect_object if prompt.order == "ABBA" else prompt.subject
        assert names_in(prompt.text)[0] == first.strip()


def test_each_part_draws_from_its_own_names_and_templates():
    for prompt in indirect_object_prompts(500, names="train", templates="train", seed=1):
        assert not set(names_in(prompt.text)) & set(HELD_OUT_NAMES)
        assert prompt.template in TRAIN_TEMPLATES
    for prompt in indirect_object_prompts(500, names="heldout", templates="heldout", seed=1):
        assert set(names_in(prompt.text)) <= set(HELD_OUT_NAMES)
        assert prompt.template in HELD_OUT_TEMPLATES


def test_no_held_out_sentence_can_be_made_from_a_training_template():
    def skeleton(template):
        return template.replace("a {object}", "the {object}").split("{subject}")[0]

    held_out = {skeleton(template) for template in HELD_OUT_TEMPLATES}
    assert not held_out & {skeleton(template) for template in TRAIN_TEMPLATES}


def test_the_seed_decides_the_prompts():
    assert indirect_object_prompts(50, seed=7) == indirect_object_prompts(50, seed=7)
    assert indirect_object_prompts(50, seed=7) != indirect_object_prompts(50, seed=8)
    assert indirect_object_prompts(20, seed=7) == indirect_object_prompts(50, seed=7)[:20]


def test_own_templates_are_used():
    own = "So {first} told {second} that {subject} would call"
    prompts = indirect_object_prompts(10, templates=[own])
    assert {prompt.template for prompt in prompts} == {own}
    assert prompts[0].text.startswith("So")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "negative"),
        ({"n": 1, "names": "test"}, "names must be one of"),
        ({"n": 1, "templates": "test"}, "templates must be one of"),
        ({"n": 1, "templates": []}, "empty"),
        ({"n": 1, "templates": ["When {first} met {second},"]}, r"lacks \{subject\}"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        indirect_object_prompts(**arguments)


@pytest.mark.parametrize("names", ["train", "heldout", "all"])
def test_corrupted_prompts_are_about_three_other_people(names):
    prompts = indirect_object_prompts(300, names="all", templates="all", seed=2)
    corrupted = corrupted_prompts(prompts, names=names, seed=4)
    pool = {"train": TRAIN_NAMES, "heldout": HELD_OUT_NAMES, "all": TRAIN_NAMES + HELD_OUT_NAMES}[names]
    assert len(corrupted) == 300
    for prompt, text in zip(prompts, corrupted, strict=True):
        new = names_in(text)
        assert len(set(new)) == len(new) == 3
        assert set(new) <= set(pool)
        assert not set(new) & set(names_in(prompt.text))
        # All else is as it was.
        rest = [
            [w for w in t.split() if w.strip(".,") not in TRAIN_NAMES + HELD_OUT_NAMES]
            for t in (text, prompt.text)
        ]
        assert rest[0] == rest[1]
    assert corrupted == corrupted_prompts(prompts, names=names, seed=4)
    assert corrupted != corrupted_prompts(prompts, names=names, seed=5)


def test_a_name_within_a_word_is_no_name():
    prompt = IndirectObjectPrompt(
        "At the market Mark met Rose, and Rose gave a map to", " Mark", " Rose", "ABBA", ""
    )
    (text,) = corrupted_prompts([prompt])
    assert text.startswith("At the market ")
    assert len(names_in(text)) == 3


def test_a_prompt_that_lacks_its_names_is_not_corrupted():
    prompt = IndirectObjectPrompt("Mary met John", " Mary", " John", "ABBA", "")
    with pytest.raises(ValueError, match="'Mary met John' mentions Mary and John 2 times, not three times"):
        corrupted_prompts([prompt])
    with pytest.raises(ValueError, match="names must be one of"):
        corrupted_prompts([prompt], names="test")
