import asyncio
import json
import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import FAILURES_IN_A_ROW, ChatClient
from bae_lens.comsem.judges.judge import Choice, Prediction
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.spending import Budget, BudgetSpentError, Price
from bae_lens.comsem.judges.together import together

CASES = [Instance(f"sentence number {number} ends", (9, 15), [(9, 15)]) for number in range(6)]


def request(number: int) -> dict:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": f"question {number}"}],
        "max_completion_tokens": 8,
        "temperature": 0.0,
    }


def ask_all(client: ChatClient, numbers) -> list:
    async def work():
        try:
            return await together([client.ask(request(number), 2) for number in numbers])
        finally:
            await client.close()

    return asyncio.run(work())


def finished(judge: LanguageModelJudge, question):
    async def work():
        try:
            return await question
        finally:
            await judge.close()

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The SDK waits half a second and more before a retry, which says nothing here."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)


def faults(**shares: float) -> Callable[[int], str | None]:
    """The same faults for the same request numbers, in these shares."""

    def fault(number: int) -> str | None:
        draw = (number * 0.6180339887) % 1
        for name, share in shares.items():
            if draw < share:
                return name.removeprefix("status")
            draw -= share
        return None

    return fault


def test_nothing_is_lost_and_nothing_asked_twice_with_faults(chat_server, cache_file):
    chat_server.fault = faults(
        status429=0.15, status503=0.1, drop=0.05, cut=0.03, slow=0.03, malformed=0.05, empty=0.05
    )
    chat_server.answer = lambda body: body["messages"][0]["content"].replace("question", "answer")
    cache = AnswerCache(cache_file)
    client = ChatClient(chat_server.url, cache, concurrency=16, max_retries=16)
    answers = ask_all(client, range(200))
    assert [answer.text for answer in answers] == [f"answer {number}" for number in range(200)]
    assert len(chat_server.answered) == 200
    assert set(chat_server.answered.values()) == {1}
    assert chat_server.received > 250
    assert (client.usage.asked, client.usage.failed) == (200, 0)
    cache.close()


def test_a_second_run_asks_nothing(chat_server, cache_file):
    cache = AnswerCache(cache_file)
    first = ask_all(ChatClient(chat_server.url, cache), range(20))
    client = ChatClient(chat_server.url, cache)
    assert ask_all(client, range(20)) == first
    assert chat_server.received == 20
    assert (client.usage.asked, client.usage.cached, client.usage.input_tokens) == (0, 20, 0)
    cache.close()


def test_a_server_with_a_label_may_move(chat_server, cache_file):
    cache = AnswerCache(cache_file)
    first = ask_all(ChatClient(chat_server.url, cache, label="the same model"), range(5))
    elsewhere = "http://127.0.0.1:9/v1"  # where nobody answers
    client = ChatClient(elsewhere, cache, label="the same model", max_retries=0, timeout=1.0)
    assert ask_all(client, range(5)) == first
    assert (client.usage.asked, client.usage.cached) == (0, 5)
    other = ChatClient(elsewhere, cache, label="another model")
    with other.dry_run() as usage:
        ask_all(other, range(5))
    assert (usage.asked, usage.cached) == (5, 0)
    cache.close()


def test_equal_questions_at_the_same_time_are_asked_once(chat_server):
    chat_server.latency = 0.05
    answers = ask_all(ChatClient(chat_server.url), [1, 1, 1, 2])
    assert [answer.text for answer in answers] == ["Yes"] * 4
    assert chat_server.received == 2


def test_requests_at_a_time_are_limited(chat_server):
    chat_server.latency = 0.05
    start = time.monotonic()
    ask_all(ChatClient(chat_server.url, concurrency=2), range(8))
    assert time.monotonic() - start > 0.2


def test_retry_after_is_respected(chat_server):
    chat_server.fault = lambda number: "429" if number == 0 else None
    chat_server.retry_after = "1"
    times = []
    handle = chat_server.handle
    chat_server.handle = lambda request: (times.append(time.monotonic()), handle(request))
    ask_all(ChatClient(chat_server.url), [1])
    assert times[1] - times[0] >= 1


