"""Tensors without data, which run a model of any size on any machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Operations that return the values of their first argument in another form.
_FORMS = {
    "aten::_to_copy", "aten::_unsafe_view", "aten::alias", "aten::clone", "aten::detach",
    "aten::expand", "aten::index", "aten::permute", "aten::select", "aten::slice", "aten::squeeze",
    "aten::t", "aten::transpose", "aten::unsqueeze", "aten::view",
}  # fmt: skip


class TracedTensor(Tensor):
    """A tensor with a shape, a dtype and a storage of some size, and no data.

    Autograd, autocast and the code of a model see a tensor on the CPU and treat it as a real one.
    Below them, each operation runs on torch's `meta` device, which computes only shapes. Real
    tensors can be mixed in: token ids and masks keep their values, which a model may read. (torch's
    FakeTensor drops those values too, and cannot be the data of a quantized weight.)
    """

    meta: Tensor
    """Its twin on the meta device, where views share a storage."""
    maker: str
    """The operation that computed its values."""

    @staticmethod
    def __new__(cls, meta: Tensor, maker: str = "", requires_grad: bool = False) -> TracedTensor:
        self: TracedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            layout=meta.layout,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        self.meta, self.maker = meta, maker
        return self

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes `tensor_contents`
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> Tensor:
        """The tensor without autograd history."""
        data: Tensor = _DATA.__get__(self)
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, TracedTensor)
        _DATA.__set__(self, value)
        self.meta, self.maker = value.meta, value.maker

    def tolist(self) -> Any:
        """Return ones, which are finite ordinary values."""
        _refuse_in_a_model()
        return torch.ones(self.shape, dtype=self.dtype).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedTensor:
        made = type(self)(self.meta.clone(), self.maker, self.requires_grad)
        memo[id(self)] = made
        others = {name: value for name, value in vars(self).items() if name not in vars(made)}
        vars(made).update(copy.deepcopy(others, memo))
        return made

    @classmethod
    # torch declares it as an instance method; it is called as a class method.
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on shapes."""
        kwargs = kwargs or {}
        if read := _READS.get(func._schema.name):
            _refuse_in_a_model()
            return read(*args)
        if func._schema.name in _INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        form = _form(func)
        if form.makes_new:
            return _new(func, args, kwargs)
        if form.changed:
            _once(func, args, kwargs)
            return _changed(form, args, kwargs)
        return _on_meta(func, args, kwargs)


_DATA: Any = Tensor.data
"""torch's own attribute."""


# Number of running calls of watched modules.
_calls: ContextVar[int] = ContextVar("_calls", default=0)


def refuse_decisions(module: nn.Module) -> None:
    """Refuse reads of traced values by the code of a module.

    A traced tensor has no values, so any branch on them would be a guess. Code around the model,
    such as the check that a norm is finite, reads ordinary values instead.
    """

    def enter(*_: object) -> None:
        _calls.set(_calls.get() + 1)

    def leave(*_: object) -> None:
        _calls.set(_calls.get() - 1)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


@contextmanager
def inside_kernel() -> Iterator[None]:
    """Allow reads by library kernels, whose decisions are known (`kernel_shapes.py`)."""
    before = _calls.set(0)
    try:
        yield
    finally:
        _calls.reset(before)


def _refuse_in_a_model() -> None:
    """Raise NotImplementedError while the code of a watched module is running."""
    if _calls.get():
        raise NotImplementedError("it branches on values that it has computed")


