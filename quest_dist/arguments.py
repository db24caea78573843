"""Arguments: what an op accepts, checked once at the door.

A tensor's shape is declared in letters ("R H D"); a letter means the same size everywhere in one
call, so a disagreement is reported with the argument, its shape and the sizes the others fixed.

Invariant: after these checks an op may follow any pointer up to the declared sizes; what depends on
values (page ids, positions) is checked by the op itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from quest_dist.backend import by_reference, compiled_cuda
from quest_dist.metadata import Int8Metadata
from quest_dist.packing import Packed

# What the compiled ops take, and their number for it; the reference takes any floating dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ON_CPU = (torch.float32, torch.bfloat16)
LARGEST_HEAD = {"cpu": 1024, "cuda": 256}  # kMaxDim of cpu/isa.h, kLargestDim of cuda/ops.h
WORD = 16  # bytes that a GPU's kernels load at a time


def strided(native: ModuleType, x: torch.Tensor) -> object:
    """A tensor [R, heads, tokens, D], contiguous in D, for the compiled ops."""
    return native.Strided(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def check_device(what: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless the ops can run on `device` in `dtype`, where `what` is, as the message says.

    ValueError for a device or dtype without kernels; ImportError where a GPU's are not built.
    """
    if device.type not in LARGEST_HEAD:
        places = " and ".join(LARGEST_HEAD)
        raise ValueError(f"{what} is on {device}: there are kernels for {places}")
    takes = tuple(DTYPES) if device.type == "cuda" else ON_CPU
    if dtype not in takes and not by_reference():
        raise ValueError(f"{what} is {dtype} on {device}: the kernels there take {_names(takes)}")
    if device.type == "cuda":
        compiled_cuda()


