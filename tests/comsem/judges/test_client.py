"""What a server may send, and what it may cost; `test_language_model` has the ordinary cases."""

import asyncio
import gzip
import json
import sqlite3
import time

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import FAILURES_IN_A_ROW, ChatClient
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.prompts import single_fault
from bae_lens.comsem.judges.spending import Budget, BudgetSpentError, Price, estimate_input_tokens

CAT = Instance.from_marked("A <<cat>> sat.")


def request(number: int, model: str = "m") -> dict:
    message = {"role": "user", "content": f"question {number}"}
    return {"model": model, "messages": [message], "max_completion_tokens": 64}


def ask(client: ChatClient, numbers, model: str = "m", fault=None) -> list:
    """Answers or exceptions, one after another."""

    async def work():
        found = []
        for number in numbers:
            try:
                found.append(await client.ask(request(number, model), 2, fault))
            except (ValueError, OSError) as error:
                found.append(error)
        await client.close()
        return found

    return asyncio.run(work())


def judged(judge: LanguageModelJudge, n=1) -> list:
    async def work():
        try:
            return await judge.judge("animals", [CAT] * n, "marked token")
        finally:
            await judge.close()

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)


def test_answers_that_are_none_are_billed_and_no_retry_starts_beyond_the_budget(chat_server):
    usage = {"prompt_tokens": 400, "completion_tokens": 100}
    chat_server.raw = lambda _: json.dumps({"choices": [], "usage": usage}).encode()
    client = ChatClient(chat_server.url, budget=Budget(tokens=5000), concurrency=1)
    assert isinstance(ask(client, [1, 2])[-1], BudgetSpentError)
    spent = client.usage.input_tokens + client.usage.output_tokens
    assert 4000 < spent == 500 * chat_server.received <= 5000


@pytest.mark.parametrize("usage", [{"prompt_tokens": -400}, {"prompt_tokens": float("nan"), "completion_tokens": 1}])
def test_usage_that_is_no_number_ends_no_budget_later(chat_server, usage):
    chat_server.usage = usage
    client = ChatClient(chat_server.url, budget=Budget(tokens=300), concurrency=1)
    answers = ask(client, range(60))
    assert isinstance(answers[-1], BudgetSpentError)
    assert client.usage.input_tokens == sum(estimate_input_tokens(body) for body in chat_server.bodies)
    assert client.usage.output_tokens == 2 * chat_server.received


@pytest.mark.parametrize("fault", ["cut", "hang"])
def test_what_breaks_off_on_its_way_counts_as_the_longest_answer(chat_server, fault):
    chat_server.fault = lambda _: fault
    client = ChatClient(chat_server.url, max_retries=1, timeout=0.3, prices={"m": Price(0.0, 1e6)})
    assert ask(client, [1])[0].text is None
    assert (client.usage.output_tokens, client.usage.cost) == (2 * 64, 2 * 64)
    assert client.failures == {"no connection" if fault == "cut" else "timeout": 1}


def test_nothing_is_counted_for_what_was_never_sent():
    client = ChatClient("http://127.0.0.1:9/v1", max_retries=1, timeout=1.0)
    assert ask(client, [1])[0].text is None
    assert (client.usage.input_tokens, client.failures) == (0, {"no connection": 1})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"cost": float("nan")}, r"a budget must be at least 0, got nan \(cost\)"),
        ({"cost": -1.0}, "got -1"),
        ({"tokens": -1}, r"got -1 \(tokens\)"),
    ],
)
def test_a_budget_that_nothing_reaches_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -1.0])
def test_a_price_is_a_number(price):
    with pytest.raises(ValueError, match="the price of output tokens must be a number of at least 0"):
        Price(1.0, price)


def test_an_answer_that_drips_ends(chat_server):
    chat_server.seconds_a_byte = 0.1
    start = time.monotonic()
    client = ChatClient(chat_server.url, timeout=0.5, max_retries=0)
    assert ask(client, [1])[0].text is None
    assert time.monotonic() - start < 5
    assert client.failures == {"timeout": 1}


