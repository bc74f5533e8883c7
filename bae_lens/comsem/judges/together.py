"""Many coroutines at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. If some raise, the others end first, so that no answer on its way is lost."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # pyright: ignore[reportReturnType]
