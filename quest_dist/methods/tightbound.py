"""TightBound, our own method: Quest with the page's radius shrunk.

Quest's score q.c + |q|.r assumes that one key of the page sits at the worst corner of the page's
box in every channel at once. Keys do not: in d dimensions the bound is loose, and loose by most for
wide pages, which then crowd out the page that holds the needle. TightBound scores q.c +
radius_scale * |q|.r with radius_scale = 0.5: no bound any more, a better estimate, at the same
metadata, the same bytes and the same kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from quest_dist.methods.quest import Quest


@dataclass
class TightBound(Quest):
    """Quest's settings with `radius_scale` at 0.5."""

    radius_scale: float = 0.5
