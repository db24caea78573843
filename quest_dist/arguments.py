"""Arguments: what an op accepts, checked once at the door.

A tensor's shape is declared in letters ("R H D"); a letter means the same size everywhere in one
call, so a disagreement is reported with the argument, its shape and the sizes the others fixed.

Invariant: after these checks an op may follow any pointer up to the declared sizes; what depends on
values (page ids, positions) is checked by the op itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quest_dist.backend import by_reference, compiled

# What the compiled ops take, and their number for it; the reference takes any floating dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LARGEST_HEAD = 1024  # kMaxDim of kernels/cpu/isa.h


def strided(x: torch.Tensor) -> object:
    """A tensor [R, heads, tokens, D], contiguous in D, for the compiled ops."""
    return compiled().Strided(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class Arguments:
    """The arguments of one call of one op."""

    def __init__(self, op: str, any_float: bool = False) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self._floats = None if any_float or by_reference() else tuple(DTYPES)
        self._float: tuple[str, torch.dtype] | None = None
        self._device: tuple[str, torch.device] | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def refuse(self, name: str, got: object, expected: str) -> ValueError:
        """The error of one argument, in one line."""
        return ValueError(f"{self.op}: {name} is {got}; expected {expected}")

    def floats(self, name: str, value: Any, letters: str, contiguous: bool = True) -> torch.Tensor:
        """A tensor of the call's one floating dtype."""
        tensor = self._tensor(name, value, letters, contiguous)
        if self._float is None:
            known = self._floats is None or tensor.dtype in self._floats
            if not (tensor.dtype.is_floating_point and known):
                choices = "a floating dtype" if self._floats is None else _names(self._floats)
                raise self.refuse(name, tensor.dtype, choices)
            self._float = (name, tensor.dtype)
        elif tensor.dtype != self._float[1]:
            raise self.refuse(name, tensor.dtype, f"{self._float[1]}, as {self._float[0]}")
        return tensor

    def of_dtype(
        self, name: str, value: Any, letters: str, dtype: torch.dtype = torch.int32
    ) -> torch.Tensor:
        """A contiguous tensor of a fixed dtype."""
        tensor = self._tensor(name, value, letters, True)
        if tensor.dtype != dtype:
            raise self.refuse(name, tensor.dtype, str(dtype))
        return tensor

    def take_pool(
        self,
        kv: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor | None,
        name: str = "lengths",
    ) -> None:
        """One layer's pages and the rows that look into them."""
        self.floats("kv", kv, "N G 2 S D")
        self.of_dtype("page_table", page_table, "R P")
        if lengths is not None:
            self.of_dtype(name, lengths, "R")
        if kv.device.type != "cpu":
            raise self.refuse("kv", f"on {kv.device}", "a tensor on the cpu")
        if self["D"] > LARGEST_HEAD:
            raise self.refuse("kv", f"of head dimension {self['D']}", f"at most {LARGEST_HEAD}")

    def pages(self, kv: torch.Tensor, page_table: torch.Tensor, meta: int = 0) -> object:
        """The pool that was taken, for the compiled ops; `meta` is an address."""
        sizes = [self[letter] for letter in "NGSDRP"]
        table = page_table.data_ptr()
        return compiled().Pages(kv.data_ptr(), meta, table, DTYPES[kv.dtype], *sizes)

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> int:
        """The position of a word among those allowed."""
        if value not in choices:
            raise self.refuse(name, repr(value), "one of " + ", ".join(choices))
        return choices.index(value)

    def multiple(self, larger: str, smaller: str, meaning: str) -> int:
        """How often one size holds another; it must do so exactly."""
        many, few = self.sizes[larger], self.sizes[smaller]
        if few == 0 or many % few:
            raise ValueError(
                f"{self.op}: {larger}={many} is not a multiple of {smaller}={few}: {meaning}"
            )
        return many // few

    def _tensor(self, name: str, value: Any, letters: str, contiguous: bool) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise self.refuse(name, type(value).__name__, "a tensor")
        shape = value.shape
        expected = letters.split()
        if len(shape) != len(expected):
            raise self.refuse(name, f"of shape {list(shape)}", self._shape(expected))
        for size, letter in zip(shape, expected, strict=True):
            fixed = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size)
            if fixed != size:
                raise self.refuse(name, f"of shape {list(shape)}", self._shape(expected))
        if contiguous and not value.is_contiguous():
            raise self.refuse(name, f"strided {list(value.stride())}", "a contiguous tensor")
        if not contiguous and shape[-1] > 1 and value.stride(-1) != 1:
            raise self.refuse(
                name, f"strided {list(value.stride())}", "a contiguous last dimension"
            )
        if self._device is None:
            self._device = (name, value.device)
        elif value.device != self._device[1]:
            raise self.refuse(
                name, f"on {value.device}", f"{self._device[1]}, as {self._device[0]}"
            )
        return value

    def _shape(self, letters: Sequence[str]) -> str:
        fixed = [f"{one}={self.sizes[one]}" for one in letters if one in self.sizes]
        return f"shape [{', '.join(letters)}]" + (f" with {', '.join(fixed)}" if fixed else "")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(one) for one in dtypes)