def test_a_refused_key_is_one_clear_error_at_once(chat_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat_server.fault = lambda _: "401"
    client = ChatClient(chat_server.url, concurrency=1)
    with pytest.raises(ValueError, match=r"refused the key \(401\); set OPENAI_API_KEY") as error:
        ask_all(client, range(10))
    assert chat_server.received == 1
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize("status", ["401", "402", "403", "404"])
def test_some_refusals_end_everything_at_once_even_after_answers(chat_server, status):
    chat_server.fault = lambda number: status if number == 3 else None
    message = "knows no model 'm' or no such address" if status == "404" else f"refused.*({status}|told to fail)"
    with pytest.raises(ValueError, match=message):
        ask_all(ChatClient(chat_server.url, concurrency=1), range(10))
    assert chat_server.received == 4


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_refusal_of_one_request_is_that_calls_failure_once_something_was_answered(chat_server, status):
    chat_server.fault = lambda number: status if number == 3 else None
    cache = AnswerCache()
    client = ChatClient(chat_server.url, cache, concurrency=1)
    answers = [answer.text for answer in ask_all(client, range(10))]
    assert answers == ["Yes"] * 3 + [None] + ["Yes"] * 6
    assert (client.usage.failed, client.failures, len(cache)) == (1, {f"status {status}": 1}, 9)
    chat_server.fault = lambda number: status if number == 10 else None
    again = ChatClient(chat_server.url, cache, concurrency=1)  # answers that were kept are answers too
    assert [answer.text for answer in ask_all(again, range(10))] == answers


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_the_same_refusal_of_the_first_request_ends_everything(chat_server, status):
    chat_server.fault = lambda _: status
    with pytest.raises(ValueError, match="refused the request"):
        ask_all(ChatClient(chat_server.url, concurrency=1), range(10))
    assert chat_server.received == 1


def test_a_refused_request_is_told_without_the_key(chat_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat_server.fault = lambda _: "400"
    with pytest.raises(ValueError, match=r"refused the request: .*told to fail, Bearer \*\*\*"):
        ask_all(ChatClient(chat_server.url), [1])
    assert chat_server.received == 1


def test_a_call_that_fails_for_good_is_counted_and_asked_again_next_time(chat_server):
    chat_server.fault = lambda _: "503"
    cache = AnswerCache()
    client = ChatClient(chat_server.url, cache, max_retries=1)
    assert [answer.text for answer in ask_all(client, [1, 2])] == [None, None]
    assert (client.usage.failed, chat_server.received, len(cache)) == (2, 4, 0)
    chat_server.fault = lambda _: None
    assert ask_all(ChatClient(chat_server.url, cache), [1])[0].text == "Yes"


def test_a_dead_server_is_given_up(chat_server):
    chat_server.fault = lambda _: "503"
    client = ChatClient(chat_server.url, max_retries=0, concurrency=1)
    with pytest.raises(OSError, match="times in a row"):
        ask_all(client, range(100))
    assert chat_server.received == FAILURES_IN_A_ROW


@pytest.mark.parametrize(("fault", "kind"), [("truncated", "cut off"), ("blank", "empty"), ("no content", "empty")])
def test_an_answer_that_is_cut_off_or_empty_failed_and_is_asked_again_by_the_next_run(chat_server, fault, kind):
    chat_server.fault = lambda _: fault
    chat_server.answer = lambda _: json.dumps({str(number): "yes" for number in range(1, 7)})
    cache = AnswerCache()
    judge = LanguageModelJudge("m", ChatClient(chat_server.url, cache))
    verdicts = asyncio.run(ask_judge(judge, "marked token"))
    assert [(verdict.yes, verdict.failed) for verdict in verdicts] == [(None, True)] * 6
    assert (judge.client.usage.asked, judge.client.usage.failed, len(cache)) == (1, 1, 0)
    assert judge.client.failures == {kind: 1}
    assert judge.client.usage.output_tokens == 2, "it was paid for"
    chat_server.fault = lambda _: None
    verdicts = asyncio.run(ask_judge(judge, "marked token"))
    assert [verdict.yes for verdict in verdicts] == [True] * 6
    assert (chat_server.received, len(cache)) == (2, 1)


def test_a_description_that_is_cut_off_is_taken_as_far_as_it_goes(chat_server):
    chat_server.fault = lambda _: "truncated"
    chat_server.answer = lambda _: "words about weather\nand so on and on, and on and on"
    judge = LanguageModelJudge("m", ChatClient(chat_server.url))

    async def explain() -> str | None:
        try:
            return await judge.explain([Instance.from_marked("it was <<raining>>")], True)
        finally:
            await judge.client.close()

    assert asyncio.run(explain()) == "words about weather"
    assert judge.client.usage.failed == 0


def test_a_model_whose_answers_are_all_cut_off_is_given_up_with_the_reason(chat_server):
    chat_server.fault = lambda _: "truncated"
    with pytest.raises(OSError, match=r"failed 16 times in a row .* cut off at its limit of 8 tokens"):
        ask_all(ChatClient(chat_server.url, concurrency=1), range(100))
    assert chat_server.received == FAILURES_IN_A_ROW


def test_a_verbose_judge_has_room_to_finish_and_does_not_count_as_yes(chat_server):
    chat_server.answer = lambda _: "Yes, it does."
    verdicts = asyncio.run(ask_judge(LanguageModelJudge("m", ChatClient(chat_server.url)), "token"))
    assert [(verdict.yes, verdict.failed) for verdict in verdicts] == [(None, False)] * 6
    assert all(body["max_completion_tokens"] >= 32 for body in chat_server.bodies)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Ye"}, {"type": "image"}, {"type": "text", "text": "s"}], "Yes"),
        ([{"type": "image"}, "Yes"], None),
        ([], None),
        ({"text": "Yes"}, None),
        (3, None),
    ],
)
def test_content_in_parts_is_joined_and_content_without_text_failed(chat_server, content, text):
    chat_server.answer = lambda _: content
    client = ChatClient(chat_server.url)
    assert ask_all(client, [1])[0].text == text
    assert client.usage.failed == (text is None)


