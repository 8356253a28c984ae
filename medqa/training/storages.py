"""What a computation holds in memory at its peak, counted by the storages that come and go while it runs."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medqa.training.shape_model import BLOCK, Shape, each_tensor


class Storages(TorchDispatchMode):
    """Counts the bytes of storages made under it, and their peak in each stretch of the run.

    A storage that its own finalizer reports gone is gone for autograd too, which may outlive every Python tensor.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {_storage(tensor)._cdata for tensor in known}  # there before, so not made here
        self.live = 0
        self.stretch = "layers"
        self.peak: dict[str, int] = {"layers": 0, "head": 0}
        self.on_entry: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def enter(self, stretch: str) -> None:
        """From here on it is this stretch."""
        self.stretch = stretch
        self.on_entry[stretch] = self.live
        self._note(0)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        each_tensor(self._count, result)
        self._note(_inside(func, args))
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._known and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            weakref.finalize(storage, self._gone, key)

    def _note(self, inside: int) -> None:
        self.peak[self.stretch] = max(self.peak[self.stretch], self.live + inside)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Where a tensor's contents would be."""
    return (tensor.inner if isinstance(tensor, Shape) else tensor).untyped_storage()


def _inside(operation: torch._ops.OpOverload, args: tuple) -> int:
    """What an operation takes while it runs and does not show: a 4-bit layer is expanded inside its product."""
    if operation.name() != "bitsandbytes::gemm_4bit":
        return 0
    inputs, shape = args[0], args[2]
    count = shape[0] * shape[1]
    return count * inputs.element_size() + 4 * count // BLOCK
