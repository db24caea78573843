"""Words that generated facts are made of: enough of each kind that no answer can be guessed."""

from __future__ import annotations

import random

COLOURS = tuple(
    "amber black blue bronze brown copper cream crimson golden green grey ivory lilac navy olive "
    "orange pink purple red scarlet silver turquoise violet white yellow".split()
)
ANIMALS = tuple(
    "badger bear beaver bison camel cat cobra crane crow deer dolphin donkey eagle falcon ferret fox "
    "frog goat goose hare hawk hedgehog heron horse ibex jackal lion lizard lobster lynx mole moose "
    "mouse otter owl panda panther parrot peacock pelican penguin pigeon rabbit raven salmon seal "
    "shark sheep snail sparrow spider squirrel stork swan tiger toad turtle viper walrus whale wolf "
    "zebra".split()
)
OBJECTS = tuple(
    "anchor basket bell bottle bowl box brush bucket button candle chain clock coin comb compass cup "
    "drum fan feather fiddle flute fork hammer harp hat helmet hook jar kettle key knife ladder lamp "
    "lantern letter map mask medal mirror needle pillow pipe plate ring rope saddle scarf shield "
    "shovel spoon statue sword telescope thimble ticket trumpet umbrella vase violin whistle".split()
)
FIRST_NAMES = tuple(
    "Ada Agnes Albert Alma Anton Arthur Beatrice Bruno Carla Cecil Clara Conrad Daphne Edgar Edith "
    "Elsa Emil Esther Felix Flora Frida Gilbert Greta Hanna Harold Hector Hilda Hugo Ida Igor Irene "
    "Ivan Jasper Judith Julius Karl Leon Lydia Magnus Martha Milo Nadia Nora Olga Oscar Otto Paula "
    "Pedro Quentin Rosa Rufus Selma Silas Thea Victor Vera Walter Wanda Yvonne Zelda".split()
)
_STARTS = "Bal Bren Cal Cor Dal Dor Fal Fen Gal Gor Hal Har Kal Kel Lan Lor Mal Mar Nor Pel Ral Ros Sal Tal Tor Val Vel Vor Wil Zan".split()
_ENDS = "bridge brook bury dale den field ford gate ham haven hill holm hurst land ley mere mont mouth port ridge shore stead stone ton vale view ville ward wick wood".split()


def place_names(rng: random.Random, count: int) -> list[str]:
    """Return invented place names out of about nine hundred, alike in neither beginning nor end."""
    pairs = zip(rng.sample(_STARTS, count), rng.sample(_ENDS, count), strict=True)
    return [start + end for start, end in pairs]


def thing(rng: random.Random) -> str:
    """Return a coloured object, one of about fifteen hundred."""
    return f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"


def creature(rng: random.Random) -> str:
    """Return a coloured animal, one of about fifteen hundred."""
    return f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