@pytest.mark.parametrize("status", ["200", "500"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_is_read_no_further(chat_server, cache_file, status, packed):
    body = json.dumps({"choices": [{"message": {"content": "a" * 10_000_000}}]}).encode()
    chat_server.raw = lambda _: gzip.compress(body) if packed else body
    chat_server.headers = {"Content-Encoding": "gzip"} if packed else {}
    cache = AnswerCache(cache_file)
    client = ChatClient(chat_server.url, cache, max_retries=0, max_answer_bytes=100_000)
    if status == "200":
        assert ask(client, [1])[0].text is None
        assert client.failures == {"too long": 1}
        assert client.usage.output_tokens == 64
    else:
        chat_server.fault = lambda _: "500"
        assert ask(client, [1])[0].text is None
    assert len(cache) == 0
    cache.close()


def test_verdicts_that_python_cannot_read_are_unparsable_and_not_kept(chat_server, cache_file):
    cache = AnswerCache(cache_file)
    chat_server.answer = lambda _: "[" * 200_000
    client = ChatClient(chat_server.url, cache)
    (verdict,) = judged(LanguageModelJudge("m", client))
    assert (verdict.yes, verdict.failed, len(cache)) == (None, False, 0)
    assert (client.unparsable, client.usage.failed) == ({"no verdicts": 1}, 0)
    chat_server.answer = lambda _: '{"1": "yes"}'
    assert judged(LanguageModelJudge("m", ChatClient(chat_server.url, cache)))[0].yes is True
    assert len(cache) == 1
    cache.close()


@pytest.mark.parametrize("text", ["[" * 10, "Yes, it does", "", 3, None, "yes \ud83d"])
def test_what_an_earlier_version_kept_and_nobody_can_read_is_asked_again(chat_server, text):
    cache = AnswerCache()
    cache.put({"server": chat_server.url, **request(1)}, {"text": text, "probabilities": []})
    client = ChatClient(chat_server.url, cache)
    assert ask(client, [1], fault=single_fault)[0].text == "Yes"
    assert (chat_server.received, client.usage.cached) == (1, 0)
    assert ask(client, [1], fault=single_fault)[0].text == "Yes"
    assert chat_server.received == 1


def test_questions_that_a_model_always_leaves_empty_end_no_later_run(chat_server):
    def answer(body):
        return "" if int(body["messages"][0]["content"].split()[1]) % 3 == 0 else "Yes"

    chat_server.answer = answer
    cache = AnswerCache()
    for _ in range(2):
        client = ChatClient(chat_server.url, cache, concurrency=1)
        answers = ask(client, range(60))
        assert sum(answer.text is None for answer in answers) == client.usage.failed == 20
        assert client.failures == {"empty": 20}


def test_a_model_that_only_ever_answers_with_nothing_is_given_up_though_another_answers(chat_server):
    chat_server.answer = lambda body: "Yes" if body["model"] == "m" else ""
    client = ChatClient(chat_server.url, concurrency=1)
    ask(client, range(3))
    answers = ask(client, range(60), model="other")
    assert isinstance(answers[-1], OSError)
    assert sum(body["model"] == "other" for body in chat_server.bodies) == FAILURES_IN_A_ROW


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"message": {"content": None, "refusal": "I cannot"}}, "refused"),
        ({"message": {"content": ""}, "finish_reason": "content_filter"}, "filtered"),
        ({"message": {"content": ""}, "finish_reason": "length"}, "cut off"),
        ({"message": {"content": "<think>Is it"}, "finish_reason": "length"}, "cut off"),
        ({"message": {"content": None, "tool_calls": []}, "finish_reason": "tool_calls"}, "empty"),
        ({"message": {"content": "<think>Is it"}, "finish_reason": "max_tokens"}, "cut off"),
    ],
)
def test_answers_of_no_use_fail_by_their_kind(chat_server, choice, kind):
    chat_server.raw = lambda _: json.dumps({"choices": [choice]}).encode()
    client = ChatClient(chat_server.url)
    assert ask(client, [1])[0].text is None
    assert client.failures == {kind: 1}
    assert client.usage.output_tokens > 0


