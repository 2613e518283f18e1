"""A GPU that is full at a chosen allocation of a step, pretended on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.engine.pieces import Size


class Full(TorchDispatchMode):
    """While it is armed, the allocating operations with these numbers find the GPU full. count: of such
    operations so far."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the default calls torch._dynamo for every operation."""
        return False

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.armed, self.count = set(at), False, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.armed and allocates(func):
            self.count += 1
            if self.count - 1 in self.at:
                raise torch.OutOfMemoryError(f"CUDA out of memory in {func}")
        return func(*args, **(kwargs or {}))


def allocates(func: Any) -> bool:
    """Whether an operation of PyTorch needs memory for its result."""
    return all(argument.alias_info is None for argument in func._schema.arguments)


@contextmanager
def full(*at: int, method: str = "each") -> Iterator[Full]:
    """Armed in the work that is repeated in smaller pieces ("each") or as a whole ("again")."""
    mode, real = Full(*at), getattr(Size, method)

    def watched(self: Size, total: int, work: Callable[..., Any]) -> Any:
        def armed(*arguments: Any) -> Any:
            mode.armed = True
            try:
                return work(*arguments)
            finally:
                mode.armed = False

        return real(self, total, armed)

    with mock.patch.object(Size, method, watched), mode:
        yield mode
