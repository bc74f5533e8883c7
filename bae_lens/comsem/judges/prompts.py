"""What language models are asked, in our own words, and how their answers are read."""

import math
import re
from collections.abc import Iterator
from typing import Any

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.completion import read_json
from bae_lens.comsem.judges.judge import Question

LONGEST_EXPLANATION = 200  # characters
WORDS_SHOWN = 8  # of a sentence, before and after what is asked about
FENCES = ("```", "~~~")
EXPLANATION_TOKENS = (15, 256)  # expected, and at most allowed: of longer answers a line is taken
FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
NUMBERED_LINE = re.compile(r"^[^\w\n]*(\d+)[^\w\n]+(yes|no)[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
HEADING = re.compile(r"#+\s")
COURTESY = re.compile(r"(?:sure|certainly|of course|okay|ok|great)\b[^:\w]*$", re.IGNORECASE)
LABEL = re.compile(
    r"(?:(?:final )?(?:answer|description|explanation|phrase)|(?:sure|certainly|of course|okay|ok|here)\b[^:]*):\s*",
    re.IGNORECASE,
)
UNKNOWN_EXPLANATION = "description number {} of the typical length of some ten words"  # in estimates

EXPLAINER = (
    "You find out what tokens of a language model have in common. A token is a word or a part of one. You are shown "
    "some tokens, each in a sentence. Look at what they mean there, at their grammar, at their form and at what stands "
    "around them, and say what all of them share, as narrowly as the examples allow. Answer with one short phrase and "
    "nothing else."
)
JUDGE = (
    "You check descriptions of tokens. A token is a word or a part of one. Take the description literally, and judge "
    "every case on its own: all cases may fit, or some, or none."
)
EXPLAIN_EXAMPLE = (
    "For example, for the tokens <<rain>>, <<storm>> and <<drizzle>> in sentences about the day outside, you would "
    "answer: kinds of wet weather."
)
SINGLE = "Does the description fit the token as it is used in the sentence? Answer with Yes or No only."
STRUCTURED: dict[Question, str] = {
    "marked token": (
        "In each numbered sentence one token stands between << and >>. Does the description fit that token as it is "
        "used there?"
    ),
    "passage": "Does anything in the numbered passage, at any place, fit the description?",
    "highlights": (
        "In each numbered sentence some tokens stand between << and >>. Does the description fit all of the tokens "
        "that are marked?"
    ),
}
FORM = 'Answer by number in JSON on one line, such as {"1":"yes","2":"no"}.'

Messages = list[dict[str, str]]


def explain_messages(examples: list[Instance], marked: bool) -> Messages:
    """Asks for what the examples have in common."""
    if marked:
        shown = [
            f"{number}. {example.shortened(WORDS_SHOWN, [example.token]).marked}"
            for number, example in enumerate(examples, 1)
        ]
        instruction = f"The tokens stand between << and >>. {EXPLAIN_EXAMPLE}\n\n"
    else:
        shown = [
            f'{number}. Token: "{example.text}" Sentence: "{example.sentence}"'
            for number, example in enumerate(examples, 1)
        ]
        instruction = ""
    question = "\n\nWhat do these tokens have in common?"
    return messages(EXPLAINER, instruction + "\n".join(shown) + question)


def single_messages(description: str, instance: Instance) -> Messages:
    """Asks about one token in its sentence (the paper's question)."""
    asked = f'Token: "{instance.text}"\nSentence: "{instance.sentence}"\nDescription: "{description}"'
    return messages(JUDGE, f"{SINGLE}\n\n{asked}")


def structured_messages(description: str, instances: list[Instance], question: Question) -> Messages:
    """Asks about all instances at once; the answer is an object as `verdict_schema` says.

    What all requests share stands first, so that a server can keep it, and of long sentences only what is near.
    """
    cases = [f"{number}. {_shown(instance, question)}" for number, instance in enumerate(instances, 1)]
    asked = f'Description: "{description}"\n\n' + "\n".join(cases)
    return messages(JUDGE, f"{STRUCTURED[question]} {FORM}\n\n{asked}")


def _shown(instance: Instance, question: Question) -> str:
    if question == "highlights":
        return instance.shortened(WORDS_SHOWN, instance.highlights).highlighted
    near = instance.shortened(WORDS_SHOWN, [instance.token])
    return near.marked if question == "marked token" else near.sentence


def verdict_schema(n: int) -> dict[str, Any]:
    """JSON schema of n numbered verdicts, as `response_format` takes it."""
    numbers = [str(number) for number in range(1, n + 1)]
    schema = {
        "type": "object",
        "properties": {number: {"type": "string", "enum": ["yes", "no"]} for number in numbers},
        "required": numbers,
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "verdicts", "strict": True, "schema": schema}}


