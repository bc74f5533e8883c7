"""Numbers for the tokens of an excerpt, asked all at once: the question, and how log-probabilities are read.

After the simulator of Bills et al. 2023, "Language models can explain neurons in language models", in our own words.
They read the probabilities of every number from a prompt that holds none; a chat server gives them only for what it
says itself, so that here a number may depend on those before it.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from bae_lens.comsem.collect.instances import Excerpt

LARGEST = 10  # activation; the smallest is 0
NUMBER = re.compile(r"10|[0-9]", re.ASCII)
LAST_NUMBER = re.compile(r"[^ \t\r\n][ \t]+(10|[0-9])[ \t\r]*$", re.ASCII | re.MULTILINE)  # of a line that says more
WHITE_SPACE = "(space)"  # in the place of a token that shows nothing

SIMULATOR = (
    "You predict how strongly a feature of a language model fires on tokens. A token is a word or a part of one. You "
    "are told in a few words what the feature fires on, and shown the tokens of a text in order, one a line. Take what "
    "you are told literally. Repeat each line, followed by a tab and a whole number from 0 (the feature does not fire) "
    "to 10 (it fires most strongly), and nothing else. On most tokens a feature does not fire."
)
QUESTION = 'The feature fires on: "{}"\n\nThe lines:\n{}'
EXAMPLE = [
    {"role": "user", "content": QUESTION.format("kinds of wet weather", "After\nthe\nrain\nwe\nran")},
    {"role": "assistant", "content": "After\t0\nthe\t0\nrain\t10\nwe\t0\nran\t0"},
]


def simulation_messages(explanation: str, excerpt: Excerpt) -> list[dict[str, str]]:
    """Asks for a number for each token, after an example."""
    shown = [json.dumps(token, ensure_ascii=False)[1:-1] for token in excerpt.token_texts]  # a line end as two letters
    lines = "\n".join(token if token.strip() else WHITE_SPACE for token in shown)
    asked = {"role": "user", "content": QUESTION.format(explanation, lines)}
    return [{"role": "system", "content": SIMULATOR}, *EXAMPLE, asked]


def simulation_fault(text: str, n: int) -> str | None:
    """Why an answer has not one number for each of n tokens; None if it has."""
    found = len(LAST_NUMBER.findall(text))
    return None if found == n else "no numbers" if found == 0 else "not a number for each token"


def expected_activations(tokens: Sequence[dict[str, Any]]) -> list[float]:
    r"""The expectation of each number that ends a line, from the log-probabilities of an answer's tokens.

    Empty if any of them has none.

    A vocabulary may have no 10 but a 1 and a 0: the probability of the 1 then counts for what the answer makes of it.

    >>> line = [{"token": "rain", "top_logprobs": []}, {"token": "\t", "top_logprobs": []}]
    >>> probabilities = [{"token": "8", "logprob": math.log(3 / 4)}, {"token": "4", "logprob": math.log(1 / 4)}]
    >>> number = {"token": "8", "top_logprobs": probabilities}
    >>> [round(value, 3) for value in expected_activations([*line, number])]
    [7.0]
    """
    ends = list(accumulate(len(token["token"]) for token in tokens))
    values = []
    for match in LAST_NUMBER.finditer("".join(token["token"] for token in tokens)):
        place = next(number for number, end in enumerate(ends) if end > match.start(1))
        is_split = match[1] == "10" and tokens[place]["token"].strip() == "1"
        alternatives = [
            (10.0 if is_split and text == "1" else float(text), other["logprob"])
            for other in tokens[place]["top_logprobs"]
            if NUMBER.fullmatch(text := other["token"].strip())
        ]
        if not alternatives:
            return []
        values.append(expectation(alternatives))
    return values


def expectation(logprobs: Sequence[tuple[float, float]]) -> float:
    """Of values with log-probabilities, which need not sum to 1: the sum of value times probability over that of all.

    (Bills et al. 2023, "Simulating the neuron's behavior using the explanations".)
    """
    likeliest = max(logprob for _, logprob in logprobs)
    weights = [math.exp(logprob - likeliest) for _, logprob in logprobs]
    return sum(weight * value for weight, (value, _) in zip(weights, logprobs, strict=True)) / sum(weights)
