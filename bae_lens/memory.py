"""Memory of a device or the host that did not suffice: how it is recognized, and told."""

import torch

ON_CPU = "DefaultCPUAllocator: "  # in torch's RuntimeError, which has no kind of its own


def is_shortage(error: BaseException) -> bool:
    """Whether the error says that memory did not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or ON_CPU in str(error)


def shortage_sentence(error: BaseException) -> str:
    """What to do about a shortage, with what was asked for."""
    asked = str(error) or type(error).__name__
    asked = asked[max(0, asked.find(ON_CPU)) :]
    asked = ". ".join(asked.split(". ")[:3])  # torch goes on to advise of its allocator
    return (
        f"what is at work must fit in memory, got {asked}; choose a smaller batch, dictionary or model, a narrower "
        "dtype, or more devices"
    )