def test_usage_that_is_missing_or_odd_is_estimated(chat_server):
    for usage in (None, {}, {"total_tokens": 3}):
        chat_server.usage = usage
        client = ChatClient(chat_server.url)
        assert ask_all(client, [1])[0].text == "Yes"
        assert client.usage.input_tokens > 0
        assert client.usage.output_tokens == 2


def test_what_a_server_did_not_read_again_is_told(chat_server):
    for reused, counted in ((7, 7), (99, 10), (-1, 0), ("7", 0), (None, 0)):
        chat_server.usage = {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": reused},
        }
        client = ChatClient(chat_server.url)
        ask_all(client, [1])
        assert (client.usage.input_tokens, client.usage.reused_tokens) == (10, counted)


def test_with_worked_examples_marked_tokens_are_asked_about_one_at_a_time(chat_server):
    judge = LanguageModelJudge("m", ChatClient(chat_server.url), worked_examples=True)
    verdicts = asyncio.run(ask_judge(judge, "marked token"))
    assert chat_server.received == len(verdicts) == 6
    assert {len(body["messages"]) for body in chat_server.bodies} == {1 + 2 * 16 + 1}
    assert {verdict.yes for verdict in verdicts} == {True}


async def ask_judge(judge, question):
    try:
        return await judge.judge("animals", CASES, question)
    finally:
        await judge.close()


@pytest.mark.parametrize(("question", "calls"), [("token", 6), ("marked token", 1), ("passage", 1), ("highlights", 1)])
def test_papers_question_takes_a_call_each_and_others_one_for_all(chat_server, question, calls):
    def answer(body):
        if "response_format" in body:
            return json.dumps({str(number): "yes" if number % 2 else "no" for number in range(1, 7)})
        return "No" if any(f"number {odd} " in body["messages"][1]["content"] for odd in (1, 3, 5)) else "yes"

    chat_server.answer = answer
    verdicts = asyncio.run(ask_judge(LanguageModelJudge("m", ChatClient(chat_server.url)), question))
    assert [verdict.yes for verdict in verdicts] == [True, False] * 3
    assert chat_server.received == calls
    assert all(body["temperature"] == 0 for body in chat_server.bodies)


def test_options_that_a_model_does_not_take_are_left_out(chat_server):
    judge = LanguageModelJudge("m", ChatClient(chat_server.url), temperature=None, logprobs=False)
    asyncio.run(ask_judge(judge, "token"))
    assert not {"temperature", "logprobs", "top_logprobs"} & set(chat_server.bodies[0])


