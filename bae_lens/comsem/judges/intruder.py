"""The odd one out among marked tokens: the question, and how the answer is read.

After intruder detection in "Evaluating SAE interpretability without generating explanations" (arXiv 2507.08473), in our
own words.
"""

import re

from bae_lens.comsem.collect.instances import Instance

FINDER = (
    "You are shown numbered sentences, in each of which one token stands between << and >>. A token is a word or "
    "a part of one. All marked tokens but one have something in common: what they mean there, their grammar, their "
    "form, or what stands around them. Find the one that has not. Answer with its number and nothing else."
)
NUMBER = re.compile(r"[0-9]+", re.ASCII)


def intruder_messages(instances: list[Instance]) -> list[dict[str, str]]:
    """Asks which of the marked tokens is unlike the others."""
    cases = "\n".join(f"{number}. {instance.marked}" for number, instance in enumerate(instances, 1))
    question = "Which number has not what the others have in common?"
    return [{"role": "system", "content": FINDER}, {"role": "user", "content": f"{cases}\n\n{question}"}]


def read_choice(text: str, n: int) -> int | None:
    """Which of n cases an answer names, from 0; None if it is none, or not only one.

    >>> read_choice("Number 3.", 5), read_choice("2 or 3", 5), read_choice("6", 5)
    (2, None, None)
    """
    named = {int(number) for number in NUMBER.findall(text)}
    return named.pop() - 1 if len(named) == 1 and named <= set(range(1, n + 1)) else None


def choice_fault(text: str, n: int) -> str | None:
    """Why no case can be read from an answer; None if it can."""
    return "no number of a case" if read_choice(text, n) is None else None
