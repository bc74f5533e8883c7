"""Questions to a server that speaks the OpenAI protocol, each asked once."""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bae_lens.comsem.judges.address import KEY_VARIABLE, OPENAI_URL, is_loopback, read_key, without_secrets
from bae_lens.comsem.judges.answer_cache import AnswerCache, fingerprint
from bae_lens.comsem.judges.completion import Completion
from bae_lens.comsem.judges.prompts import yes_probabilities
from bae_lens.comsem.judges.spending import (
    Budget,
    BudgetSpentError,
    Price,
    Usage,
    estimate_input_tokens,
    estimate_output_tokens,
    most_output_tokens,
)
from bae_lens.extras import naming_the_command

if TYPE_CHECKING:
    from bae_lens.comsem.judges.server import CallFailedError, Server

MAX_ANSWER_BYTES = 4 * 2**20  # log-probabilities of a long answer take some hundred bytes a token
FAILURES_IN_A_ROW = 16  # calls that failed after all their retries, after which the server is given up
OF_ONE_REQUEST = (400, 413, 422)  # refusals that may be about a single request: too long, an unusual character
RETRIED = (408, 409, 429)
REMEDIES = {
    "temperature": "temperature None leaves it out",
    "logprobs": "logprobs False leaves them out",
    "max_tokens": "limit_name is what the limit of an answer is called",
    "max_completion_tokens": "limit_name is what the limit of an answer is called",
    "response_format": "answer_format is what is asked for",
    "json_schema": "answer_format is what is asked for",
}
"""Options of `LanguageModelJudge`, by what a server names when it refuses a request."""

ReadLogprobs = Callable[[list[dict[str, Any]]], list[float]]
"""Makes numbers from the tokens of an answer, as `Completion.logprobs` has them."""
READ_SINGLE: ReadLogprobs = partial(yes_probabilities, structured=False)


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str | None
    """None if there was no answer of use after all retries."""
    probabilities: list[float]
    """Of yes against no, at each verdict in the text, or what else is read from log-probabilities; empty where the
    server does not say."""


