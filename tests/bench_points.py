"""Small points, places and options of the attention benchmark."""

from __future__ import annotations

import argparse

import torch

from quest_dist.bench import attention
from quest_dist.bench.attention_figures import Figures
from quest_dist.bench.attention_plan import Plan
from quest_dist.places import Place
from quest_dist.shapes import Point, Shape

CPU = Place(torch.device("cpu"), 32 << 20, "the test")
H100 = Place(torch.device("cuda", 0), 50 << 20, "the test")
TINY = {
    "7b": Shape("7b", "tiny MHA", 4, 4, 32),
    "8b": Shape("8b", "tiny GQA", 4, 1, 32),
}
QUESTS = ((64, "max"), (64, "per_query"))


def tiny(dtype: torch.dtype, device: str = "cpu") -> Plan:
    """The summary's points and rows of both kinds, of a machine with 16 KB of cache."""
    points = [Point(TINY[name], 256, quests=QUESTS) for name in TINY]
    points += [Point(TINY[name], 256, quests=QUESTS[:1], shuffled=True) for name in TINY]
    points += [Point(TINY["8b"], 256, 3, shared, QUESTS[:1]) for shared in (False, True)]
    sharing = [Point(TINY[name], 128, 5, shared=True) for name in TINY]
    place = Place(torch.device(device), 16 << 10, "the test")
    return Plan(tuple(points), tuple(sharing), dtype, 0.01, place, Figures(context=256, budget=64))


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    return parser.parse_args(arguments)
