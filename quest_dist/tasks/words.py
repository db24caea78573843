"""Words that generated facts are made of: enough of each kind that no answer can be guessed."""

from __future__ import annotations

import random
from collections.abc import Iterator


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
WORDS = _words(
    """abbey acorn advice agenda airport album almond amber anchor ankle answer antler apple apron
    armor artist ashes atlas attic autumn avenue bacon badge bakery balcony ballad bamboo
    banana banner barley barrel basin basket battery beacon beard bedroom beetle belief belt
    bench berry bicycle biscuit blanket blossom bonfire bonnet border bottle boulder bracelet
    branch brass bread breeze brick bridge bronze broom brother brush bubble bucket budget
    bullet bundle butter button cabbage cabin cable cactus camera canal candle canvas canyon
    captain caravan cargo carpet carriage carrot castle cattle cedar cellar cement century
    chalk chapel cheese cherry chess chicken chimney choice chorus church cinema circle citizen
    clay cliff climate cloak closet cloud clover cobbler coconut coffee collar colony comet
    compass concert contest copper coral corner cottage cotton council country cousin cradle
    crater cream cricket crown crystal cupboard curtain cushion custom cyclone dagger dairy
    daisy dancer danger daughter dawn debate degree desert design dessert detail device diamond
    dinner diploma doctor donkey dragon drawer dream dress driver drum dungeon eagle echo
    editor effort elbow elephant emblem emperor empire engine entry envelope error essay estate
    evening event exile expert fabric factory falcon family farmer father feast feather fence
    ferry festival fever field figure finger flag flavour flint flower flute forest fortune
    fossil fountain frame freedom friend fruit funnel furnace future gallery garage garden
    garlic garment gate gentleman geyser ghost giant ginger giraffe glacier globe glove goblet
    grain granite grape gravel grove guard guitar gutter gypsum habit hammer hammock harbour
    harvest hatch hazel health hearth heaven hedge helmet heron highway history hockey holiday
    honey horizon hotel household human hunter hurdle husband iceberg icicle idea illness image
    income index industry infant insect island ivory jacket jaguar jasmine jelly jewel journal
    journey judge juice jungle jury justice kayak kennel kernel kettle keyboard kingdom kitchen
    kitten knife knight knot label labour ladder lagoon lake lantern laundry lawyer leader
    leather lecture legend lemon lesson letter lettuce library lichen limit lizard lobby locker
    logic lotus luggage lumber lunch machine magnet mallet mammal manner mantle maple marble
    margin market marsh mattress meadow medal melody melon memory merchant metal meteor method
    microscope midnight mineral minute mirror mission mitten mixture moment monarch monkey
    morning mosaic motive motor mountain mouse movie muffin museum music mustard mystery napkin
    nation nature needle nephew network nickel noodle notion novel number nursery nutmeg oasis
    oatmeal object oboe ocean octopus office olive onion opera opinion orange orbit orchard
    orchid organ ornament ostrich outcome oven oxygen oyster package paddle painter palace
    pancake panther paper parade parcel parent parrot partner passage pasta pasture patch
    pattern pavement peach peanut pearl pebble pelican pencil pepper perfume petal phrase piano
    picnic picture pigeon pillow pilot pirate pizza planet plaster plate platform pocket poem
    poet poison polar police polish pollen pony poplar portrait potato pottery powder prairie
    present prince prison profit promise proverb pudding pulley pumpkin puppet purpose puzzle
    pyramid quarry quartz queen question quilt quiver rabbit radar radio radish raft railway
    rainbow raisin razor reason recipe record reef region remedy report rescue reward rhythm
    ribbon rice riddle rifle robin rocket roof rope rubber rudder ruler rumour saddle sailor
    salad salmon sandal sapphire satin saucer scarf scholar school science scissors sculptor
    season secret senate sentence sergeant servant shadow shelf shelter sheriff shield shoulder
    shovel shrimp signal silence silver singer sister sketch skill slipper smoke snail soldier
    solution sonnet source spade sparrow speech spider spinach spiral spoon sprout squash
    squirrel stable stadium stair stamp statue steam stocking stomach stove strategy straw
    stream street student studio subject suburb sugar summer sunset supper surface surgeon
    swallow sweater symbol system tablet tailor talent tavern teacher teapot temple tennis
    texture theatre theory thimble thistle thread throne thumb thunder ticket tiger timber
    tissue toast tobacco tomato tongue topic torch tortoise tower tractor trader tradition
    traffic treasure treaty trial triangle tribe trophy trouble trousers trumpet trunk tulip
    tunnel turban turkey turnip turtle tutor twilight tyrant umbrella uncle uniform union
    universe uranium vacuum valley valve vanilla vapour vehicle velvet venture verdict vessel
    victory villa vinegar violet violin virtue vision voice volcano volume voyage vulture
    waffle wagon walnut walrus wardrobe warrior water weapon weather wedding whale wheat wheel
    whisper whistle widow willow window winter wisdom witness wizard wolf wonder worker worm
    wrist writer yacht yard yogurt youth zebra zipper zone"""
)
"""Plain nouns of which none stands within another: finding one in a text never finds two."""


def compounds(rng: random.Random) -> Iterator[str]:
    """Yield hyphened pairs of WORDS without end of practical meaning, none of them twice."""
    seen: set[str] = set()
    while len(seen) < len(WORDS) * (len(WORDS) - 1):
        pair = "-".join(rng.sample(WORDS, 2))
        if pair not in seen:
            seen.add(pair)
            yield pair


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
