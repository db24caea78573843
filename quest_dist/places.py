"""Places: where something is timed, and the cache there that its buffers must outgrow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quest_dist import machine_state, on_flashinfer, ops
from quest_dist.shapes import parsed_size

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

    @property
    def label(self) -> str:
        """What computes there, for people: times of different labels do not belong together."""
        if self.on_gpu:
            return str(torch.cuda.get_device_properties(self.device).name)
        return f"{machine_state.processor()}, {ops.threads()} threads ({ops.isa()})"

    @property
    def gpu(self) -> str | None:
        """The GPU's id, for nvidia-smi; None on a CPU."""
        if not self.on_gpu:
            return None
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"

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


def place_of(device: torch.device) -> Place:
    """The place that a device is."""
    if device.type != "cuda":
        return Place(device, *last_level_cache())
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
