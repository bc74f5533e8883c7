import asyncio
import socket
import sys
from urllib.parse import urlsplit

import pytest

from bae_lens.comsem import ComSem
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import ChatClient
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.local_server import LOCAL_MODEL, _packaged, local_label, local_server


def test_missing_server_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r"bae-lens\[local-judge\]"), local_server():
        pass


def test_a_file_is_known_by_its_content(tmp_path):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF1")
    other.write_bytes(b"GGUF2")
    assert local_label(one).startswith("one ")
    assert local_label(one).split()[1] != local_label(other).split()[1]


@pytest.mark.slow
def test_one_feature_end_to_end_on_the_real_wire(word_model, known_sae, word_texts, monkeypatch):
    from bae_lens.comsem.judges.self_test import run_self_test
    from bae_lens.comsem.judges.self_test_cases import CASES

    async def few_cases(judge, question):  # 20 groups of cases take the small model minutes
        return await run_self_test(judge, question, CASES[:1])

    monkeypatch.setattr("bae_lens.comsem.score.run_self_test", few_cases)
    with local_server(_packaged()) as url:  # as a file that a user names
        assert urlsplit(url).hostname == "127.0.0.1"
        client = ChatClient(url, concurrency=1, timeout=600.0)
        comsem = ComSem(
            LanguageModelJudge(LOCAL_MODEL, client),
            corpus=CorpusSettings(tokens=800, context_size=16),
            max_features=1,
            held_out=3,
            baseline_features=0,
            accept_failing_judge=True,
        )
        report = comsem.score(word_model, known_sae, word_texts)
    (feature,) = report.dictionaries[0].features
    assert feature.explanation
    assert feature.failed == feature.unparsable == 0
    assert feature.score is not None
    assert all(judged.verdict.probability is not None for judged in feature.held_out)
    assert report.usage.asked == 4
    assert report.usage.reused_tokens > 0, "requests begin alike"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5)


@pytest.mark.slow
def test_a_second_server_of_the_same_model_is_asked_nothing(cache_file):
    async def ask(client):
        try:
            messages = [{"role": "user", "content": "Say yes."}]
            request = {"model": LOCAL_MODEL, "messages": messages, "max_completion_tokens": 8, "temperature": 0.0}
            return await client.ask(request, 4, lambda _: None)  # the small model goes on and on
        finally:
            await client.close()

    cache = AnswerCache(cache_file)
    with local_server() as first, local_server() as second:
        assert first != second
        clients = [ChatClient(url, cache, timeout=600.0, label=local_label()) for url in (first, second)]
        answers = [asyncio.run(ask(client)) for client in clients]
    assert answers[0].text
    assert answers[0] == answers[1]
    assert [(client.usage.asked, client.usage.cached) for client in clients] == [(1, 0), (0, 1)]
    cache.close()
