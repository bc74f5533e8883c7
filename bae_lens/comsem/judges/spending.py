"""What asking costs: an estimate before, a usage while it happens, and a limit."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

BYTES_PER_TOKEN = 4  # of English in the byte-pair vocabularies of current models, roughly
TOKENS_PER_MESSAGE = 4


class BudgetSpentError(ValueError):
    """The next call might exceed the limit that was set."""


@dataclass(frozen=True)
class Price:
    """Of a model, in any currency, per million tokens."""

    input: float
    """Of a million tokens that are sent."""
    output: float
    """Of a million tokens that come back."""

    def __post_init__(self) -> None:
        """Raises ValueError for what is no price."""
        for name in ("input", "output"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"the price of {name} tokens must be a number of at least 0, got {value}")

    def __call__(self, input_tokens: int, output_tokens: int) -> float:
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """Where to stop; None is no limit. What is on its way counts at its estimate."""

    tokens: int | None = None
    """Input and output tokens together."""
    cost: float | None = None
    """In the currency of the prices."""

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that no spending could reach or keep."""
        for name in ("tokens", "cost"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"a budget must be at least 0, got {value} ({name}); leave it out for no limit")

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.tokens is not None or self.cost is not None


@dataclass
class Usage:
    """Calls and tokens so far. In a dry run, estimates of what would be asked."""

    asked: int = 0
    """Calls that went to the server (retries not counted)."""
    cached: int = 0
    """Calls answered by the cache, which cost nothing."""
    failed: int = 0
    """Calls without an answer of use; they are not cached, so that running again asks only them."""
    input_tokens: int = 0
    """Tokens sent, of answers of no use too: as the server counts them, or else by estimate."""
    reused_tokens: int = 0
    """Of those sent, such as the server knew from the beginning of an earlier request and did not read again."""
    output_tokens: int = 0
    """Tokens that came back; for an answer that broke off on its way, as many as it was allowed."""
    cost: float = 0.0
    """In the currency of the prices; 0 without any."""

    def add(self, input_tokens: int, output_tokens: int, price: Price | None, reused_tokens: int = 0) -> None:
        """Counts a call's tokens, and their cost where there is a price; reused ones at the full price."""
        self.input_tokens += input_tokens
        self.reused_tokens += reused_tokens
        self.output_tokens += output_tokens
        self.cost += price(input_tokens, output_tokens) if price else 0.0

    def check(self, budget: Budget, tokens: int, cost: float) -> None:
        """Raises BudgetSpentError if what was spent, and `tokens` and `cost` on their way, exceed the budget."""
        if budget.tokens is not None and self.input_tokens + self.output_tokens + tokens > budget.tokens:
            raise BudgetSpentError(f"the budget of {budget.tokens:,} tokens is spent")
        if budget.cost is not None and self.cost + cost > budget.cost:
            raise BudgetSpentError(f"the budget of {budget.cost:g} is spent")

    @property
    def estimate(self) -> str:
        """What a dry run found, in words."""
        cost = f", cost about {self.cost:.2f}" if self.cost else ""
        return (
            f"{self.asked:,} calls to be made and {self.cached:,} cached: about {self.input_tokens:,} input and "
            f"{self.output_tokens:,} output tokens{cost}"
        )

    @classmethod
    def total(cls, usages: Iterable["Usage"]) -> "Usage":
        """The sum of several."""
        parts = [asdict(usage) for usage in usages]
        return cls(**{name: sum((part[name] for part in parts), zero) for name, zero in asdict(cls()).items()})


def estimate_input_tokens(request: dict[str, Any]) -> int:
    """Tokens of a chat request, from the length of its messages and JSON schema."""
    n_bytes = sum(len(message["content"].encode()) for message in request["messages"])
    n_bytes += len(json.dumps(request.get("response_format", "")))
    return -(-n_bytes // BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE * len(request["messages"])


def estimate_output_tokens(text: str) -> int:
    """Tokens of an answer, from its length; one of them ends it."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN) + 1


def most_output_tokens(request: dict[str, Any]) -> int:
    """Tokens that the answer to a chat request may have."""
    return request["max_completion_tokens"] if "max_completion_tokens" in request else request["max_tokens"]
