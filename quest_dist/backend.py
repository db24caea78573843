"""Backend: what runs the ops here: the compiled ones or the reference, on which threads and ISA.

Invariants: the reference is chosen for a context and never as a silent stand-in; a missing or
unusable compiled module is an ImportError that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("compiled", "reference")

_backend: ContextVar[str] = ContextVar("quest_dist_backend", default="compiled")
_threads = 0


@cache
def compiled() -> ModuleType:
    """The compiled ops, loaded when first used."""
    try:
        from quest_dist import _cpu
    except ImportError as error:
        if "_cpu" in str(error) and "instruction set" not in str(error):
            raise ImportError(
                f"quest_dist._cpu is not built for this Python ({error}): run "
                "`make setup`, or `python setup.py build_ext --inplace`"
            ) from error
        raise
    return _cpu


@cache
def compiled_cuda() -> ModuleType:
    """The compiled ops for tensors on a GPU, loaded when first used."""
    try:
        from quest_dist import _cuda
    except ImportError as error:
        raise ImportError(
            f"quest_dist._cuda is not built ({error}): run `python setup.py build_ext --inplace` "
            "with CUDA's nvcc in PATH (QUEST_CUDA=1 says what is missing)"
        ) from error
    return _cuda


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this context 'compiled' (the default) or as the plain-torch 'reference'."""
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def set_threads(count: int | None) -> None:
    """Use this many threads in the ops; None follows torch.get_num_threads(), as at the start."""
    global _threads
    if count is not None and count < 1:
        raise ValueError(f"set_threads: count is {count}; expected at least 1, or None")
    _threads = count or 0


def threads() -> int:
    """Threads that the ops use."""
    return _threads or torch.get_num_threads()


def isa() -> str:
    """The instruction set in use; the environment variable QUEST_ISA names another."""
    return str(compiled().isa())


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine supports, best first."""
    return tuple(compiled().isas().split(", "))


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in all threads."""
    compiled().set_isa(name)


def by_reference() -> bool:
    """Whether this context runs the reference."""
    return _backend.get() == "reference"
