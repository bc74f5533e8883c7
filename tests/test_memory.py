import pytest
import torch

from bae_lens.memory import is_shortage, shortage_sentence


def no_room_on_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**14)
    return raised.value


def test_what_each_library_raises_for_too_little_memory_is_a_shortage():
    assert is_shortage(no_room_on_the_cpu())
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_shortage(MemoryError())
    assert not is_shortage(RuntimeError("a bug in memory"))
    assert not is_shortage(ValueError("out of memory"))


def test_the_sentence_begins_where_torch_says_what_was_asked_for():
    said = shortage_sentence(no_room_on_the_cpu())
    assert said.startswith(
        "what is at work must fit in memory, got DefaultCPUAllocator: can't allocate memory: you tried"
    )
    assert shortage_sentence(MemoryError()).startswith("what is at work must fit in memory, got MemoryError; choose a ")
