"""Functions through torch.compile, compiled once for all numbers of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

log = logging.getLogger("qlora")

Function = Callable[..., Any]
TokenAxes = Mapping[int, tuple[int, ...]]
"""The axes that count tokens, by the position of the argument that has them."""

_NEAR = 2
"""Compilations before torch's limit at which the log says so."""


class CompiledFunction:
    """A function through torch.compile, for any number of tokens.

    Other sizes are constants of the compiled code: with a known width, Triton keeps a row in
    registers, and addresses need no division. Another width is compiled anew.

    Args:
        function: a function of this module's own, since torch counts by the code of a function.
        backend: compiler, as for torch.compile.
    """

    def __init__(self, function: Function, axes: TokenAxes, backend: str = "inductor") -> None:
        self._function, self._axes = function, axes
        # `dynamic=None` would learn from a second width that widths vary. Marked axes still do.
        # torch.compile keeps what it compiled on disk, so a second run starts in a few seconds.
        self._compiled: Function = torch.compile(function, dynamic=False, backend=backend)
        self._seen: set[torch.Size] = set()
        self._is_told = False

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; compile it if there is no code for these sizes yet."""
        for index, axes in self._axes.items():
            torch._dynamo.maybe_mark_dynamic(arguments[index], axes)
        result = self._compiled(*arguments)
        if arguments[0].shape not in self._seen:  # only a new size can be compiled
            self._seen.add(arguments[0].shape)
            self._check_limit()
        return result

    @property
    def num_compilations(self) -> int:
        """Return how often the function is compiled in this process."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        return len(_debug_get_cache_entry_list(self._function.__code__))

    def _check_limit(self) -> None:
        """Say once that the limit of torch is near: beyond it, the function is not compiled."""
        limit: int = torch._dynamo.config.recompile_limit
        if self._is_told or self.num_compilations < limit - _NEAR:
            return
        self._is_told = True
        log.warning(
            "kernels: %s was compiled %d times, for different widths or layouts; torch stops at "
            "%d, and computes further ones uncompiled, which is slower. If steps become slow, use "
            "--set training.kernels=fused",
            self._function.__name__,
            self.num_compilations,
            limit,
        )
