import json
import math
import time

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.completion import without_reasoning
from bae_lens.comsem.judges.prompts import (
    explain_messages,
    explanation_fault,
    read_explanation,
    read_single,
    read_structured,
    single_messages,
    structured_fault,
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
    assert shown["marked token"].endswith("1. the <<cat>> saw a cat")
    assert shown["passage"].endswith("1. the cat saw a cat")
    assert shown["highlights"].endswith("1. the <<cat>> saw a <<cat>>")
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


RIGHT = '{"1": "yes", "2": "no"}'


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        f"```json\n{RIGHT}\n```",
        f"Here are the verdicts:\n{RIGHT}",
        f"{RIGHT}\nAll cases were judged on their own.",
        f'At first {{"1": "no", "2": "no"}}, but in the end\n{RIGHT}',
        f'{{"verdicts": {RIGHT}}}',
        '{"1": true, "2": false}',
        '{"1": "Yes", "2": "NO ", "3": "yes"}',
        "1. yes\n2. no",
        "- **1**: Yes\n- **2**: No\n",
        "| 1 | yes |\n| 2 | no |",
        '{\n  "1": "yes",\n  "2": "no"\n}',
    ],
)
def test_right_verdicts_are_read_whatever_stands_around_them(text):
    assert read_structured(text, 2) == [True, False]
    assert structured_fault(text, 2) is None


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ('{"1": "yes", "2": null}', [True, None]),
        ('{"1": ["yes"], "2": {"answer": "no"}}', [None, None]),
        ('{"1": 1, "2": 0}', [None, None]),
        ('{"1": 1e999, "2": ' + "9" * 5000 + "}", [None, None]),
        ('{"a": "yes"}', [None, None]),
        ("{" * 1000, [None, None]),
        ('{"1": ' + "[" * 100_000 + "}", [None, None]),
        ("yes, no", [None, None]),
        ("", [None, None]),
    ],
)
def test_verdicts_that_are_missing_are_none_and_counted(text, verdicts):
    assert read_structured(text, 2) == verdicts
    assert structured_fault(text, 2) == ("no verdicts" if verdicts == [None, None] else "no verdict on some cases")


@pytest.mark.parametrize(
    "text",
    [
        "kinds of weather",
        "Kinds of weather.".lower(),
        "Sure! Here is what these tokens have in common:\n\nkinds of weather",
        "Sure! Here is what these tokens have in common: kinds of weather",
        "Sure!\nkinds of weather",
        "### Answer\nkinds of weather",
        "### kinds of weather",
        "**Answer:** kinds of weather",
        "Description: **kinds of weather**",
        "```\nkinds of weather\n```",
        "```text\nkinds of weather\n```",
        "---\n- kinds of weather",
        '{"description": "kinds of weather"}',
        '```json\n{"answer": "kinds of weather"}\n```',
        "\u201ckinds of weather\u201d",
        "kinds of weather\n\nAll of them are wet.",
    ],
)
def test_an_explanation_is_found_among_what_stands_around_it(text):
    assert read_explanation(text) == "kinds of weather"


@pytest.mark.parametrize(
    "text", ["", "```", "```\n```", "---", "...", "Sure!", "Here is what they have in common:", "{}"]
)
def test_scaffolding_alone_is_no_explanation(text):
    assert read_explanation(text) == ""
    assert explanation_fault(text) == "no explanation"


@pytest.mark.parametrize(
    "text", ["a word before a colon:", "years: 1872 and so on", "the sign # before a number", "3rd person"]
)
def test_what_looks_like_scaffolding_and_is_none_stays(text):
    assert read_explanation(text) == text


def test_answers_of_megabytes_are_read_in_no_time():
    start = time.monotonic()
    for piece in ("{", '{"1":', "sure ", "<think>", "[", "1 ", "#", "```\n", "answer "):
        text = without_reasoning(piece * 200_000)
        assert read_single(text) is None
        assert len(read_structured(text, 3)) == 3
        assert len(read_explanation(text)) <= 200
    assert time.monotonic() - start < 20


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
