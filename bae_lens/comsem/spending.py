"""What asking costs: an estimate before, a tally while it happens, and a limit."""

import json
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4  # of English in the byte-pair vocabularies of current models, roughly
TOKENS_PER_MESSAGE = 4


class BudgetSpentError(ValueError):
    """The next call might exceed the limit that was set."""


@dataclass(frozen=True)
class Price:
    """Of a model, in any currency, per million tokens."""

    input: float
    output: float

    def __call__(self, input_tokens: int, output_tokens: int) -> float:
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """Where to stop; None is no limit. What is on its way counts at its estimate."""

    tokens: int | None = None
    """Input and output tokens together."""
    cost: float | None = None
    """In the currency of the price."""


@dataclass
class Tally:
    """Calls and tokens so far. In a dry run, estimates of what would be asked."""

    asked: int = 0
    """Calls that went to the server (retries not counted)."""
    cached: int = 0
    """Calls answered by the cache, which cost nothing."""
    failed: int = 0
    """Calls without an answer after all retries; they are not cached, so that running again asks only them."""
    input_tokens: int = 0
    output_tokens: int = 0

    def check(self, budget: Budget, price: Price | None, in_flight: tuple[int, int]) -> None:
        """Raises BudgetSpentError if what was spent and what is on its way (input, output tokens) exceed the budget."""
        tokens = (self.input_tokens + in_flight[0], self.output_tokens + in_flight[1])
        if budget.tokens is not None and sum(tokens) > budget.tokens:
            raise BudgetSpentError(f"the budget of {budget.tokens:,} tokens is spent")
        if budget.cost is not None and price is not None and price(*tokens) > budget.cost:
            raise BudgetSpentError(f"the budget of {budget.cost:g} is spent")


def estimate_input_tokens(request: dict[str, Any]) -> int:
    """Tokens of a chat request, from the length of its messages and JSON schema."""
    n_bytes = sum(len(message["content"].encode()) for message in request["messages"])
    n_bytes += len(json.dumps(request.get("response_format", "")))
    return -(-n_bytes // BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE * len(request["messages"])
