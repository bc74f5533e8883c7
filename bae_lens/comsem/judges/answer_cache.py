"""Answers that were paid for once: an SQLite file, keyed by the whole request, that survives a kill."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, answer TEXT NOT NULL)"


class AnswerCache:
    """A dictionary from requests to answers, both JSON objects, in a file or (with None) in memory.

    Every answer is committed when it is put in, so that a killed process loses at most those on their way. Several
    processes may share a file. Raises ValueError for a file that is something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        # In a notebook the answers come in another thread; there is one at a time.
        options: dict[str, Any] = {"timeout": 60, "isolation_level": None, "check_same_thread": False}
        try:
            self._connection = sqlite3.connect(path or ":memory:", **options)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} cannot be opened ({error}); choose another file") from error
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path} is not a cache of answers ({error}); remove it or choose another file") from error

    def get(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to the same request, if it was asked before."""
        row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (fingerprint(request),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps an answer."""
        row = (fingerprint(request), json.dumps(request), json.dumps(answer))
        self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def __len__(self) -> int:
        return self._connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


def fingerprint(request: dict[str, Any]) -> str:
    """Of the whole request, whatever the order of its parts."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
