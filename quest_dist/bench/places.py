"""The options that all benchmarks of a place take."""

from __future__ import annotations

import argparse
from collections.abc import Collection

import torch

from quest_dist import ops
from quest_dist.arguments import ON_CPU
from quest_dist.cluster import lacking_for_gpus
from quest_dist.places import Place, place_of
from quest_dist.shapes import DTYPES

DEVICES = ("cpu", "cuda")


def chosen_place(option: str | None) -> Place:
    """The place that --device names: by default a GPU where there are one and kernels for it.

    ValueError for a name that is unknown and for a GPU that cannot be used.
    """
    lacking = lacking_for_gpus()
    if option is None:
        option = "cuda" if not lacking and torch.cuda.is_available() else "cpu"
    if option not in DEVICES:
        raise ValueError(f"--device={option} is unknown; choose one of {', '.join(DEVICES)}")
    if option == "cpu":
        return place_of(torch.device("cpu"))
    if lacking:
        raise ValueError(f"--device=cuda: {lacking}")
    if not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no CUDA device")
    return place_of(torch.device("cuda", torch.cuda.current_device()))


def checked_options(
    options: argparse.Namespace, place: Place, shapes: Collection[str]
) -> ops.Reduce:
    """The lists that Quest makes, once what all benchmarks of a place take (--lists, --dtype,
    --shape) is found right; ValueError names what is not."""
    dtypes = [name for name, dtype in DTYPES.items() if place.on_gpu or dtype in ON_CPU]
    for name, value, choices in (
        ("lists", options.lists, ops.REDUCTIONS),
        ("dtype", options.dtype, dtypes),
        *(("shape", shape, shapes) for shape in options.shape or ()),
    ):
        if value not in choices:
            raise ValueError(f"--{name}={value} is unknown; choose one of {', '.join(choices)}")
    return next(name for name in ops.REDUCTIONS if name == options.lists)