def test_a_server_that_answers_with_the_key_finds_it_nowhere(chat_server, cache_file, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat_server.answer = lambda _: "your key is sk-secret"
    cache = AnswerCache(cache_file)
    client = ChatClient(chat_server.url, cache)
    assert ask(client, [1])[0].text == "your key is ***"
    cache.close()
    kept = b"".join(path.read_bytes() for path in cache_file.parent.iterdir())
    assert b"your key is" in kept
    assert b"sk-secret" not in kept


@pytest.mark.parametrize("key", ["sk-secret\r", " sk-secret\n"])
def test_white_space_around_a_key_is_none_of_it(chat_server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert ask(ChatClient(chat_server.url), [1])[0].text == "Yes"
    assert chat_server.keys == {"Bearer sk-secret"}


@pytest.mark.parametrize("key", ["sk-\rsecret", "sk-secr\u00e9t", "sk-\x7fsecret"])
def test_a_key_that_no_header_can_hold_is_named_at_once(chat_server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    (error,) = ask(ChatClient(chat_server.url), [1])
    assert "OPENAI_API_KEY holds a character that no key has" in str(error)
    assert key not in str(error)
    assert chat_server.received == 0


@pytest.mark.parametrize("url", ["here", "http://", "ftp://a/v1", "http://a:port/v1", "http://[::1/v1", "file:///v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="base_url must be an address"):
        ChatClient(url)


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("nan")}, {"max_answer_bytes": 0}])
def test_limits_are_numbers_over_0(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be "):
        ChatClient("http://127.0.0.1:9/v1", **options)


def reasoner(body):
    """Answers only where there is room for 700 tokens of reasoning, which count."""
    limit = body.get("max_completion_tokens") or body["max_tokens"]
    return "<think>" + "Hm. " * limit if limit < 700 else '<think>Both sat.</think>\n```json\n{"1": "yes"}\n```'


def test_a_model_that_reasons_judges_where_it_has_room_and_the_option_is_named_where_not(chat_server):
    chat_server.answer = reasoner
    judge = LanguageModelJudge(
        "m", ChatClient(chat_server.url), temperature=None, logprobs=False, reasoning_tokens=2000
    )
    assert judged(judge)[0].yes is True
    assert chat_server.bodies[0]["max_completion_tokens"] == 2016
    with judge.client.dry_run() as usage:
        judged(judge, n=2)
    assert usage.output_tokens == 2 * 7 + 2000
    chat_server.fault = lambda _: "truncated"
    client = ChatClient(chat_server.url, concurrency=1)
    answers = ask(client, range(FAILURES_IN_A_ROW))
    assert "cut off at its limit of 64 tokens; reasoning_tokens raises it" in str(answers[-1])
    with pytest.raises(ValueError, match="reasoning_tokens must be at least 0"):
        LanguageModelJudge("m", client, reasoning_tokens=-1)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"answer_format": "json_object"}, {"response_format": {"type": "json_object"}}),
        ({"answer_format": "text"}, {"response_format": None}),
        ({"limit_name": "max_tokens"}, {"max_tokens": 16, "max_completion_tokens": None}),
    ],
)
def test_servers_of_fewer_or_older_options_can_be_used(chat_server, options, fields):
    chat_server.answer = lambda _: "1. Yes"
    client = ChatClient(chat_server.url, budget=Budget(tokens=1000))
    assert judged(LanguageModelJudge("m", client, **options))[0].yes is True
    (body,) = chat_server.bodies
    assert {name: body.get(name) for name in fields} == fields


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("'response_format' of type 'json_schema' is not supported", "answer_format is what is asked for"),
        ("Unrecognized request argument: max_completion_tokens", "limit_name is what the limit"),
        ("'temperature' does not support 0.0 with this model", "temperature None leaves it out"),
        ("logprobs are not available", "logprobs False leaves them out"),
    ],
)
def test_a_refusal_of_a_parameter_names_the_option_that_helps(chat_server, complaint, remedy):
    chat_server.fault = lambda _: "400"
    chat_server.complaint = complaint
    with pytest.raises(ValueError, match=remedy):
        judged(LanguageModelJudge("m", ChatClient(chat_server.url)))


def test_a_cache_that_fails_ends_the_run_and_asks_nothing_else(chat_server):
    class Full(AnswerCache):
        def put(self, request, answer):  # noqa: ARG002
            raise OSError("no space is left")

    client = ChatClient(chat_server.url, Full(), concurrency=1)
    first, second = ask(client, [1, 2])
    assert "no space is left" in str(first) == str(second)
    assert chat_server.received == 1


def test_trouble_with_the_cache_is_named_and_never_to_be_removed(cache_file, monkeypatch):
    monkeypatch.setattr("bae_lens.comsem.judges.answer_cache.SECONDS_TO_WAIT", 0.1)
    cache = AnswerCache(cache_file)
    cache.put({"a": 1}, {"text": "paid"})
    holder = sqlite3.connect(cache_file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match=r"is locked by another process; wait for it") as locked:
        cache.put({"a": 2}, {"text": "paid"})
    holder.execute("ROLLBACK")
    cache._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match=r"no space is left for .*; make room") as full:
        cache.put({"a": 3}, {"text": "paid" * 10_000})
    assert cache.get({"a": 1}) == {"text": "paid"}
    cache.close()
    holder.execute("DROP TABLE answers")
    holder.execute("CREATE TABLE answers (something TEXT)")
    holder.close()
    with pytest.raises(ValueError, match="is not a cache of answers") as other:
        AnswerCache(cache_file)
    assert not any("remove" in str(error.value) for error in (locked, full, other))
