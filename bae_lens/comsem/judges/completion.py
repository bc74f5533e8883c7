"""What a chat server's answer says, whatever it leaves out or sends in another shape."""

import json
import re
from dataclasses import dataclass
from typing import Any

REASONING = "think|thinking|thought|reasoning"
END_OF_REASONING = re.compile(rf"[<\[]/(?:{REASONING})[>\]]", re.IGNORECASE)
START_OF_REASONING = re.compile(rf"[<\[](?:{REASONING})[>\]]", re.IGNORECASE)
FINAL_CHANNEL = "<|channel|>final<|message|>"  # before the answer of models that speak in channels
END_TOKENS = re.compile(r"(?:<\|\w+\|>|</s>)\s*$")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
CUT_OFF = ("length", "max_tokens")
TEXT_PARTS = ("text", "output_text")
MOST_TOKENS = 2**53  # of an answer; more were never billed
LARGEST_LOGPROB = 1e-3  # 0, with room for rounding


@dataclass(frozen=True)
class Completion:
    """What could be read of an answer."""

    text: str | None
    """Without the reasoning before it, and with all characters such as a file can hold; None without a message."""
    finish_reason: str
    """Why it ends where it does; empty where the server does not say."""
    refusal: bool
    """The model declined, in the field that servers have for it."""
    logprobs: list[dict[str, Any]]
    """Tokens with `token` and `top_logprobs`, as `yes_probabilities` takes them; empty after reasoning."""
    input_tokens: int | None
    """That were billed; None where the server does not say so, or says of either number what is none."""
    output_tokens: int | None
    """As `input_tokens`."""
    reused_tokens: int
    """Of the input, that the server had read before; 0 where it does not say."""
    complaint: str
    """What the server says instead of an answer; empty if nothing."""

    @property
    def cut_off(self) -> bool:
        """It ends at its limit."""
        return self.finish_reason in CUT_OFF


def read_completion(content: bytes) -> Completion:
    """Reads the body of an answer, of any content."""
    body = _mapping(read_json(content))
    choice = next((choice for choice in _list(body.get("choices")) if isinstance(choice, dict)), {})
    message = choice.get("message", choice.get("text"))
    input_tokens, output_tokens = _usage(body.get("usage"))
    reused = _mapping(_mapping(body.get("usage")).get("prompt_tokens_details")).get("cached_tokens")
    error = body.get("error")
    text = None
    if isinstance(message, dict):
        text = _text(message.get("content"))
    elif isinstance(message, str):
        text = message
    answer = None if text is None else without_reasoning(text)
    finish_reason = choice.get("finish_reason")
    complaint = _mapping(error).get("message", error)
    return Completion(
        text=None if answer is None else LONE_SURROGATE.sub("\ufffd", answer),
        finish_reason=finish_reason if isinstance(finish_reason, str) else "",
        refusal=bool(_mapping(message).get("refusal")),
        logprobs=_logprobs(choice) if answer == text else [],
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        reused_tokens=int(reused) if reused is not None and _is_count(reused) else 0,
        complaint=complaint if isinstance(complaint, str) else "",
    )


def read_json(content: str | bytes) -> Any:
    """JSON values; None for what is no JSON, nested deeper than Python reads, or a number of thousands of digits."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def without_reasoning(text: str) -> str:
    """What a model says after it has reasoned; empty if it has not come to an end.

    >>> without_reasoning("<think>Both are wet.</think> kinds of weather")
    'kinds of weather'
    """
    text = END_TOKENS.sub("", text.rpartition(FINAL_CHANNEL)[2])
    *_, end = [0, *(match.end() for match in END_OF_REASONING.finditer(text))]
    start = START_OF_REASONING.search(text, end)
    answer = text[end : start.start() if start else None]
    return answer.lstrip() if end else answer


def _text(content: Any) -> str:
    """Of a message, whose content some servers send in parts; empty if there is none."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS]
        return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = _list(_mapping(choice.get("logprobs")).get("content"))
    return [
        {
            "token": token["token"],
            "top_logprobs": [
                {"token": other["token"], "logprob": other["logprob"]}
                for other in _list(token.get("top_logprobs"))
                if isinstance(other, dict) and isinstance(other.get("token"), str) and _is_logprob(other.get("logprob"))
            ],
        }
        for token in tokens
        if isinstance(token, dict) and isinstance(token.get("token"), str)
    ]


def _is_logprob(value: Any) -> bool:
    return _is_number(value) and value <= LARGEST_LOGPROB


def _usage(usage: Any) -> tuple[int | None, int | None]:
    counts = [_mapping(usage).get(name) for name in ("prompt_tokens", "completion_tokens")]
    if any(not (count is None or _is_count(count)) for count in counts):
        return None, None
    sent, came = (None if count is None else int(count) for count in counts)
    return sent, came


def _is_count(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= MOST_TOKENS


def _is_number(value: Any) -> bool:
    """A whole number of hundreds of digits is none: nothing that is counted here is so large, and no float holds it."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
