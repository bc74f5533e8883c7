"""Pickles and archives of torch that others may have written: no code runs, and none takes more than its own size.

A few hundred bytes of pickle can name parts of parts, which stand for more values than there is memory or time for, and
a compressed archive is larger inside than out. Both are refused before anything is made of them.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLE_BYTES = 2**14  # of settings, or of names and shapes: four tensors take 500
ONE_VALUE = ("STRING", "UNICODE", "UNICODE8", "BYTES", "BYTES8", "GLOBAL")  # opcodes of what may come again end so
OF_ANY_SIZE = ("bytearray", "Tensor")  # what these names make is as large as a number says


def check_pickle(content: bytes) -> None:
    """Raises ValueError for a pickle of more than `PICKLE_BYTES`, or whose values take more than its bytes tell.

    A string may come in several places, as it does in what `pickle.dumps` and `torch.save` write; a container may not.
    """
    if len(content) > PICKLE_BYTES:
        raise ValueError(f"it has more than {PICKLE_BYTES} bytes, which settings do not take")
    is_one_value: dict[Any, bool] = {}
    before = ""
    for opcode, argument, _ in pickletools.genops(content):
        name: str = opcode.name
        if name == "MEMOIZE" or name.endswith("PUT"):
            index = len(is_one_value) if argument is None else argument
            if index > len(content):
                raise ValueError(f"it counts {index} parts in {len(content)} bytes")
            is_one_value[index] = before.endswith(ONE_VALUE)
        elif name == "DUP" or (name.endswith("GET") and not is_one_value.get(argument, True)):
            raise ValueError("it holds one container in several places")
        elif name == "BYTEARRAY8" or (name == "GLOBAL" and str(argument).endswith(OF_ANY_SIZE)):
            raise ValueError("it holds numbers whose count it only states")
        before = name


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote to a file, on the CPU, memory-mapped; tensors, or containers of them by `weights_only`.

    Raises ValueError for a file that it did not write in its format since version 1.6, that was compressed since, or
    whose tensors have more values than it holds; for damage and code, what `torch.load` raises.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("torch.save did not write it, or not in the format that it has had since version 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its archive was compressed, and cannot be mapped; save it anew with torch.save")
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    check_pickle(archive.read(entry))
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is damaged ({error})") from error
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for tensor in loaded.values() if isinstance(loaded, dict) else [loaded]:
        if isinstance(tensor, Tensor) and _repeats_itself(tensor):
            raise ValueError(f"its tensor of shape {tuple(tensor.shape)} repeats its values; save it contiguous")
    return loaded


def _repeats_itself(tensor: Tensor) -> bool:
    """Whether a tensor of plain numbers has more of them than its storage, as `expand` makes one."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