def test_budget_stops_before_it_is_exceeded_and_keeps_what_was_done(chat_server):
    cache = AnswerCache()
    client = ChatClient(chat_server.url, cache, concurrency=1, budget=Budget(tokens=100))
    with pytest.raises(BudgetSpentError, match="the budget of 100 tokens is spent"):
        ask_all(client, range(50))
    assert 0 < client.usage.input_tokens + client.usage.output_tokens <= 100
    assert len(cache) == chat_server.received == client.usage.asked
    price = Price(input=1e6, output=2e6)
    client = ChatClient(chat_server.url, cache, concurrency=4, budget=Budget(cost=100.0), prices={"m": price})
    with pytest.raises(BudgetSpentError, match="the budget of 100 is spent"):
        ask_all(client, range(50))
    assert client.usage.cost == client.usage.input_tokens + 2 * client.usage.output_tokens <= 100
    with pytest.raises(ValueError, match="needs the price"):
        ChatClient(chat_server.url, budget=Budget(cost=1.0))


def test_every_model_has_its_price(chat_server):
    prices = {"m": Price(input=1e6, output=0.0), "explainer": Price(input=0.0, output=1e6)}
    client = ChatClient(chat_server.url, prices=prices)

    async def ask(*models):
        await together([client.ask({**request(0), "model": model}, 2) for model in models])
        await client.close()

    asyncio.run(ask("m", "explainer"))
    assert client.usage.cost == 10 + 2
    with client.dry_run() as usage:
        asyncio.run(ask("m", "explainer"))
        assert usage.cost == 0, "both are cached"
    with pytest.raises(ValueError, match="there is no price for other"):
        asyncio.run(ask("other"))
    assert chat_server.received == 2


def test_dry_run_counts_what_would_be_asked_and_what_is_cached(chat_server):
    cache = AnswerCache()
    client = ChatClient(chat_server.url, cache)
    ask_all(client, range(3))
    with client.dry_run() as usage:
        ask_all(client, [*range(10), 9])
    assert (usage.asked, usage.cached, usage.output_tokens) == (7, 3, 14)
    assert chat_server.received == 3
    assert client.usage.asked == 3


def test_the_key_goes_to_the_server_and_nowhere_else(chat_server, cache_file, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    caplog.set_level("DEBUG")
    cache = AnswerCache(cache_file)
    client = ChatClient(chat_server.url.replace("//", "//user:password@") + "?token=sk-query", cache)
    ask_all(client, range(3))
    assert chat_server.keys <= {"Bearer sk-secret", None} | {key for key in chat_server.keys if "Basic" in str(key)}
    cache.close()
    kept = "".join(path.read_bytes().decode("latin-1") for path in cache_file.parent.iterdir())
    for secret in ("sk-secret", "password", "sk-query"):
        assert secret not in kept + client.base_url + repr(vars(client.usage))
    assert "sk-secret" not in caplog.text


def test_a_server_elsewhere_needs_a_key_and_one_here_does_not(chat_server):
    with pytest.raises(ValueError, match=r"https://example\.invalid/v1 needs a key: set .* OPENAI_API_KEY"):
        ask_all(ChatClient("https://example.invalid/v1"), [1])
    ask_all(ChatClient(chat_server.url), [1])
    assert chat_server.keys == {"Bearer none"}
    with pytest.raises(ValueError, match="base_url must be an address"):
        ChatClient("127.0.0.1:80")


ASKER = """
import asyncio, sys
from pathlib import Path
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import ChatClient

client = ChatClient(sys.argv[1], AnswerCache(Path(sys.argv[2])), concurrency=16)

async def ask(number):
    message = {"role": "user", "content": f"question {number}"}
    await client.ask({"model": "m", "messages": [message], "max_completion_tokens": 8, "temperature": 0.0}, 2)

async def work():
    await asyncio.gather(*[ask(number) for number in range(500)])
    await client.close()

asyncio.run(work())
"""


@pytest.mark.slow
def test_after_a_kill_in_the_middle_of_500_calls_the_rest_is_asked_exactly_once(chat_server, cache_file):
    def rows() -> int:
        if not cache_file.exists():
            return 0
        with sqlite3.connect(cache_file) as connection:
            found = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            count = connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0] if found else 0
        connection.close()
        return count

    chat_server.fault = lambda number: None if number < 250 else "hang"
    command = [sys.executable, "-c", ASKER, chat_server.url, str(cache_file)]
    with subprocess.Popen(command) as process:
        while rows() < 250 and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -9
    chat_server.fault = lambda _: None
    subprocess.run(command, check=True)
    assert len(chat_server.answered) == 500
    assert set(chat_server.answered.values()) == {1}
    assert rows() == 500


