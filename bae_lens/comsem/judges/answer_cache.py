"""Answers that were paid for once: an SQLite file, keyed by the whole request, that survives a kill."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, answer TEXT NOT NULL)"
CONTENT = "SELECT key, request, answer FROM answers LIMIT 1"
SECONDS_TO_WAIT = 60  # for another process that is writing


class AnswerCache:
    """A dictionary from requests to answers, both JSON objects, in a file or (with None) in memory.

    Every answer is committed when it is put in, so that a killed process loses at most those on their way. Several
    processes may share a file. Raises ValueError for a file that is something else or damaged, and OSError for one that
    cannot be used at the moment: it is locked, or there is no space.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # In a notebook the answers come in another thread; there is one at a time.
        options: dict[str, Any] = {"timeout": SECONDS_TO_WAIT, "isolation_level": None, "check_same_thread": False}
        try:
            self._connection = sqlite3.connect(path or ":memory:", **options)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} cannot be opened ({error}); choose another file") from error
        try:
            with self._named_trouble():
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=NORMAL")
                self._connection.execute(SCHEMA)
                self._connection.execute(CONTENT)
        except (ValueError, OSError):
            self._connection.close()
            raise

    def get(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to the same request, if it was asked before."""
        with self._named_trouble():
            query = "SELECT answer FROM answers WHERE key = ?"
            row = self._connection.execute(query, (fingerprint(request),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps an answer, in the place of an earlier one."""
        row = (fingerprint(request), json.dumps(request), json.dumps(answer))
        with self._named_trouble():
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def __len__(self) -> int:
        with self._named_trouble():
            return self._connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _named_trouble(self) -> Iterator[None]:
        """Says what is wrong with the file, and never to remove one that may hold answers."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            reason = str(error)
            if "locked" in reason:
                raise OSError(f"{self._path} is locked by another process; wait for it and start again") from error
            if "full" in reason:
                raise OSError(f"no space is left for {self._path}; make room, and the same command goes on") from error
            if "not a database" in reason or "no such column" in reason:
                raise ValueError(f"{self._path} is not a cache of answers ({reason}); choose another file") from error
            if "malformed" in reason:
                raise ValueError(f"{self._path} is damaged ({reason}); choose another file and keep this") from error
            raise OSError(f"{self._path} cannot be used ({reason}); answers so far are kept") from error


def fingerprint(request: dict[str, Any]) -> str:
    """Of the whole request, whatever the order of its parts."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
