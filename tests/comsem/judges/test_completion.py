import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bae_lens.comsem.judges.completion import read_completion, read_json, without_reasoning
from bae_lens.comsem.judges.prompts import yes_probabilities


def completion(**choice):
    return json.dumps({"choices": [{"message": {"content": "Yes"}, "finish_reason": "stop", **choice}]}).encode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Yes"}, "Yes"),
        ({"content": "Yes", "reasoning_content": "No?", "tool_calls": None, "role": None}, "Yes"),
        ({"content": None, "reasoning_content": "Yes"}, ""),
        ({"content": None, "reasoning": "Yes"}, ""),
        ({}, ""),
        ({"content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s"}]}, "Yes"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "No"}]}, {"text": "Yes"}]}, "Yes"),
        ({"content": [{"type": "reasoning", "text": "No"}, {"type": "output_text", "text": "Yes"}, None, 3]}, "Yes"),
        ({"content": {"text": "Yes"}}, ""),
        ({"content": 3}, ""),
        ({"content": "half \ud83d, whole \U0001f600"}, "half \ufffd, whole \U0001f600"),
        ("Yes", "Yes"),
        (None, None),
        ([], None),
        (True, None),
    ],
)
def test_text_of_a_message_in_any_shape(message, text):
    assert read_completion(completion(message=message)).text == text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"3",
        b"[]",
        b"<html>busy</html>",
        b"\xff\xfe\x00",
        b'{"choices": null}',
        b'{"choices": {}}',
        b'{"choices": []}',
        b'{"choices": [null, 3]}',
        b'{"choices": [{}]}',
        b'{"choices": "Yes"}',
        b"[" * 200_000,
        b'{"choices": ' + b"[" * 200_000,
        b'{"choices": [{"message": {"content": ' + b"9" * 5000 + b"}}]}",
    ],
)
def test_a_body_that_is_no_completion_has_no_text(body):
    assert read_completion(body).text is None


def test_a_complaint_in_the_place_of_an_answer_is_told():
    assert read_completion(b'{"error": {"message": "no credit", "code": 402}}').complaint == "no credit"
    assert read_completion(b'{"error": "busy"}').complaint == "busy"
    assert read_completion(b'{"error": 3}').complaint == ""


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 10**400, "completion_tokens": 1}, (None, None)),
        ({"prompt_tokens": 1, "completion_tokens": -(10**400)}, (None, None)),
        ({"prompt_tokens": 1e308, "completion_tokens": 1}, (None, None)),
        ({"prompt_tokens": 10, "completion_tokens": 2}, (10, 2)),
        ({"prompt_tokens": 10.0, "completion_tokens": 0}, (10, 0)),
        ({"prompt_tokens": 10}, (10, None)),
        ({"prompt_tokens": -10, "completion_tokens": 2}, (None, None)),
        ({"prompt_tokens": float("nan"), "completion_tokens": 2}, (None, None)),
        ({"prompt_tokens": float("inf"), "completion_tokens": 2}, (None, None)),
        ({"prompt_tokens": "10", "completion_tokens": 2}, (None, None)),
        ({"prompt_tokens": True, "completion_tokens": 2}, (None, None)),
        (None, (None, None)),
        (3, (None, None)),
        ([10, 2], (None, None)),
    ],
)
def test_usage_is_believed_where_both_numbers_can_be(usage, counts):
    body = read_completion(json.dumps({"choices": [], "usage": usage}).encode())
    assert (body.input_tokens, body.output_tokens) == counts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "Yes"),
        ("<think>\nIs it? No.\n</think>\n\nYes", "Yes"),
        ("Is it? No.\n</think>\nYes", "Yes"),
        ("<think>a</think> b <think>c</think> Yes", "Yes"),
        ("<think>Is it? No", ""),
        ("[THINK]No[/THINK]Yes", "Yes"),
        ("<reasoning>No</reasoning>Yes", "Yes"),
        ("<|channel|>analysis<|message|>No<|end|><|channel|>final<|message|>Yes<|return|>", "Yes"),
        ("a token such as <b>", "a token such as <b>"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert without_reasoning(text) == answer


def test_probabilities_are_not_read_from_reasoning():
    logprobs = {"content": [{"token": "No", "top_logprobs": [{"token": "No", "logprob": 0.0}]}]}
    assert read_completion(completion(logprobs=logprobs)).logprobs
    thinking = completion(message={"content": "<think>No</think>Yes"}, logprobs=logprobs)
    assert read_completion(thinking).logprobs == []


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        3,
        [],
        {"content": None},
        {"content": {}},
        {"content": [None, 3, {}, {"token": None}]},
        {"content": [{"token": "Yes", "top_logprobs": None}]},
        {"content": [{"token": "Yes", "top_logprobs": [None, {}, {"token": "Yes"}, {"token": 3, "logprob": -1}]}]},
        {"content": [{"token": "Yes", "top_logprobs": [{"token": "Yes", "logprob": x} for x in (None, "0", 1e6)]}]},
        {"content": [{"token": "Yes", "top_logprobs": [{"token": "No", "logprob": float("nan")}]}]},
        {"content": [{"token": "Yes", "top_logprobs": [{"token": "No", "logprob": -(10**400)}]}]},
    ],
)
def test_log_probabilities_of_any_shape_give_probabilities_or_none(logprobs):
    found = yes_probabilities(read_completion(completion(logprobs=logprobs)).logprobs, structured=False)
    assert found in ([], [1.0])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.sampled_from(["content", "message", "text", "token"]), values),
    max_leaves=8,
)
FIELDS = ["choices", "usage", "error", "message", "content", "finish_reason", "logprobs", "top_logprobs", "refusal"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES), st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_no_values_in_any_field_raise(body, choice):
    for content in (body, {**body, "choices": [choice]}):
        read = read_completion(json.dumps(content).encode())
        assert read.text is None or read.text.encode() is not None
        assert all(0 <= p <= 1 for p in yes_probabilities(read.logprobs, structured=False))


def test_json_that_python_does_not_read_is_none():
    assert [read_json(text) for text in ("[" * 200_000, "9" * 5000, "{", '{"1": "yes"}')] == [None] * 3 + [{"1": "yes"}]
