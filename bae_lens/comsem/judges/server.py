"""A server that speaks the OpenAI protocol, by the SDK of that name: every attempt ends, and what is billed is told.

The one module that needs the extra bae-lens[comsem].
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from bae_lens.comsem.judges.completion import Completion, read_completion

ENCODING = ("content-encoding", "content-length", "transfer-encoding")  # of what has been decoded

Request = dict[str, Any]


class CallFailedError(Exception):
    """A call without an answer, after all retries."""

    def __init__(self, kind: str, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.status = kind, reason, status


class Server:
    """Chat completions of one server.

    Retries are the SDK's own, which follow the server's Retry-After. An answer is waited for `timeout` seconds, and for
    its rest as long again. One that is no completion, does not come whole or is longer than `max_bytes` is retried too.
    `may_send` is asked before each attempt. `billed` is told of each that may have been: with the answer, or None where
    it broke off on its way.
    """

    def __init__(
        self,
        url: str,
        key: str,
        max_retries: int,
        timeout: float,
        max_bytes: int,
        may_send: Callable[[], bool],
        billed: Callable[[Request, Completion | None], None],
    ) -> None:
        http_client = _Attempts(timeout, max_bytes, may_send, billed)
        self._sdk = openai.AsyncOpenAI(
            api_key=key, base_url=url, max_retries=max_retries, timeout=timeout, http_client=http_client
        )

    async def ask(self, request: Request) -> Completion:
        """Raises CallFailedError without an answer, with the status where the server refused."""
        try:
            response = await self._sdk.chat.completions.with_raw_response.create(**request)
        except openai.APIStatusError as error:
            raise CallFailedError(f"status {error.status_code}", error.message, error.status_code) from error
        except openai.APITimeoutError as error:
            raise CallFailedError("timeout", f"no answer in time ({error.message})") from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, _UnusableError):
                raise CallFailedError(error.__cause__.kind, str(error.__cause__)) from error
            raise CallFailedError("no connection", error.message) from error
        return read_completion(response.content)

    async def close(self) -> None:
        """Ends all connections."""
        await self._sdk.close()


class _UnusableError(httpx2.RequestError):
    """An answer that came and is none; the SDK retries it like a lost connection."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class _Attempts(openai.DefaultAsyncHttpxClient):
    def __init__(
        self,
        seconds: float,
        max_bytes: int,
        may_send: Callable[[], bool],
        billed: Callable[[Request, Completion | None], None],
    ) -> None:
        super().__init__(timeout=seconds)
        self._seconds, self._max_bytes = seconds, max_bytes
        self._may_send, self._billed = may_send, billed

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        if not self._may_send():
            return httpx2.Response(402, headers={"x-should-retry": "false"}, request=request)
        asked = json.loads(request.content)
        try:
            response = await asyncio.wait_for(self._read(request, options), 2 * self._seconds)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout):
            raise
        except asyncio.TimeoutError as error:
            self._billed(asked, None)
            raise httpx2.ReadTimeout(f"over {2 * self._seconds:g} seconds", request=request) from error
        except httpx2.RequestError:
            self._billed(asked, None)
            raise
        if response.is_success:
            completion = read_completion(response.content)
            self._billed(asked, completion)
            if completion.text is None:
                reason = completion.complaint or "an answer was no completion"
                raise _UnusableError("no completion", reason)
        return response

    async def _read(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        response = await super().send(request, **{**options, "stream": True})
        try:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    raise _UnusableError("too long", f"an answer was longer than {self._max_bytes:,} bytes")
        finally:
            await response.aclose()
        headers = {name: value for name, value in response.headers.items() if name not in ENCODING}
        return httpx2.Response(response.status_code, headers=headers, content=b"".join(parts), request=request)
