"""Words that generated facts are made of: enough of each kind that no answer can be guessed."""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words(
    """black blue bronze brown copper cream crimson golden green grey lilac navy pink purple
    red scarlet silver turquoise violet white yellow"""
)
ANIMALS = _words(
    """badger bear beaver bison camel cat cobra crane crow deer dolphin donkey eagle falcon ferret
    fox frog goat goose hare hawk hedgehog heron horse jackal lion lizard lobster lynx mole moose
    mouse otter owl panda panther parrot peacock pelican penguin pigeon rabbit raven salmon seal
    shark sheep snail sparrow spider squirrel stork swan tiger toad turtle viper walrus whale wolf
    zebra"""
)
OBJECTS = _words(
    """anchor basket bell bottle bowl bucket button candle chain clock coin cup drum fan feather
    fiddle flute fork hammer harp hat helmet hook jar kettle key ladder lamp lantern letter map
    mask medal mirror needle pillow pipe plate ring rope saddle shield shovel spoon statue sword
    telescope thimble ticket trumpet umbrella vase violin whistle"""
)
FIRST_NAMES = _words(
    """Ada Agnes Albert Alma Anton Arthur Beatrice Bruno Carla Cecil Clara Conrad Daphne Edgar
    Edith Elsa Emil Esther Felix Flora Frida Gilbert Greta Hanna Harold Hector Hilda Hugo Ida Igor
    Irene Ivan Jasper Judith Julius Karl Leon Lydia Magnus Martha Milo Nadia Nora Olga Oscar Otto
    Paula Pedro Quentin Rosa Rufus Selma Silas Thea Victor Vera Walter Wanda Yvonne Zelda"""
)
_STARTS = _words(
    """Bal Bren Cal Cor Dal Dor Fal Fen Gal Gor Hal Har Kal Kel Lan Lor Mal Mar Nor Pel Ral Ros Sal
    Tal Tor Val Vel Vor Wil Zan"""
)
_ENDS = _words(
    """bridge brook bury dale den field ford gate ham haven hill holm hurst land ley mere mont mouth
    port ridge shore stead stone ton vale view ville ward wick wood"""
)


def place_names(rng: random.Random, count: int) -> list[str]:
    """Return invented place names out of about nine hundred, no two alike at either end."""
    pairs = zip(rng.sample(_STARTS, count), rng.sample(_ENDS, count), strict=True)
    return [start + end for start, end in pairs]


def place_name(rng: random.Random) -> str:
    """Return one invented place name."""
    return place_names(rng, 1)[0]


def things(rng: random.Random, count: int) -> list[str]:
    """Return coloured objects out of more than a thousand, no two of a colour or of a kind."""
    pairs = zip(rng.sample(COLOURS, count), rng.sample(OBJECTS, count), strict=True)
    return [f"{colour} {kind}" for colour, kind in pairs]


def thing(rng: random.Random) -> str:
    """Return one coloured object."""
    return things(rng, 1)[0]


def creature(rng: random.Random) -> str:
    """Return a coloured animal, one of more than a thousand."""
    return f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