class TraceNewTensors(TorchDispatchMode):
    """Create traced tensors in place of CPU tensors while the mode is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is not typed here

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _FACTORIES and kwargs.get("device") in (None, torch.device("cpu")):
            made = func(*args, **{**kwargs, "device": torch.device("meta")})
            if made.numel():  # an empty one gets a real storage later
                return TracedTensor(made)
        return func(*args, **kwargs)


_FACTORIES = {
    "aten::empty", "aten::empty_strided", "aten::full", "aten::ones", "aten::rand", "aten::randn",
    "aten::zeros",
}  # fmt: skip


class _Form(NamedTuple):
    """How an operation uses storages."""

    makes_new: bool
    """It returns new tensors and changes nothing."""
    changed: list[tuple[int, str]]
    """Positions and names of the arguments that it changes."""
    num_returned: int


@cache
def _form(func: Any) -> _Form:
    schema = func._schema
    changed = [
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    has_views = any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))
    return _Form(not has_views, changed, len(schema.returns))


# Layers are alike, so most operations were done before with arguments of the same shapes.
_known: dict[Any, Any] = {}


def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that returns new tensors."""
    maker = func._schema.name
    if args and isinstance(args[0], TracedTensor) and _keeps_values(maker, args):
        maker = args[0].maker
    key = (func, _key(args), _key(tuple(kwargs.items())))
    made = _known.get(key)
    if made is None:
        made = _known[key] = tree_map(_Like.of, _meta_call(func, args, kwargs))
    if isinstance(made, _Like):
        return made.make(maker)
    return tree_map(lambda one: one.make(maker) if isinstance(one, _Like) else one, made)


def _once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check an in-place operation once; on the meta device it changes nothing."""
    key = (func, _key(args), _key(tuple(kwargs.items())))
    if key not in _known:
        _meta_call(func, args, kwargs)
        _known[key] = True


def _changed(form: _Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the changed arguments that the operation returns."""
    if not form.num_returned:
        return None
    found = [args[i] if i < len(args) else kwargs[name] for i, name in form.changed]
    return found[0] if form.num_returned == 1 else tuple(found)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation whose results may share storage with its arguments."""
    maker = func._schema.name
    if args and isinstance(args[0], TracedTensor) and _keeps_values(maker, args):
        maker = args[0].maker
    made = _meta_call(func, args, kwargs)
    if isinstance(made, Tensor):
        return TracedTensor(made, maker)
    return tree_map(lambda one: TracedTensor(one, maker) if isinstance(one, Tensor) else one, made)


def _meta_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*map(_as_meta, args), **{name: _as_meta(value) for name, value in kwargs.items()})


def _as_meta(value: Any) -> Any:
    """Put tensors and devices, also those in lists, on the meta device; keep anything else."""
    if isinstance(value, TracedTensor):
        return value.meta
    if isinstance(value, list | tuple):
        return type(value)(map(_as_meta, value))
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


@dataclass(frozen=True, slots=True)
class _Like:
    """Shape, strides and dtype of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """Describe a tensor; return anything else unchanged."""
        if isinstance(value, Tensor):
            return cls(value.shape, value.stride(), value.dtype)
        return value

    def make(self, maker: str) -> TracedTensor:
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return TracedTensor(meta, maker)


def _key(value: Any) -> Any:
    """Make a cache key: equal for arguments that lead to equal shapes."""
    if isinstance(value, Tensor):
        # The shape matters: a 0-d tensor promotes dtypes differently than one of shape (1,).
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _keeps_values(name: str, args: tuple[Any, ...]) -> bool:
    by_one = name in ("aten::mul", "aten::div") and not isinstance(args[1], Tensor) and args[1] == 1
    return name in _FORMS or by_one


def _value(tensor: Tensor) -> float | int | bool:
    """Return an ordinary value: False for conditions, otherwise one."""
    return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _are_equal(one: Tensor, other: Tensor, *_: object) -> bool:
    """Return whether the same operation computed both, in a whole and in a split model."""
    makers = [getattr(tensor, "maker", None) for tensor in (one, other)]
    return makers[0] == makers[1] and one.shape == other.shape


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace masks in an index by positions, whose number depends on the mask's values.

    Raises:
        NotImplementedError: the mask is traced and has no values.
    """
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, TracedTensor):
            raise NotImplementedError("it selects rows by values that it has computed")
        else:
            found.extend(index.nonzero(as_tuple=True))
    return found


_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}

_READS: dict[str, Any] = {
    "aten::_local_scalar_dense": _value,
    "aten::is_nonzero": _value,
    "aten::equal": _are_equal,
}
"""Operations that return a value to the host."""