class ChatClient:
    """Asks a server, each question once: answers are cached, and questions on their way are shared.

    The key is read from the environment variable OPENAI_API_KEY when it is first needed, and kept nowhere else; a
    server on this machine needs none. An answer that is empty, or cut off before it says what was asked, is a failure;
    one that cannot be parsed is given, and counted in `unparsable`. Neither is kept: the next run asks again. Whatever
    may have been billed is in `usage`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        cache: AnswerCache | None = None,
        concurrency: int = 16,
        budget: Budget | None = None,
        prices: Mapping[str, Price] | None = None,
        max_retries: int = 8,
        timeout: float = 60.0,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        label: str | None = None,
    ) -> None:
        """`prices` are by model, `label` stands for the server in the cache if its address changes.

        An answer is waited for `timeout` seconds, and for its rest as long again. Raises ValueError for limits below
        1 (of the timeout: 0), a base_url that is no address, and a budget without prices.
        """
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
            ("max_answer_bytes", max_answer_bytes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not timeout > 0:
            raise ValueError(f"timeout must be over 0 seconds, got {timeout}")
        if budget and budget.cost is not None and not prices:
            raise ValueError("a budget of money needs the price of the model's tokens")
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.base_url = without_secrets(self._url)
        self.label = label or self.base_url
        self.cache = AnswerCache() if cache is None else cache  # an empty one is false
        self.concurrency, self.budget, self.prices = concurrency, budget or Budget(), prices or {}
        self.usage = Usage()
        self.failures: Counter[str] = Counter()
        self.unparsable: Counter[str] = Counter()
        self._max_retries, self._timeout, self._max_answer_bytes = max_retries, timeout, max_answer_bytes
        self._server: Server | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._counted: set[str] | None = None  # in a dry run, what has been counted
        self._tokens_in_flight, self._cost_in_flight = 0, 0.0
        self._models_that_answered: set[str] = set()
        self._failures_in_a_row: Counter[str] = Counter()  # by model
        self._given_up: ValueError | OSError | None = None

    @property
    def dry(self) -> bool:
        """Whether this is a dry run."""
        return self._counted is not None

    @contextmanager
    def dry_run(self) -> Iterator[Usage]:
        """Inside, nothing is asked: what would be is counted in the usage that this gives, tokens by estimate."""
        real, self.usage, self._counted = self.usage, Usage(), set()
        try:
            yield self.usage
        finally:
            self.usage, self._counted = real, None

    async def ask(
        self,
        request: dict[str, Any],
        expected_tokens: int,
        fault: Callable[[str], str | None] | None = None,
        read_logprobs: ReadLogprobs = READ_SINGLE,
        needs_logprobs: bool = False,
    ) -> Answer:
        """The answer to a chat request, from the cache or the server. `expected_tokens`: of the answer, for estimates.

        `fault` says in a few words why a text cannot be parsed, None if it can. Without it every answer can that ends
        by itself; with it those that were cut off too, if they say all that was asked. `read_logprobs` makes
        the answer's `probabilities` from its tokens' log-probabilities; with `needs_logprobs` one without is of no use.

        Raises ValueError if the server refuses the key, the address or the model, or the model's first request of all,
        OSError if it cannot be reached any more or an answer cannot be kept, and BudgetSpentError before a call that
        might exceed the budget.
        """
        keyed = {"server": self.label, **request}
        kept = self._kept(keyed, fault, needs_logprobs)
        if kept is not None:
            self.usage.cached += 1
            self._models_that_answered.add(request["model"])
            return kept
        key = fingerprint(keyed)
        if self._counted is not None:
            if key not in self._counted:
                self._counted.add(key)
                self.usage.asked += 1
                self.usage.add(estimate_input_tokens(request), expected_tokens, self._price(request))
            return Answer(None, [])
        if key not in self._pending:
            self._pending[key] = asyncio.ensure_future(self._ask(keyed, request, fault, read_logprobs, needs_logprobs))
            self._pending[key].add_done_callback(lambda _: self._pending.pop(key, None))
        return await self._pending[key]

    def _kept(
        self, keyed: dict[str, Any], fault: Callable[[str], str | None] | None, needs_logprobs: bool
    ) -> Answer | None:
        """The cached answer, if it is one: those of earlier versions may be of no use."""
        match self.cache.get(keyed):
            case {"text": str(text), "probabilities": list(probabilities)} if not (fault and fault(text)):
                return Answer(text, probabilities) if probabilities or not needs_logprobs else None
        return None

    async def _ask(
        self,
        keyed: dict[str, Any],
        request: dict[str, Any],
        fault: Callable[[str], str | None] | None,
        read_logprobs: ReadLogprobs,
        needs_logprobs: bool,
    ) -> Answer:
        async with self._slots:
            with self._within_budget(request):
                completion = await self._send(request)
            if completion is None:
                return Answer(None, [])
            model, text = request["model"], self._redacted(completion.text or "")
            trouble = fault(text) if fault else None
            if completion.cut_off and (fault is None or trouble):
                limit = most_output_tokens(request)
                reason = f"an answer was cut off at its limit of {limit} tokens; reasoning_tokens raises it"
                return self._failed("cut off", reason, model, came=True)
            if not text.strip():
                filtered = completion.finish_reason == "content_filter"
                kind = "refused" if completion.refusal else "filtered" if filtered else "empty"
                return self._failed(kind, f"an answer was {kind}", model, came=True)
            self._failures_in_a_row[model] = 0
            self._models_that_answered.add(model)
            probabilities = read_logprobs(completion.logprobs)
            if needs_logprobs and not (trouble or probabilities):
                trouble = "no log-probabilities"
            if trouble:
                self.unparsable[trouble] += 1
            else:
                self._keep(keyed, text, probabilities)
            return Answer(text, probabilities)

    def _keep(self, keyed: dict[str, Any], text: str, probabilities: list[float]) -> None:
        try:
            self.cache.put(keyed, {"text": text, "probabilities": probabilities})
        except OSError as error:
            self._given_up = error  # what else is asked would be lost
            raise

    @contextmanager
    def _within_budget(self, request: dict[str, Any]) -> Iterator[None]:
        """Counts a request, at the longest answer it may get, as on its way."""
        tokens, price = (estimate_input_tokens(request), most_output_tokens(request)), self._price(request)
        cost = price(*tokens) if price else 0.0
        self._tokens_in_flight += sum(tokens)
        self._cost_in_flight += cost
        try:
            self._check_budget()
            yield
        finally:
            self._tokens_in_flight -= sum(tokens)
            self._cost_in_flight -= cost

    def _check_budget(self) -> None:
        self.usage.check(self.budget, self._tokens_in_flight, self._cost_in_flight)

    def _may_send(self) -> bool:
        try:
            self._check_budget()
        except BudgetSpentError:
            return False
        return True

    def _billed(self, request: dict[str, Any], completion: Completion | None) -> None:
        """Counts an answer by what the server says, or else by estimate; at its limit if it broke off on its way."""
        sent, came, reused = estimate_input_tokens(request), most_output_tokens(request), 0
        if completion is not None:
            sent = completion.input_tokens or sent
            came = completion.output_tokens or estimate_output_tokens(completion.text or "")
            reused = min(sent, completion.reused_tokens)
        self.usage.add(sent, came, self._price(request), reused)

    def _price(self, request: dict[str, Any]) -> Price | None:
        if self.prices and request["model"] not in self.prices:
            raise ValueError(f"there is no price for {request['model']}, but for other models; give one for each")
        return self.prices.get(request["model"])

    async def _send(self, request: dict[str, Any]) -> Completion | None:
        if self._given_up is not None:
            raise self._given_up
        if self._server is None:
            self._server = self._connect()
        from bae_lens.comsem.judges.server import CallFailedError

        self.usage.asked += 1
        try:
            return await self._server.ask(request)
        except CallFailedError as error:
            self._check_budget()  # a retry may not have been sent
            refusal = self._refusal(error, request["model"])
            if refusal is not None:
                self._given_up = ValueError(refusal)
                raise self._given_up from None
            self._failed(error.kind, error.reason, request["model"])

    def _refusal(self, error: "CallFailedError", model: str) -> str | None:
        """What to tell if there is no use in asking anything else; None for a call that failed alone."""
        status, reason = error.status, self._redacted(error.reason)
        if status is None:
            return None
        if status in (401, 403):
            return f"{self.base_url} refused the key ({status}); set {KEY_VARIABLE} to a valid one"
        if status == 404:
            return f"{self.base_url} knows no model {model!r} or no such address (404): {reason}; check both"
        if status >= 500 or status in RETRIED or (status in OF_ONE_REQUEST and model in self._models_that_answered):
            return None
        remedies = dict.fromkeys(remedy for named, remedy in REMEDIES.items() if named in reason)
        return f"{self.base_url} refused the request: {reason}" + "".join(f"; {remedy}" for remedy in remedies)

    def _failed(self, kind: str, reason: str, model: str, came: bool = False) -> Answer:
        """Counts a call. `came`: the server answered, so that a model that can answer is not given up for it."""
        self.usage.failed += 1
        self.failures[kind] += 1
        if not (came and model in self._models_that_answered):
            self._failures_in_a_row[model] += 1
        if self._failures_in_a_row[model] >= FAILURES_IN_A_ROW:
            self._given_up = OSError(
                f"{self.base_url} failed {FAILURES_IN_A_ROW} times in a row ({dict(self.failures)} in all), at last: "
                f"{self._redacted(reason)}; answers so far are kept, the same command goes on"
            )
            raise self._given_up from None
        return Answer(None, [])

    def _connect(self) -> "Server":
        key = read_key()
        if not key and not is_loopback(self._url):
            raise ValueError(f"{self.base_url} needs a key: set the environment variable {KEY_VARIABLE}")
        with naming_the_command():
            from bae_lens.comsem.judges.server import Server
        return Server(
            self._url,
            key or "none",
            self._max_retries,
            self._timeout,
            self._max_answer_bytes,
            self._may_send,
            self._billed,
        )

    def _redacted(self, text: str) -> str:
        key = read_key()
        return (text.replace(key, "***") if key else text).replace(self._url, self.base_url)

    async def close(self) -> None:
        """Ends all connections. The next question opens new ones, in whatever event loop it is asked."""
        server, self._server = self._server, None
        self._slots = asyncio.Semaphore(self.concurrency)
        self._pending.clear()
        self._given_up = None
        self._failures_in_a_row.clear()
        if server is not None:
            await server.close()
