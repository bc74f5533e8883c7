"""Language models as judges, through any server that speaks the OpenAI protocol."""

import asyncio
import ipaddress
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai

from bae_lens.comsem.cache import AnswerCache
from bae_lens.comsem.instances import Instance, Question, Verdict
from bae_lens.comsem.prompts import (
    DESCRIPTION_TOKENS,
    UNKNOWN_DESCRIPTION,
    describe_messages,
    read_description,
    read_single,
    read_structured,
    single_messages,
    structured_messages,
    verdict_schema,
    yes_probabilities,
)
from bae_lens.comsem.spending import Budget, Price, Tally, estimate_input_tokens
from bae_lens.comsem.together import together

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
TOP_LOGPROBS = 5  # alternatives among which yes and no are looked for; servers allow 5 at least
FAILURES_IN_A_ROW = 16  # calls that failed after all their retries, after which the server is given up
# Tokens of an answer that are expected, and at most allowed, per verdict.
SINGLE_TOKENS, STRUCTURED_TOKENS = (2, 8), (7, 16)


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str | None
    """None if there was no answer after all retries."""
    probabilities: list[float]
    """Of yes against no, at each verdict in the text; empty where the server does not say."""


class ChatClient:
    """Asks a server, each question once: answers are cached, and questions on their way are shared.

    The key is read from the environment variable OPENAI_API_KEY when it is first needed, and kept nowhere else; a
    server on this machine needs none. Retries are the SDK's own, which follow the server's Retry-After. An answer that
    is no JSON or holds no choice counts as a bad gateway, so that it is retried like one.
    """

    def __init__(
        self,
        base_url: str | None = None,
        cache: AnswerCache | None = None,
        concurrency: int = 16,
        budget: Budget | None = None,
        price: Price | None = None,
        max_retries: int = 8,
        timeout: float = 60.0,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if budget and budget.cost is not None and price is None:
            raise ValueError("a budget of money needs the price of the model's tokens")
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.base_url = _without_secrets(self._url)
        self.cache = AnswerCache() if cache is None else cache  # an empty one is false
        self.concurrency, self.budget, self.price = concurrency, budget or Budget(), price
        self.tally = Tally()
        self._max_retries, self._timeout = max_retries, timeout
        self._dry = False
        self._client: openai.AsyncOpenAI | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._in_flight = (0, 0)
        self._failures_in_a_row = 0
        self._given_up: ValueError | OSError | None = None

    @property
    def cost(self) -> float | None:
        """Of what was asked so far; None without a price."""
        return self.price and self.price(self.tally.input_tokens, self.tally.output_tokens)

    @contextmanager
    def dry_run(self) -> Iterator[Tally]:
        """Inside, nothing is asked: what would be is counted in the tally that this gives, tokens by estimate."""
        real, self.tally, self._dry = self.tally, Tally(), True
        try:
            yield self.tally
        finally:
            self.tally, self._dry = real, False
            self._pending.clear()

    async def ask(self, request: dict[str, Any], expected_tokens: int) -> Answer:
        """The answer to a chat request, from the cache or the server. `expected_tokens`: of the answer, for estimates.

        Raises ValueError if the server refuses the key or the request, OSError if it cannot be reached any more, and
        BudgetSpentError before a call that might exceed the budget.
        """
        keyed = {"base_url": self.base_url, **request}
        cached = self.cache.get(keyed)
        if cached is not None:
            self.tally.cached += 1
            return Answer(cached["text"], cached["probabilities"])
        key = json.dumps(keyed, sort_keys=True)
        if key not in self._pending:
            self._pending[key] = asyncio.ensure_future(self._ask(keyed, request, expected_tokens))
            if not self._dry:
                self._pending[key].add_done_callback(lambda _: self._pending.pop(key, None))
        return await self._pending[key]

    async def _ask(self, keyed: dict[str, Any], request: dict[str, Any], expected_tokens: int) -> Answer:
        input_tokens = estimate_input_tokens(request)
        if self._dry:
            self.tally.asked += 1
            self.tally.input_tokens += input_tokens
            self.tally.output_tokens += expected_tokens
            return Answer(None, [])
        async with self._slots:
            before = self._in_flight
            self._in_flight = (before[0] + input_tokens, before[1] + request["max_completion_tokens"])
            try:
                self.tally.check(self.budget, self.price, self._in_flight)
                completion = await self._send(request)
            finally:
                self._in_flight = (
                    self._in_flight[0] - input_tokens,
                    self._in_flight[1] - request["max_completion_tokens"],
                )
        if completion is None:
            return Answer(None, [])
        choice = completion.choices[0]
        text = choice.message.content or ""
        usage = completion.usage
        self.tally.input_tokens += (usage and usage.prompt_tokens) or input_tokens
        self.tally.output_tokens += (usage and usage.completion_tokens) or expected_tokens
        tokens = choice.logprobs.content if choice.logprobs else None
        listed = [token.model_dump() for token in tokens or []]
        answer = Answer(text, yes_probabilities(listed, structured="response_format" in request))
        self.cache.put(keyed, {**asdict(answer), "finish_reason": choice.finish_reason})
        return answer

    async def _send(self, request: dict[str, Any]) -> Any:
        if self._given_up is not None:
            raise self._given_up
        if self._client is None:
            self._client = self._connect()
        self.tally.asked += 1
        try:
            completion = await self._client.chat.completions.create(**request)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            self._given_up = ValueError(
                f"{self.base_url} refused the key ({error.status_code}); set {KEY_VARIABLE} to a valid one"
            )
            raise self._given_up from None
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                reason = self._redacted(error.message)
                self._given_up = ValueError(f"{self.base_url} refused the request: {reason}")
                raise self._given_up from None
            return self._failed(error.message)
        except openai.APIConnectionError as error:
            return self._failed(error.message)
        self._failures_in_a_row = 0
        return completion

    def _failed(self, reason: str) -> None:
        self.tally.failed += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._given_up = OSError(
                f"{self.base_url} failed {FAILURES_IN_A_ROW} times in a row, each after {self._max_retries} retries: "
                f"{self._redacted(reason)}; answers so far are kept, the same command goes on"
            )
            raise self._given_up from None

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


class LanguageModelJudge:
    """A chat model that describes and judges; `client` may be shared between several."""

    def __init__(self, model: str, client: ChatClient, temperature: float | None = 0.0, logprobs: bool = True) -> None:
        self.name, self.client = model, client
        self._options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {}

    def prepare(self, background: list[Instance]) -> None:
        """A language model has seen ordinary tokens before."""

    async def describe(self, examples: list[Instance], marked: bool) -> str | None:
        request = self._request(describe_messages(examples, marked), DESCRIPTION_TOKENS)
        answer = await self.client.ask(request, DESCRIPTION_TOKENS // 4)
        if answer.text is None:
            # Each of its own, because questions with the same description about the same token are asked once.
            own = zlib.crc32(json.dumps(request["messages"]).encode())
            return UNKNOWN_DESCRIPTION.format(own) if self.client._dry else None
        return read_description(answer.text)

    async def judge(self, description: str, instances: list[Instance], question: Question) -> list[Verdict]:
        if question == "token":
            return await together([self._judge_one(description, instance) for instance in instances])
        expected, allowed = STRUCTURED_TOKENS
        n = len(instances)
        request = self._request(structured_messages(description, instances, question), n * allowed)
        request |= {"response_format": verdict_schema(n), **self._logprobs}
        answer = await self.client.ask(request, n * expected)
        if answer.text is None:
            return [Verdict(None, failed=True)] * n
        probabilities = answer.probabilities if len(answer.probabilities) == n else [None] * n
        verdicts = zip(read_structured(answer.text, n), probabilities, strict=True)
        return [Verdict(yes, probability) for yes, probability in verdicts]

    async def _judge_one(self, description: str, instance: Instance) -> Verdict:
        expected, allowed = SINGLE_TOKENS
        request = self._request(single_messages(description, instance), allowed) | self._logprobs
        answer = await self.client.ask(request, expected)
        if answer.text is None:
            return Verdict(None, failed=True)
        return Verdict(read_single(answer.text), answer.probabilities[0] if answer.probabilities else None)

    def _request(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {"model": self.name, "messages": messages, "max_completion_tokens": max_tokens, **self._options}

    async def close(self) -> None:
        await self.client.close()


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
