import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bae_lens.comsem.judges.answer_cache
from bae_lens.comsem.judges.answer_cache import AnswerCache

WRITER = """
import os, runpy, signal, sys
from pathlib import Path
cache = runpy.run_path(sys.argv[2])["AnswerCache"](Path(sys.argv[1]))
for number in range(100):
    cache.put({"number": number}, {"text": str(number)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_answer_belongs_to_the_whole_request(cache_file):
    cache = AnswerCache(cache_file)
    cache.put({"model": "a", "messages": ["x"]}, {"text": "yes"})
    assert cache.get({"messages": ["x"], "model": "a"}) == {"text": "yes"}
    assert cache.get({"model": "b", "messages": ["x"]}) is None
    assert cache.get({"model": "a", "messages": ["x"], "temperature": 0.0}) is None
    assert len(cache) == 1
    cache.close()


def test_every_answer_survives_a_kill(cache_file):
    command = [sys.executable, "-c", WRITER, str(cache_file), str(Path(bae_lens.comsem.judges.answer_cache.__file__))]
    assert subprocess.run(command, check=False).returncode == -9
    cache = AnswerCache(cache_file)
    assert [cache.get({"number": number}) for number in range(100)] == [{"text": str(n)} for n in range(100)]
    cache.close()


def test_two_processes_share_a_file(cache_file):
    first, second = AnswerCache(cache_file), AnswerCache(cache_file)
    first.put({"a": 1}, {"text": "x"})
    second.put({"a": 2}, {"text": "y"})
    assert (second.get({"a": 1}), first.get({"a": 2})) == ({"text": "x"}, {"text": "y"})
    first.close()
    second.close()


def test_another_file_is_refused(cache_file):
    cache_file.write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(ValueError, match="is not a cache of answers"):
        AnswerCache(cache_file)


def test_cache_is_in_memory_without_a_path():
    cache = AnswerCache()
    cache.put({"a": 1}, {"text": "x"})
    assert cache.get({"a": 1}) == {"text": "x"}
    cache.close()
    with pytest.raises(sqlite3.ProgrammingError):
        cache.get({"a": 1})


def test_answers_are_kept_from_another_thread():
    cache = AnswerCache()
    with ThreadPoolExecutor(1) as pool:  # where a notebook's questions are asked
        pool.submit(cache.put, {"question": 1}, {"text": "yes"}).result()
    assert cache.get({"question": 1}) == {"text": "yes"}


def test_path_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder cannot be opened .*; choose another file"):
        AnswerCache(tmp_path / "folder")
