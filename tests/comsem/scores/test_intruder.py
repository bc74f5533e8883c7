import asyncio
from collections import Counter

import pytest

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.intruder import choice_fault, intruder_messages, read_choice
from bae_lens.comsem.judges.judge import Choice
from bae_lens.comsem.judges.measures import jeffreys_interval
from bae_lens.comsem.scores.intruder import count_found, intruder, intruder_puzzles


def named(names):
    return [Instance.from_marked(f"A <<{name}>>.") for name in names]


def feature(explain="abcde", held_out="fghijklm", controls="12345678"):
    return FeatureInstances(3, 0.1, 99, named(explain), named(held_out), named(controls))


def test_each_control_stands_once_among_four_that_activate_the_feature():
    puzzles = intruder_puzzles(feature(), "0 3")
    assert [shown[number].text for shown, number in puzzles] == list("12345678")
    for shown, _ in puzzles:
        assert len({instance.text for instance in shown}) == 5
        assert sum(instance.text.isdigit() for instance in shown) == 1
    assert puzzles == intruder_puzzles(feature(), "0 3") != intruder_puzzles(feature(), "1 3")


def test_every_place_is_as_likely():
    places = Counter(number for seed in range(250) for _, number in intruder_puzzles(feature(), str(seed)))
    assert sorted(places) == [0, 1, 2, 3, 4]
    assert all(330 < n < 470 for n in places.values())  # 400 each, four standard deviations on either side


@pytest.mark.parametrize("few", [{"explain": "ab", "held_out": "c"}, {"controls": ""}])
def test_without_enough_there_is_no_puzzle(few, rule_judge):
    assert intruder_puzzles(feature(**few), "") == []
    outcome = asyncio.run(intruder(rule_judge, "", feature(**few), ""))
    assert (outcome.value, outcome.interval) == (None, None)


def test_an_answer_that_cannot_be_read_is_left_out():
    choices = [Choice(0), Choice(1), Choice(None), Choice(None, failed=True)]
    assert count_found(choices, [0, 0, 2, 3]) == (1, 2)
    assert count_found([Choice(None, failed=True)], [0]) == (0, 0)


def test_share_with_jeffreys_interval():
    class Judge:
        async def find_intruder(self, instances):
            found = next(number for number, instance in enumerate(instances) if instance.text.isdigit())
            return Choice(None) if instances[found].text in "12" else Choice(found)

    outcome = asyncio.run(intruder(Judge(), "", feature(), ""))
    assert (outcome.value, outcome.unparsable) == (1, 2)
    assert outcome.interval == jeffreys_interval(6, 6)


def test_the_question_shows_marked_tokens_and_the_answer_is_one_number():
    assert "1. A <<x>>.\n2. A <<y>>." in intruder_messages(named("xy"))[1]["content"]
    assert [read_choice(text, 5) for text in ("4", " No. 4 ", "4 and 4", "0", "6", "none", "")] == [
        3,
        3,
        3,
        *[None] * 4,
    ]
    assert choice_fault("6", 5) == "no number of a case"
    assert choice_fault("5", 5) is None
