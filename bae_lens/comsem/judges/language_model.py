"""Language models as judges."""

import json
import zlib
from functools import partial
from typing import Any, Literal

from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.judges import few_shot
from bae_lens.comsem.judges.client import ChatClient
from bae_lens.comsem.judges.intruder import choice_fault, intruder_messages, read_choice
from bae_lens.comsem.judges.judge import Choice, Prediction, Question, Verdict
from bae_lens.comsem.judges.prompts import (
    EXPLANATION_TOKENS,
    UNKNOWN_EXPLANATION,
    Messages,
    explain_messages,
    explanation_fault,
    read_explanation,
    read_single,
    read_structured,
    single_fault,
    single_messages,
    structured_fault,
    structured_messages,
    verdict_schema,
    yes_probabilities,
)
from bae_lens.comsem.judges.simulation import LARGEST, expected_activations, simulation_fault, simulation_messages
from bae_lens.comsem.judges.together import together

TOP_LOGPROBS = 5  # alternatives among which yes and no are looked for; servers allow 5 at least
# Tokens of an answer that are expected, and at most allowed, per verdict: one that is cut off is lost.
SINGLE_TOKENS, STRUCTURED_TOKENS = (2, 64), (7, 16)
LINE_TOKENS = (5, 16)  # the same, per line of a simulation
NEEDS_LOGPROBS = "needs log-probabilities; use a server that gives them, or leave simulation out"

AnswerFormat = Literal["json_schema", "json_object", "text"]
"""What a server is asked for where several verdicts come in one answer: an object of this schema, any JSON object, or
nothing but what the question says."""

LimitName = Literal["max_completion_tokens", "max_tokens"]
"""What a server calls the most tokens that an answer may have."""


class LanguageModelJudge:
    """A chat model that explains and judges; `client` may be shared between several.

    A model that reasons before it answers needs room: `reasoning_tokens` are added to what each answer may have, and in
    estimates to what it is expected to have. `temperature` None and `logprobs` False are for models that take neither,
    `answer_format` and `limit_name` for servers of fewer or older options. With `worked_examples` tokens are asked
    about one at a time, after examples; see `few_shot`. Small models judge better so, and a server that keeps what
    requests share reads the examples once; others bill them each time.
    """

    needs_background = False

    def __init__(
        self,
        model: str,
        client: ChatClient,
        temperature: float | None = 0.0,
        logprobs: bool = True,
        reasoning_tokens: int = 0,
        answer_format: AnswerFormat = "json_schema",
        limit_name: LimitName = "max_completion_tokens",
        worked_examples: bool = False,
    ) -> None:
        """Raises ValueError for a negative number of reasoning tokens."""
        if reasoning_tokens < 0:
            raise ValueError(f"reasoning_tokens must be at least 0, got {reasoning_tokens}")
        self.name, self.client = model, client
        self._options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {}
        self._reasoning_tokens, self._answer_format, self._limit_name = reasoning_tokens, answer_format, limit_name
        self.worked_examples = worked_examples

    def prepare(self, background: list[Instance]) -> None:
        """A language model has seen ordinary tokens before."""

    async def explain(self, examples: list[Instance], marked: bool) -> str | None:
        expected, allowed = EXPLANATION_TOKENS
        request = self._request(self._explain_messages(examples, marked), allowed)
        answer = await self.client.ask(request, expected + self._reasoning_tokens, explanation_fault)
        if answer.text is None:
            # Each of its own, because questions with the same explanation about the same token are asked once.
            own = zlib.crc32(json.dumps(request["messages"]).encode())
            return UNKNOWN_EXPLANATION.format(own) if self.client.dry else None
        return read_explanation(answer.text)

    async def judge(self, explanation: str, instances: list[Instance], question: Question) -> list[Verdict]:
        if question == "token" or (question == "marked token" and self.worked_examples):
            return await together([self._judge_one(explanation, instance, question) for instance in instances])
        expected, allowed = STRUCTURED_TOKENS
        n = len(instances)
        request = self._request(structured_messages(explanation, instances, question), n * allowed)
        request |= self._response_format(n) | self._logprobs
        answer = await self.client.ask(
            request,
            n * expected + self._reasoning_tokens,
            partial(structured_fault, n=n),
            partial(yes_probabilities, structured=True),
        )
        if answer.text is None:
            return [Verdict(None, failed=True)] * n
        probabilities = answer.probabilities if len(answer.probabilities) == n else [None] * n
        verdicts = zip(read_structured(answer.text, n), probabilities, strict=True)
        return [Verdict(yes, probability) for yes, probability in verdicts]

    def _explain_messages(self, examples: list[Instance], marked: bool) -> Messages:
        if not self.worked_examples:
            return explain_messages(examples, marked)
        return few_shot.explain_marked_messages(examples) if marked else few_shot.explain_messages(examples)

    async def _judge_one(self, explanation: str, instance: Instance, question: Question) -> Verdict:
        expected, allowed = SINGLE_TOKENS
        ask = few_shot.single_messages if self.worked_examples else single_messages
        if question == "marked token":
            ask = few_shot.marked_messages
        request = self._request(ask(explanation, instance), allowed) | self._logprobs
        answer = await self.client.ask(request, expected + self._reasoning_tokens, single_fault)
        if answer.text is None:
            return Verdict(None, failed=True)
        return Verdict(read_single(answer.text), answer.probabilities[0] if answer.probabilities else None)

    async def simulate(self, explanation: str, excerpts: list[Excerpt]) -> list[Prediction]:
        if not self._logprobs:
            raise ValueError(f"simulation {NEEDS_LOGPROBS}; {self.name} is not asked for any (logprobs False)")
        return await together([self._simulate_one(explanation, excerpt) for excerpt in excerpts])

    async def _simulate_one(self, explanation: str, excerpt: Excerpt) -> Prediction:
        expected, allowed = LINE_TOKENS
        n = len(excerpt.tokens)
        request = self._request(simulation_messages(explanation, excerpt), n * allowed)
        request |= self._logprobs | {"top_logprobs": LARGEST + 1}
        answer = await self.client.ask(
            request,
            n * expected + self._reasoning_tokens,
            partial(simulation_fault, n=n),
            expected_activations,
            needs_logprobs=True,
        )
        if answer.text is None:
            return Prediction(None, failed=True)
        return Prediction(answer.probabilities if len(answer.probabilities) == n else None)

    async def find_intruder(self, instances: list[Instance]) -> Choice:
        expected, allowed = SINGLE_TOKENS
        n = len(instances)
        request = self._request(intruder_messages(instances), allowed)
        answer = await self.client.ask(request, expected + self._reasoning_tokens, partial(choice_fault, n=n))
        return Choice(None, failed=True) if answer.text is None else Choice(read_choice(answer.text, n))

    def _response_format(self, n: int) -> dict[str, Any]:
        if self._answer_format == "text":
            return {}
        form = verdict_schema(n) if self._answer_format == "json_schema" else {"type": self._answer_format}
        return {"response_format": form}

    def _request(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        limit = {self._limit_name: max_tokens + self._reasoning_tokens}
        return {"model": self.name, "messages": messages, **limit, **self._options}

    async def close(self) -> None:
        await self.client.close()