class Arguments:
    """The arguments of one call of one op."""

    def __init__(self, op: str, any_float: bool = False) -> None:
        self.op = op
        self.sizes: dict[str, int] = {"2": 2}  # a digit means itself
        self.chosen: dict[str, str] = {}
        self._any_float = any_float or by_reference()
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
            compiled = tuple(DTYPES) if tensor.is_cuda else ON_CPU
            known = self._any_float or tensor.dtype in compiled
            if not (tensor.dtype.is_floating_point and known):
                choices = "a floating dtype" if self._any_float else _names(compiled)
                raise self.refuse(name, tensor.dtype, choices)
            self._float = (name, tensor.dtype)
        elif tensor.dtype != self._float[1]:
            raise self.refuse(name, tensor.dtype, f"{self._float[1]}, as {self._float[0]}")
        return tensor

    def angles(self, cos: Any, sin: Any) -> None:
        """cos and sin [R, D] of a rotation by halves: fp32, or of the call's floating dtype."""
        for name, value in (("cos", cos), ("sin", sin)):
            tensor = self._tensor(name, value, "R D", False)
            own = (torch.float32, self._float[1] if self._float else torch.float32)
            if tensor.dtype not in own or tensor.dtype != cos.dtype:
                choices = _names(own if name == "cos" else (cos.dtype,))
                raise self.refuse(name, tensor.dtype, choices)
        if self["D"] % 2:
            raise self.refuse(
                "cos", f"for head dimension {self['D']}", "an even one: it has halves"
            )

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
        where = kv.device.type
        if where not in LARGEST_HEAD or (where != "cpu" and by_reference()):
            places = "the cpu" if by_reference() else "the cpu or a CUDA device"
            raise self.refuse("kv", f"on {kv.device}", f"a tensor on {places}")
        if self["D"] > LARGEST_HEAD[where]:
            raise self.refuse(
                "kv", f"of head dimension {self['D']}", f"at most {LARGEST_HEAD[where]}"
            )
        if where == "cuda":
            self.in_words("kv", kv)

    def metadata(self, meta: Any) -> None:
        """Pages' maxima and minima, in the call's floating dtype or in int8."""
        if not isinstance(meta, Int8Metadata):
            self.floats("meta", meta, "N G 2 D")
            return
        self.of_dtype("meta.codes", meta.codes, "N G 2 D", torch.int8)
        self.of_dtype("meta.scale", meta.scale, "R G 2 D", torch.float32)
        self.of_dtype("meta.offset", meta.offset, "R G 2 D", torch.float32)

    def in_words(self, name: str, tensor: torch.Tensor) -> None:
        """A GPU loads rows of D elements in words: they must start at words."""
        if self["D"] % 8:
            raise self.refuse(name, f"of head dimension {self['D']}", "a multiple of 8 on a GPU")
        if tensor.data_ptr() % WORD:
            raise self.refuse(
                name,
                f"{tensor.data_ptr() % WORD} bytes off",
                f"memory aligned to {WORD} bytes on a GPU",
            )

    def pages(
        self,
        native: ModuleType,
        kv: torch.Tensor,
        page_table: torch.Tensor,
        meta: torch.Tensor | None = None,
    ) -> object:
        """The pool that was taken, for the compiled ops of a device."""
        if meta is not None and meta.is_cuda:
            self.in_words("meta", meta)
        sizes = [self[letter] for letter in "NGSDRP"]
        address = 0 if meta is None else meta.data_ptr()
        table = page_table.data_ptr()
        return native.Pages(kv.data_ptr(), address, table, DTYPES[kv.dtype], *sizes)

    def lists(self, index: torch.Tensor | None, count: torch.Tensor | None) -> None:
        """Lists of pages or tokens and their lengths, one for a row, a kv head or a query head."""
        self.together(index=index, count=count)
        if index is None:
            return
        self.of_dtype("index", index, "R Hs K")
        self.of_dtype("count", count, "R Hs")
        many = (1, self["G"], self["H"])
        if self["Hs"] not in many:
            choices = f"1, G={many[1]} or H={many[2]}"
            raise self.refuse("index", f"of {self['Hs']} lists a row", choices)

    def selection(
        self,
        native: ModuleType,
        index: torch.Tensor | None,
        count: torch.Tensor | None,
        kind: int,
    ) -> object:
        """What each row attends to, for the compiled ops of a device."""
        if index is None or count is None:
            return native.Selection(0, 0, 1, 0, kind)
        return native.Selection(index.data_ptr(), count.data_ptr(), self["Hs"], self["K"], kind)

    def packed(self, native: ModuleType, packed: Packed) -> object:
        """Packed blocks that were checked, for the compiled ops of a device."""
        tensors = (packed.blocks, packed.table, packed.keys, packed.values, packed.levels)
        sizes = (packed.blocks.shape[0], packed.table.shape[1], packed.bits, packed.group)
        if packed.nuq is None:
            nuq = _no_nuq(native)
        else:
            *parts, sinks = packed.nuq
            counts = (packed.nuq.outliers.shape[0], packed.nuq.cos.shape[0], sinks)
            nuq = native.Nuq(*(one.data_ptr() for one in parts), *counts)
        return native.Packed(*(one.data_ptr() for one in tensors), *sizes, nuq)

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> int:
        """The position of a word among those allowed."""
        if value not in choices:
            raise self.refuse(name, repr(value), "one of " + ", ".join(choices))
        self.chosen[name] = value
        return choices.index(value)

    def together(self, **values: Any) -> None:
        """Arguments that are given together or not at all."""
        missing = [name for name, value in values.items() if value is None]
        if 0 < len(missing) < len(values):
            raise self.refuse(missing[0], "missing", " and ".join(values) + " together")

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
        shape, sizes, expected = value.shape, self.sizes, _split(letters)
        if len(shape) != len(expected):
            raise self.refuse(name, f"of shape {list(shape)}", self._shape(expected))
        for size, letter in zip(shape, expected, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise self.refuse(name, f"of shape {list(shape)}", self._shape(expected))
        if contiguous:
            if not value.is_contiguous():
                raise self.refuse(name, f"strided {list(value.stride())}", "a contiguous tensor")
        elif shape[-1] > 1 and value.stride(-1) != 1:
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
        fixed = [
            f"{one}={self.sizes[one]}" for one in letters if one in self.sizes and not one.isdigit()
        ]
        return f"shape [{', '.join(letters)}]" + (f" with {', '.join(fixed)}" if fixed else "")


@cache
def _no_nuq(native: ModuleType) -> object:
    return native.Nuq(*[0] * 9)


@cache
def _no_token(native: ModuleType) -> tuple[Any, Any]:
    return native.Strided(0, 0, 0, 0), native.Angles(0, 0, 0, 0, False)


@cache
def _split(letters: str) -> tuple[str, ...]:
    return tuple(letters.split())


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(one) for one in dtypes)


def one_token(
    native: Any,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[Any, Any, Any, Any]:
    """The new token of `decode`: q, k and v [R, heads, D] as native Strided, the rest as Angles."""
    nothing, unturned = _no_token(native)

    def place(x: torch.Tensor | None) -> Any:
        return nothing if x is None else native.Strided(x.data_ptr(), *x.stride()[:2], 0)

    places = place(q), place(k), place(v)
    if cos is None or sin is None:
        return *places, unturned
    wide = cos.dtype == torch.float32
    turn = (cos.data_ptr(), sin.data_ptr(), cos.stride(0), sin.stride(0))
    return *places, native.Angles(*turn, wide)