def read_explanation(text: str) -> str:
    r"""The first line of an answer that says something, without what models put before and around it; empty if none.

    >>> read_explanation('  "kinds of weather".  ')
    'kinds of weather'
    >>> read_explanation("Sure! Here is what they share:\n\n**Answer:** kinds of weather")
    'kinds of weather'
    """
    for value in _flat_objects(text)[-1:]:
        text = next((answer for answer in value.values() if isinstance(answer, str)), text)
    lines = [line.strip().replace("**", "") for line in text.splitlines() if re.search(r"\w", line)]
    lines = [line for line in lines if not line.startswith(FENCES) and not COURTESY.match(line)]
    for number, line in enumerate(lines, 1):
        phrase = LABEL.sub("", line, count=1) if LABEL.match(line) else line
        only_introduces = number < len(lines) and (phrase.endswith(":") or HEADING.match(phrase))
        if re.search(r"\w", phrase) and not only_introduces:
            return phrase.lstrip("-*>\u2022# \t").strip(" \"'\u201c\u201d.`_")[:LONGEST_EXPLANATION]
    return ""


def read_single(text: str) -> bool | None:
    """Whether an answer is exactly yes or exactly no, capitals and marks of code aside; None for anything else.

    >>> read_single("Yes"), read_single("no"), read_single("Yes, it does")
    (True, False, None)
    """
    return {"yes": True, "no": False}.get(text.strip(" \t\r\n`*\"'").lower())


def read_structured(text: str, n: int) -> list[bool | None]:
    """N verdicts from the last JSON object in an answer, or from numbered lines; None for each that is missing."""
    numbers = [str(number) for number in range(1, n + 1)]
    found = [answers for answers in _flat_objects(text) if not answers.keys().isdisjoint(numbers)]
    answers = found[-1] if found else dict(NUMBERED_LINE.findall(text))
    return [_verdict(answers.get(number)) for number in numbers]


def _verdict(value: Any) -> bool | None:
    return value if isinstance(value, bool) else read_single(value) if isinstance(value, str) else None


def explanation_fault(text: str) -> str | None:
    """Why an explanation cannot be read; None if it can."""
    return None if read_explanation(text) else "no explanation"


def single_fault(text: str) -> str | None:
    """Why a single verdict cannot be read; None if it can."""
    return "neither yes nor no" if read_single(text) is None else None


def structured_fault(text: str, n: int) -> str | None:
    """Why not all of n verdicts can be read; None if they can."""
    missing = read_structured(text, n).count(None)
    return None if missing == 0 else "no verdicts" if missing == n else "no verdict on some cases"


def _flat_objects(text: str) -> list[dict[str, Any]]:
    """JSON objects without others in them, wherever they stand in a text."""
    values = map(read_json, FLAT_OBJECT.findall(text))
    return [value for value in values if isinstance(value, dict)]


def yes_probabilities(tokens: list[dict[str, Any]], structured: bool) -> list[float]:
    """Probability of yes against no at each verdict in an answer, from the log-probabilities of its tokens.

    `tokens` are the server's, each with `token` and `top_logprobs`. A structured answer has a verdict after each colon.
    """
    return [_yes_probability(token) for token in _verdict_tokens(tokens, structured)]


def _verdict_tokens(tokens: list[dict[str, Any]], structured: bool) -> Iterator[dict[str, Any]]:
    expected = not structured
    for token in tokens:
        text = token["token"]
        expected = expected or ":" in text
        if expected and _answer(text.rpartition(":")[2]) is not None:
            expected = False
            yield token


def _yes_probability(token: dict[str, Any]) -> float:
    mass = {True: 0.0, False: 0.0}
    for alternative in token.get("top_logprobs") or []:
        answer = _answer(alternative["token"].rpartition(":")[2])
        if answer is not None:
            mass[answer] += math.exp(alternative["logprob"])
    total = mass[True] + mass[False]
    return mass[True] / total if total > 0 else float(_answer(token["token"].rpartition(":")[2]) is True)


def _answer(token: str) -> bool | None:
    """Which answer a token begins."""
    letters = token.strip(" \"'\n\t,}").lower()
    if not letters:
        return None
    return True if "yes".startswith(letters) else False if "no".startswith(letters) else None


def messages(system: str, user: str) -> Messages:
    """A chat of one question."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
