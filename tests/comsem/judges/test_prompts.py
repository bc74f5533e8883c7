import json
import math

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.prompts import (
    explain_messages,
    read_single,
    read_structured,
    single_messages,
    structured_messages,
    verdict_schema,
    yes_probabilities,
)

CAT = Instance("the cat saw a cat", (4, 7), [(4, 7), (14, 17)])


def test_questions_show_what_they_ask_about():
    shown = {
        question: structured_messages("animals", [CAT], question)[1]["content"]
        for question in ("marked token", "passage", "highlights")
    }
    assert "1. the <<cat>> saw a cat\n" in shown["marked token"]
    assert "1. the cat saw a cat\n" in shown["passage"]
    assert "1. the <<cat>> saw a <<cat>>\n" in shown["highlights"]
    assert all('Description: "animals"' in text for text in shown.values())
    single = single_messages("animals", CAT)[1]["content"]
    assert 'Token: "cat"\nSentence: "the cat saw a cat"\nDescription: "animals"' in single
    assert "<<" not in single + explain_messages([CAT], marked=False)[1]["content"]
    assert "1. the <<cat>> saw a cat\n" in explain_messages([CAT], marked=True)[1]["content"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", True),
        (" yes\n", True),
        ("NO", False),
        ("Yes.", None),
        ("yes, it does", None),
        ("", None),
        ("maybe", None),
    ],
)
def test_only_exactly_yes_counts(text, answer):
    assert read_single(text) is answer


def test_structured_answers_are_read_one_by_one():
    assert read_structured('{"1": "yes", "2": "no", "4": "perhaps"}', 4) == [True, False, None, None]
    assert read_structured('{"1": "yes", "2": "n', 2) == [None, None]
    assert read_structured('["yes"]', 1) == [None]


def test_schema_asks_for_each_verdict():
    schema = verdict_schema(3)["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == ["1", "2", "3"]
    assert json.dumps(schema)


def logprobs(token, **alternatives):
    return {"token": token, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in alternatives.items()]}


def test_yes_probability_of_a_single_answer_is_yes_against_no():
    first = logprobs("Yes", Yes=0.5, No=0.2, yes=0.1, Maybe=0.2)
    assert yes_probabilities([first, logprobs("!")], structured=False) == [pytest.approx(0.6 / 0.8)]
    assert yes_probabilities([logprobs("Perhaps", Yes=0.5)], structured=False) == []


def test_yes_probabilities_of_a_structured_answer_are_found_at_its_verdicts():
    tokens = [
        logprobs('{"'), logprobs("1"), logprobs('":'), logprobs(' "'), logprobs("yes", yes=0.9, no=0.1), logprobs('",'),
        logprobs(' "'), logprobs("2"), logprobs('":"'), logprobs("n", n=0.6, y=0.2), logprobs("o"), logprobs('"}'),
    ]  # fmt: skip
    assert yes_probabilities(tokens, structured=True) == [pytest.approx(0.9), pytest.approx(0.25)]
