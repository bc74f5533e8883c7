"""Language models as judges."""

import json
import zlib
from typing import Any

from bae_lens.comsem.client import ChatClient
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
)
from bae_lens.comsem.together import together

TOP_LOGPROBS = 5  # alternatives among which yes and no are looked for; servers allow 5 at least
# Tokens of an answer that are expected, and at most allowed, per verdict: one that is cut off is lost.
SINGLE_TOKENS, STRUCTURED_TOKENS = (2, 64), (7, 16)


class LanguageModelJudge:
    """A chat model that describes and judges; `client` may be shared between several."""

    needs_background = False

    def __init__(self, model: str, client: ChatClient, temperature: float | None = 0.0, logprobs: bool = True) -> None:
        self.name, self.client = model, client
        self._options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {}

    def prepare(self, background: list[Instance]) -> None:
        """A language model has seen ordinary tokens before."""

    async def describe(self, examples: list[Instance], marked: bool) -> str | None:
        expected, allowed = DESCRIPTION_TOKENS
        request = self._request(describe_messages(examples, marked), allowed)
        answer = await self.client.ask(request, expected, may_be_cut=True)
        if answer.text is None:
            # Each of its own, because questions with the same description about the same token are asked once.
            own = zlib.crc32(json.dumps(request["messages"]).encode())
            return UNKNOWN_DESCRIPTION.format(own) if self.client.dry else None
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
