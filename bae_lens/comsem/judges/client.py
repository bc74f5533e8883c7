"""Questions to a server that speaks the OpenAI protocol, each asked once."""

import asyncio
import ipaddress
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai

from bae_lens.comsem.judges.answer_cache import AnswerCache, fingerprint
from bae_lens.comsem.judges.prompts import yes_probabilities
from bae_lens.comsem.judges.spending import Budget, Price, Usage, estimate_input_tokens

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
FAILURES_IN_A_ROW = 16  # calls that failed after all their retries, after which the server is given up
OF_ONE_REQUEST = (400, 413, 422)  # refusals that may be about a single request: too long, an unusual character
RETRIED = (408, 409, 429)


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str | None
    """None if there was no answer of use after all retries."""
    probabilities: list[float]
    """Of yes against no, at each verdict in the text; empty where the server does not say."""


class ChatClient:
    """Asks a server, each question once: answers are cached, and questions on their way are shared.

    The key is read from the environment variable OPENAI_API_KEY when it is first needed, and kept nowhere else; a
    server on this machine needs none. Retries are the SDK's own, which follow the server's Retry-After. An answer that
    is no JSON or holds no choice counts as a bad gateway, so that it is retried like one. An answer that is empty or
    was cut off at its limit, unless its beginning will do, is a failure: not kept, and asked again by the next run.
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
        label: str | None = None,
    ) -> None:
        """`prices` are by model, `label` stands for the server in the cache if its address changes.

        Raises ValueError for a concurrency below 1, a base_url that is no address, and a budget without prices.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if budget and budget.cost is not None and not prices:
            raise ValueError("a budget of money needs the price of the model's tokens")
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.base_url = _without_secrets(self._url)
        self.label = label or self.base_url
        self.cache = AnswerCache() if cache is None else cache  # an empty one is false
        self.concurrency, self.budget, self.prices = concurrency, budget or Budget(), prices or {}
        self.usage = Usage()
        self.failures: Counter[str] = Counter()
        self._max_retries, self._timeout = max_retries, timeout
        self._client: openai.AsyncOpenAI | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._counted: set[str] | None = None  # in a dry run, what has been counted
        self._tokens_in_flight, self._cost_in_flight = 0, 0.0
        self._answered = False
        self._failures_in_a_row = 0
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

    async def ask(self, request: dict[str, Any], expected_tokens: int, may_be_cut: bool = False) -> Answer:
        """The answer to a chat request, from the cache or the server. `expected_tokens`: of the answer, for estimates.

        `may_be_cut` says that the beginning of an answer is of use without its end.

        Raises ValueError if the server refuses the key, the address or the model, or the first request of all, OSError
        if it cannot be reached any more, and BudgetSpentError before a call that might exceed the budget.
        """
        keyed = {"server": self.label, **request}
        cached = self.cache.get(keyed)
        if cached is not None:
            self.usage.cached += 1
            self._answered = True
            return Answer(cached["text"], cached["probabilities"])
        key = fingerprint(keyed)
        if self._counted is not None:
            if key not in self._counted:
                self._counted.add(key)
                self.usage.asked += 1
                self.usage.add(estimate_input_tokens(request), expected_tokens, self._price(request))
            return Answer(None, [])
        if key not in self._pending:
            self._pending[key] = asyncio.ensure_future(self._ask(keyed, request, expected_tokens, may_be_cut))
            self._pending[key].add_done_callback(lambda _: self._pending.pop(key, None))
        return await self._pending[key]

    async def _ask(
        self, keyed: dict[str, Any], request: dict[str, Any], expected_tokens: int, may_be_cut: bool
    ) -> Answer:
        async with self._slots:
            with self._within_budget(request):
                completion = await self._send(request)
            if completion is None:
                return Answer(None, [])
            used = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
            tokens = used[0] or estimate_input_tokens(request), used[1] or expected_tokens
            self.usage.add(*tokens, self._price(request))
            choice = completion.choices[0]
            text = _text(choice.message.content)
            finish_reason = getattr(choice, "finish_reason", None)
            if finish_reason == "length" and not may_be_cut:
                limit = request["max_completion_tokens"]
                return self._failed("cut off", f"an answer was cut off at its limit of {limit} tokens")
            if not text.strip():
                return self._failed("empty", "an answer was empty")
            self._failures_in_a_row, self._answered = 0, True
            listed = choice.logprobs.content if getattr(choice, "logprobs", None) else None
            probabilities = yes_probabilities(
                [token.model_dump() for token in listed or []], structured="response_format" in request
            )
            self.cache.put(keyed, {"text": text, "probabilities": probabilities, "finish_reason": finish_reason})
            return Answer(text, probabilities)

    @contextmanager
    def _within_budget(self, request: dict[str, Any]) -> Iterator[None]:
        """Counts a request, at the longest answer it may get, as on its way."""
        tokens, price = (estimate_input_tokens(request), request["max_completion_tokens"]), self._price(request)
        cost = price(*tokens) if price else 0.0
        self._tokens_in_flight += sum(tokens)
        self._cost_in_flight += cost
        try:
            self.usage.check(self.budget, self._tokens_in_flight, self._cost_in_flight)
            yield
        finally:
            self._tokens_in_flight -= sum(tokens)
            self._cost_in_flight -= cost

    def _price(self, request: dict[str, Any]) -> Price | None:
        if self.prices and request["model"] not in self.prices:
            raise ValueError(f"there is no price for {request['model']}, but for other models; give one for each")
        return self.prices.get(request["model"])

    async def _send(self, request: dict[str, Any]) -> Any:
        if self._given_up is not None:
            raise self._given_up
        if self._client is None:
            self._client = self._connect()
        self.usage.asked += 1
        try:
            return await self._client.chat.completions.create(**request)
        except openai.APIStatusError as error:
            refusal = self._refusal(error, request["model"])
            if refusal is not None:
                self._given_up = ValueError(refusal)
                raise self._given_up from None
            self._failed(f"status {error.status_code}", error.message)
        except openai.APIConnectionError as error:
            self._failed("no connection", error.message)

    def _refusal(self, error: openai.APIStatusError, model: str) -> str | None:
        """What to tell if there is no use in asking anything else; None for a call that failed alone."""
        status, reason = error.status_code, self._redacted(error.message)
        if status in (401, 403):
            return f"{self.base_url} refused the key ({status}); set {KEY_VARIABLE} to a valid one"
        if status == 404:
            return f"{self.base_url} knows no model {model!r} or no such address (404): {reason}; check both"
        if status >= 500 or status in RETRIED or (status in OF_ONE_REQUEST and self._answered):
            return None
        return f"{self.base_url} refused the request: {reason}"

    def _failed(self, kind: str, reason: str) -> Answer:
        self.usage.failed += 1
        self.failures[kind] += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._given_up = OSError(
                f"{self.base_url} failed {FAILURES_IN_A_ROW} times in a row ({dict(self.failures)} in all), at last: "
                f"{self._redacted(reason)}; answers so far are kept, the same command goes on"
            )
            raise self._given_up from None
        return Answer(None, [])

    def _connect(self) -> openai.AsyncOpenAI:
        key = os.environ.get(KEY_VARIABLE)
        if not key and not _is_loopback(self._url):
            raise ValueError(f"{self.base_url} needs a key: set the environment variable {KEY_VARIABLE}")
        http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [_refuse_unusable]})
        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self._url,
            max_retries=self._max_retries,
            timeout=self._timeout,
            http_client=http_client,
        )

    def _redacted(self, text: str) -> str:
        key = os.environ.get(KEY_VARIABLE)
        return (text.replace(key, "***") if key else text).replace(self._url, self.base_url)

    async def close(self) -> None:
        """Ends all connections. The next question opens new ones, in whatever event loop it is asked."""
        client, self._client = self._client, None
        self._slots = asyncio.Semaphore(self.concurrency)
        self._pending.clear()
        self._given_up, self._failures_in_a_row = None, 0
        if client is not None:
            await client.close()


def _text(content: Any) -> str:
    """Of a message, whose content some servers send in parts; empty if there is none."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


async def _refuse_unusable(response: Any) -> None:
    """Makes an answer without a choice a bad gateway, which the SDK retries."""
    if response.status_code == 200:
        await response.aread()
        try:
            usable = isinstance(response.json()["choices"][0]["message"], dict)
        except (ValueError, LookupError, TypeError):
            usable = False
        if not usable:
            response.status_code = 502


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_secrets(url: str) -> str:
    """The address without user, password, query and fragment."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("base_url must be an address such as http://127.0.0.1:8080/v1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return urlunsplit((parts.scheme, host + (f":{parts.port}" if parts.port else ""), parts.path.rstrip("/"), "", ""))
