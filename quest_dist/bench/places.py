"""Places: where a benchmark runs, and the cache there that its buffers must outgrow."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from quest_dist import on_flashinfer, ops
from quest_dist.arguments import ON_CPU
from quest_dist.bench.shapes import DTYPES, parsed_size
from quest_dist.cluster import lacking_for_gpus

DEVICES = ("cpu", "cuda")
#: Where the last-level cache's size cannot be read, it is taken to be this.
UNREADABLE_CACHE = 64 << 20


@dataclass(frozen=True)
class Place:
    """A device, and the bytes of its last-level cache with where that number is from."""

    device: torch.device
    cache: int
    source: str

    @property
    def on_gpu(self) -> bool:
        """Whether kernels are launched there, not called."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """To time a point where none are named: a GPU's calls are shorter."""
        return 3.0 if self.on_gpu else 10.0

    @property
    def memory(self) -> float:
        """GB that a point may take where none are named."""
        return 40.0 if self.on_gpu else 10.0

    def no_flashinfer(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why FlashInfer cannot be timed here, in one line; None where it can."""
        try:
            on_flashinfer.check(self.device.type, str(dtype), head_dim)
        except ValueError as error:
            return str(error)
        return None

    def setting(self) -> dict[str, object]:
        """What of the place belongs into a report."""
        common = {"device": str(self.device), "torch": torch.__version__}
        cache = {"last_level_cache": self.cache, "last_level_cache_from": self.source}
        if not self.on_gpu:
            return common | {"threads": ops.threads(), "instruction_set": ops.isa()} | cache
        found = torch.cuda.get_device_properties(self.device)
        gpu = {"gpu": found.name, "multiprocessors": found.multi_processor_count}
        return common | gpu | {"cuda": torch.version.cuda} | cache


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
        return Place(torch.device("cpu"), *last_level_cache())
    if lacking:
        raise ValueError(f"--device=cuda: {lacking}")
    if not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return Place(device, size, "torch.cuda.get_device_properties")


def last_level_cache() -> tuple[int, str]:
    """Bytes of CPU 0's largest data cache as the system tells it, and where that is from."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = []
    for cache in sorted(folder.glob("index*")):
        try:
            kind, text = (cache / "type").read_text().strip(), (cache / "size").read_text().strip()
        except OSError:
            continue
        if kind in ("Data", "Unified"):
            sizes.append(parsed_size(text))
    if not sizes or max(sizes) == 0:
        return UNREADABLE_CACHE, f"assumed: {folder} gives none"
    return max(sizes), str(folder)


def checked_options(
    options: argparse.Namespace, place: Place, shapes: Collection[str]
) -> tuple[float, ops.Reduce]:
    """Seconds to time a point and the lists that Quest makes, once what all benchmarks of a place
    take (--lists, --dtype, --shape, --seconds) is found right; ValueError names what is not."""
    dtypes = [name for name, dtype in DTYPES.items() if place.on_gpu or dtype in ON_CPU]
    for name, value, choices in (
        ("lists", options.lists, ops.REDUCTIONS),
        ("dtype", options.dtype, dtypes),
        *(("shape", shape, shapes) for shape in options.shape or ()),
    ):
        if value not in choices:
            raise ValueError(f"--{name}={value} is unknown; choose one of {', '.join(choices)}")
    seconds = place.seconds if options.seconds is None else options.seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds={seconds}: expected a positive number")
    return seconds, next(name for name in ops.REDUCTIONS if name == options.lists)
