"""Quest's query-aware KV cache sparsity, reproduced and swept.

Invariant: importing the package imports nothing heavy; `patched` loads torch when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quest_dist.attention import patched

__all__ = ["__version__", "patched"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "patched":
        from quest_dist.attention import patched

        return patched
    raise AttributeError(f"module 'quest_dist' has no attribute '{name}'")
