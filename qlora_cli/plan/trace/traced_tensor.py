"""Tensors without data: what a model of any size does, on a machine of any size."""

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

# What only hands on the values of its first argument, in another form.
_FORMS = {
    "aten::_to_copy", "aten::_unsafe_view", "aten::alias", "aten::clone", "aten::detach",
    "aten::expand", "aten::index", "aten::permute", "aten::select", "aten::slice", "aten::squeeze",
    "aten::t", "aten::transpose", "aten::unsqueeze", "aten::view",
}  # fmt: skip


class TracedTensor(Tensor):
    """A tensor with a shape, a dtype and a storage of some size, and no data.

    To autograd, autocast and the code of a model it is a tensor on the CPU, so all of them do what
    they do with a real one; below them each operation runs on torch's `meta` device, which finds
    shapes alone. Real tensors may stand beside it: token ids and masks keep their values, so what
    a model asks of them is answered truly. (torch's FakeTensor takes those values away too, and
    cannot be the data of a quantized weight.)
    """

    meta: Tensor
    """The same on the meta device, where views share a storage."""
    maker: str
    """The operation that made its values."""

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

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> Tensor:
        """The tensor apart from autograd, as of any tensor."""
        data: Tensor = _DATA.__get__(self)
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, TracedTensor)
        _DATA.__set__(self, value)
        self.meta, self.maker = value.meta, value.maker

    def tolist(self) -> Any:
        """As many ones as it has values: finite, and nothing special."""
        _refuse_in_a_model()
        return torch.ones(self.shape, dtype=self.dtype).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedTensor:
        made = type(self)(self.meta.clone(), self.maker, self.requires_grad)
        memo[id(self)] = made
        others = {name: value for name, value in vars(self).items() if name not in vars(made)}
        vars(made).update(copy.deepcopy(others, memo))
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation for its shapes."""
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


# How many calls of watched modules are under way.
_calls: ContextVar[int] = ContextVar("_calls", default=0)


def refuse_decisions(module: nn.Module) -> None:
    """Let the code of a module not read what a traced tensor stands for.

    There is no value, and whichever way the code went on would be a guess. The steps around a model
    (whether a norm is finite, say) go on as with values of which nothing is special.
    """

    def enter(*_: object) -> None:
        _calls.set(_calls.get() + 1)

    def leave(*_: object) -> None:
        _calls.set(_calls.get() - 1)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


@contextmanager
def inside_a_kernel() -> Iterator[None]:
    """What is read in here decides how a library computes, which is known (`kernels.py`)."""
    before = _calls.set(0)
    try:
        yield
    finally:
        _calls.reset(before)


def _refuse_in_a_model() -> None:
    """Raises NotImplementedError while the code of a watched module is at work."""
    if _calls.get():
        raise NotImplementedError("it goes by the values of what it has computed")


class Blank(TorchDispatchMode):
    """While it is entered, new tensors on the CPU are traced ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

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
            if made.numel():  # an empty one is a beginning, to be given a real storage
                return TracedTensor(made)
        return func(*args, **kwargs)


_FACTORIES = {
    "aten::empty", "aten::empty_strided", "aten::full", "aten::ones", "aten::rand", "aten::randn",
    "aten::zeros",
}  # fmt: skip


class _Form(NamedTuple):
    """What an operation does with storages."""

    makes_new: bool
    """It returns new tensors, and changes nothing."""
    changed: list[tuple[int, str]]
    """Place and name of the arguments that it changes."""
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
    """The result of an operation that makes new tensors."""
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
    """Check an operation that changes its arguments: on the meta device it changes nothing."""
    key = (func, _key(args), _key(tuple(kwargs.items())))
    if key not in _known:
        _meta_call(func, args, kwargs)
        _known[key] = True


def _changed(form: _Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The very tensors that were changed, as far as they are returned."""
    if not form.num_returned:
        return None
    found = [args[i] if i < len(args) else kwargs[name] for i, name in form.changed]
    return found[0] if form.num_returned == 1 else tuple(found)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation whose results may share the storage of what it is given."""
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
    """What a tensor looks like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """Of a tensor; anything else as it is."""
        if isinstance(value, Tensor):
            return cls(value.shape, value.stride(), value.dtype)
        return value

    def make(self, maker: str) -> TracedTensor:
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return TracedTensor(meta, maker)


def _key(value: Any) -> Any:
    """The same for arguments that lead to the same shapes."""
    if isinstance(value, Tensor):
        # A scalar of torch takes part in the choice of a dtype otherwise than a row of one.
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _keeps_values(name: str, args: tuple[Any, ...]) -> bool:
    by_one = name in ("aten::mul", "aten::div") and not isinstance(args[1], Tensor) and args[1] == 1
    return name in _FORMS or by_one


def _value(tensor: Tensor) -> float | int | bool:
    """A condition is false, as of values of which nothing is special; any other value is one."""
    return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _are_equal(one: Tensor, other: Tensor, *_: object) -> bool:
    """Whether the same operation made their values: of a model whole and cut in two."""
    makers = [getattr(tensor, "maker", None) for tensor in (one, other)]
    return makers[0] == makers[1] and one.shape == other.shape


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Numbers in place of masks: how many there are is in the values of a mask.

    Raises:
        NotImplementedError: the mask has no values.
    """
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, TracedTensor):
            raise NotImplementedError("it chooses rows by what it has computed")
        else:
            found.extend(index.nonzero(as_tuple=True))
    return found


_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}

_READS: dict[str, Any] = {
    "aten::_local_scalar_dense": _value,
    "aten::is_nonzero": _value,
    "aten::equal": _are_equal,
}
"""Operations that hand a value to the host."""
