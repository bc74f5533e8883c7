"""A device of torch's own, `shadow`, that computes on the CPU and forgives as little as a GPU does.

Operands on another device, generators of another device, products of whole numbers, and values that leave it otherwise
than by being sent for are errors here, as they are there. So what runs on it is fit for a GPU as far as placement goes,
and gives the CPU's numbers. Kernels that a GPU lacks beside the products, and its rounding, are not imitated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "shadow"
DEVICE = torch.device("cpu")  # until `register` knows better
SENDING = ("copy_", "_to_copy", "_copy_from", "set_")  # between devices, by whoever asks for it
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # by numbers on the CPU as well
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "dot")
NO_FACTORIES = ("sparse", "quantized", "cudnn", "mkldnn", "nested", "from_file", "_make_dep_token")

_libraries: list[torch.library.Library] = []  # whose registrations end with them


class ShadowTensor(Tensor):
    """A tensor on the device, whose values `on_cpu` holds."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "ShadowTensor":
        strided = on_cpu.layout == torch.strided
        return Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride() if strided else None,
            storage_offset=on_cpu.storage_offset() if strided else None,
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=DEVICE,
        )

    def __init__(self, on_cpu: Tensor) -> None:
        self.on_cpu = on_cpu

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, value: "ShadowTensor") -> None:
        self.on_cpu = value.on_cpu

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on the device {NAME} cannot become an array of numpy; send it to the CPU first")

    def tolist(self) -> list[Any]:  # which torch has for its own class only
        return self.on_cpu.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _loaded, (self.on_cpu, self.requires_grad)

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"ShadowTensor({self.on_cpu!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _loaded(on_cpu: Tensor, requires_grad: bool) -> ShadowTensor:
    loaded = ShadowTensor(on_cpu)
    loaded.requires_grad_(requires_grad)
    return loaded


def register() -> None:
    """Makes `torch.device("shadow")` known, once in a process."""
    global DEVICE
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    DEVICE = torch.device(NAME, 0)
    library = torch.library.Library("aten", "IMPL")
    for name, op in _factories():
        library.impl(name, _factory(op), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.append(library)
    for name in ("storage_ptr", "storage_size"):
        setattr(safetensors.torch, name, _by_values(getattr(safetensors.torch, name)))
    torch.serialization.register_package(0, lambda _: None, _stays_on_cpu)
    torch.serialization.add_safe_globals([_loaded])


class _Module:
    """`torch.shadow`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are those of the CPU, which is seeded already."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _factories() -> Iterator[tuple[str, Any]]:
    """What makes a tensor from none, by its name and overload."""
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, full = qualified.partition("::")
        if namespace != "aten" or any(part in full for part in NO_FACTORIES):
            continue
        name, _, overload = full.partition(".")
        op = getattr(getattr(torch.ops.aten, name), overload or "default", None)
        arguments = [] if op is None else op._schema.arguments
        takes_device = any(argument.name == "device" for argument in arguments)
        if op is not None and takes_device and not any("Tensor" in str(argument.type) for argument in arguments):
            yield full, op


def _factory(op: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        _check_generator(op, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return ShadowTensor(op(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    """By which `torch.tensor(values, device="shadow")` fills what it has made."""
    _on_cpu(target).copy_(_on_cpu(source))
    return target


@contextmanager
def opened(path: Any, framework: str, device: str = "cpu") -> Iterator[Any]:
    """`safetensors.safe_open`, which knows some devices only."""
    with safe_open(path, framework, "cpu" if device.startswith(NAME) else device) as file:
        yield _OntoDevice(file, device)


class _OntoDevice:
    def __init__(self, file: Any, device: str) -> None:
        self.file, self.device = file, device

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name).to(self.device)


def _by_values(of_storage: Any) -> Any:
    """What safetensors asks of a tensor's storage, asked of that of the values."""
    return lambda tensor: of_storage(_on_cpu(tensor))


def _stays_on_cpu(storage: Any, location: str) -> Any:
    """Of a tensor that is loaded onto the device, the part that is on the CPU."""
    return storage if location.startswith(NAME) else None


def _on_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, ShadowTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _check_operands(func, args, kwargs)
    _check_generator(func, kwargs)
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    elif "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    own_args, own_kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    own = {id(value.on_cpu): value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, ShadowTensor)}
    others = {id(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
    leaves = wanted is not None and torch.device(wanted).type != NAME

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or leaves or id(value) in others:
            return value
        return own[id(value)] if id(value) in own else ShadowTensor(value)

    return pytree.tree_map(wrapped, result)


def _check_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError for tensors on another device, but for single numbers that are only read, as CUDA takes."""
    name = func._schema.name.removeprefix("aten::")
    if name in SENDING:
        return
    if name in PRODUCTS and not all(value.is_floating_point() for value in _tensors((args, kwargs))):
        raise RuntimeError(f"{name} is not implemented for whole numbers on the device {NAME}")
    arguments = func._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            may_be_elsewhere = (tensor.ndim == 0 and not written) or (name in INDEXING and argument.name == "indices")
            if tensor.device.type != NAME and not may_be_elsewhere:
                raise RuntimeError(
                    f"all tensors must be on the device {NAME}, but {argument.name} of {name} is on {tensor.device}"
                )


def _check_generator(func: Any, kwargs: dict[str, Any]) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{func} on the device {NAME} needs a generator there, got one on {generator.device}")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