EXCERPT = Excerpt("the rain fell", [(0, 3), (4, 8), (9, 13)], [0.0, 1.0, 0.0])


def numbers(body, with_logprobs=True, lines=3):
    """A server's answer that gives the second token 8 or 6, as likely as each other, and the others 0."""
    values = [("0", {"0": 1.0}), ("8", {"8": 0.5, "6": 0.5}), ("0", {"0": 1.0})][:lines]
    tokens = []
    for word, (value, likely) in zip(("the", "rain", "fell"), values, strict=False):
        top = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
        tokens += [{"token": f"{word}\t"}, {"token": value, "top_logprobs": top}, {"token": "\n"}]
    choice = {
        "message": {"role": "assistant", "content": "".join(token["token"] for token in tokens)},
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": 0.0, "top_logprobs": [], **token} for token in tokens]},
    }
    if not with_logprobs:
        del choice["logprobs"]
    return json.dumps({"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]}).encode()


def test_simulation_reads_expectations_and_keeps_them(chat_server, cache_file):
    chat_server.raw = numbers
    for _ in range(2):
        judge = LanguageModelJudge("m", ChatClient(chat_server.url, AnswerCache(cache_file)))
        (prediction,) = finished(judge, judge.simulate("kinds of weather", [EXCERPT]))
        assert prediction.activations == pytest.approx([0, 7, 0])
    (body,) = chat_server.bodies
    assert (body["logprobs"], body["top_logprobs"]) == (True, 11)
    assert body["messages"][-1]["content"].endswith("the\nrain\nfell")


def test_a_simulation_that_leaves_tokens_out_is_counted_and_not_scored(chat_server):
    chat_server.raw = lambda body: numbers(body, lines=2)
    judge = LanguageModelJudge("m", ChatClient(chat_server.url))
    assert finished(judge, judge.simulate("kinds of weather", [EXCERPT])) == [Prediction(None)]
    assert judge.client.unparsable == {"not a number for each token": 1}


def test_simulation_without_log_probabilities_is_refused_or_not_kept(chat_server, cache_file):
    judge = LanguageModelJudge("m", ChatClient(chat_server.url), logprobs=False)
    sentence = "simulation needs log-probabilities; use a server that gives them, or leave simulation out; m"
    with pytest.raises(ValueError, match=f"{sentence} is not asked for any"):
        finished(judge, judge.simulate("kinds of weather", [EXCERPT]))
    assert chat_server.received == 0
    chat_server.raw = lambda body: numbers(body, with_logprobs=False)
    judge = LanguageModelJudge("m", ChatClient(chat_server.url))
    for _ in range(2):  # such an answer is not kept
        assert finished(judge, judge.simulate("kinds of weather", [EXCERPT])) == [Prediction(None)]
    assert judge.client.unparsable == {"no log-probabilities": 2}
    judge = LanguageModelJudge("m", ChatClient(chat_server.url, AnswerCache(cache_file)))
    kept = {"text": "the\t0\nrain\t7\nfell\t0", "probabilities": []}  # as it may have been kept before
    judge.client.cache.put({"server": judge.client.label, **chat_server.bodies[0]}, kept)
    chat_server.raw = numbers
    assert finished(judge, judge.simulate("kinds of weather", [EXCERPT])) != [Prediction(None)]
    assert judge.client.usage.cached == 0


def test_the_odd_one_out_is_named_by_its_number(chat_server):
    chat_server.answer = lambda _: "2"
    judge = LanguageModelJudge("m", ChatClient(chat_server.url))
    assert finished(judge, judge.find_intruder(CASES)) == Choice(1)
    assert not {"logprobs", "response_format"} & set(chat_server.bodies[0])
    chat_server.answer = lambda _: "7"
    assert finished(judge, judge.find_intruder(CASES[:5])) == Choice(None)
    assert judge.client.unparsable == {"no number of a case": 1}
    chat_server.answer = lambda _: " "
    assert finished(judge, judge.find_intruder(CASES[:4])) == Choice(None, failed=True)
