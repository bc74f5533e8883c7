import asyncio

import pytest

from bae_lens.comsem.judges.together import together


async def answer(value, seconds, done):
    await asyncio.sleep(seconds)
    done.append(value)
    if isinstance(value, Exception):
        raise value
    return value


def test_results_come_in_order():
    assert asyncio.run(together([answer(1, 0.02, []), answer(2, 0.0, [])])) == [1, 2]


def test_an_error_waits_for_what_is_on_its_way():
    done = []
    with pytest.raises(ValueError, match="first"):
        asyncio.run(together([answer(ValueError("first"), 0.0, done), answer(2, 0.02, done)]))
    assert done[-1] == 2
