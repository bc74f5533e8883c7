import math

import pytest

from bae_lens.comsem.collect.instances import Excerpt
from bae_lens.comsem.judges.simulation import expectation, expected_activations, simulation_fault, simulation_messages


def token(text, **alternatives):
    """Of an answer, with the probabilities of what else might have stood there; names begin with a letter."""
    return {
        "token": text,
        "top_logprobs": [{"token": other[1:], "logprob": math.log(p)} for other, p in alternatives.items()],
    }


def test_the_expectation_is_renormalized():
    # (8 * 0.6 + 2 * 0.2) / 0.8 = 6.5, by hand; the rest of the probability is on what is no number
    assert expectation([(8.0, math.log(0.6)), (2.0, math.log(0.2))]) == pytest.approx(6.5)
    assert expectation([(3.0, -800.0)]) == 3.0


def test_each_number_at_the_end_of_a_line_is_read():
    answer = [
        token("1865"),
        token("\t"),
        token("7", _7=0.5, _3=0.5),
        token("\n"),
        token("war\t"),
        token("0", _0=0.9, _5=0.1, _x=0.0001),
    ]
    assert expected_activations(answer) == [pytest.approx(5), pytest.approx(0.5)]


def test_a_ten_may_be_one_token_or_two():
    whole = [token("a\t"), token("10", _10=0.5, _0=0.5)]
    assert expected_activations(whole) == [pytest.approx(5)]
    split = [token("a\t"), token("1", _1=0.5, _4=0.5), token("0", _0=1.0), token("\nb\t"), token("1", _1=0.5, _3=0.5)]
    assert expected_activations(split) == [pytest.approx(7), pytest.approx(2)]


def test_a_number_without_alternatives_is_no_expectation():
    known = [token("a"), token("\t"), token("9", _9=1.0)]
    assert expected_activations(known) == [9]
    assert expected_activations([*known, token("\nb"), token("\t9")]) == []
    assert expected_activations([token("a"), token("\t"), token("9", _yes=0.5)]) == []
    assert expected_activations([token("nothing to read, 9 times\t11\n")]) == []


def test_what_is_missing_in_an_answer_is_named():
    assert simulation_fault("a\t0\nb\t10", 2) is None
    assert simulation_fault("a 0\r\nb 10 \n", 2) is None
    assert simulation_fault("a\t0", 2) == "not a number for each token"
    assert simulation_fault("0\n10", 2) == "no numbers"


def test_every_token_is_a_line_of_its_own():
    excerpt = Excerpt("a\n\tb", [(0, 1), (1, 2), (2, 3), (3, 4)], [0.0] * 4)
    lines = simulation_messages("letters", excerpt)[-1]["content"].partition("The lines:\n")[2].split("\n")
    assert lines == ["a", "\\n", "\\t", "b"]
    space = Excerpt("a  ", [(0, 1), (1, 3)], [0.0, 0.0])
    assert simulation_messages("letters", space)[-1]["content"].endswith("a\n(space)")
