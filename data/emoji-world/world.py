"""The emoji world: its objects, its scenes, how a scene is chosen at random and how it is painted.

Everything is a function of a `random.Random`; nothing here needs torch or the emoji font (`sprites.webp` holds the pictures).
The sentences about a scene are made in `text.py`, the files of the held-out split in `build.py`.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SIDE, PATCH = 192, 16  # pixels of a picture and of a vision-tower patch
GRID = SIDE // PATCH
SPRITE = 128  # pixels of one cell of the sprite sheet
SHEET_COLUMNS = 10

# name: (code point, plural, other words for it). Names that a neutral
# sentence needs (light, picture, table) are avoided, and so is "lamp": the couch of the font comes with one.
OBJECTS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "couch": (0x1F6CB, "couches", ("sofa",)),
    "television": (0x1F4FA, "televisions", ("TV",)),
    "bulb": (0x1F4A1, "bulbs", ("light bulb",)),
    "candle": (0x1F56F, "candles", ()),
    "window": (0x1FA9F, "windows", ()),
    "mirror": (0x1FA9E, "mirrors", ()),
    "clock": (0x1F570, "clocks", ()),
    "houseplant": (0x1FAB4, "houseplants", ("potted plant",)),
    "book": (0x1F4D5, "books", ("novel",)),
    "guitar": (0x1F3B8, "guitars", ()),
    "teddy bear": (0x1F9F8, "teddy bears", ("teddy",)),
    "painting": (0x1F5BC, "paintings", ()),
    "chair": (0x1FA91, "chairs", ("seat",)),
    "bed": (0x1F6CF, "beds", ()),
    "door": (0x1F6AA, "doors", ()),
    "radio": (0x1F4FB, "radios", ()),
    "newspaper": (0x1F4F0, "newspapers", ()),
    "toilet": (0x1F6BD, "toilets", ()),
    "shower": (0x1F6BF, "showers", ()),
    "bathtub": (0x1F6C1, "bathtubs", ("tub",)),
    "soap": (0x1F9FC, "soaps", ()),
    "toothbrush": (0x1FAA5, "toothbrushes", ()),
    "paper roll": (0x1F9FB, "paper rolls", ("toilet paper",)),
    "sponge": (0x1F9FD, "sponges", ()),
    "bucket": (0x1FAA3, "buckets", ("pail",)),
    "basket": (0x1F9FA, "baskets", ("hamper",)),
    "fork": (0x1F374, "forks", ()),
    "cup": (0x2615, "cups", ("mug",)),
    "pizza": (0x1F355, "pizzas", ()),
    "pan": (0x1F373, "pans", ("skillet",)),
    "bread": (0x1F35E, "breads", ("loaf",)),
    "cheese": (0x1F9C0, "cheeses", ()),
    "banana": (0x1F34C, "bananas", ()),
    "apple": (0x1F34E, "apples", ()),
    "carrot": (0x1F955, "carrots", ()),
    "teapot": (0x1FAD6, "teapots", ("kettle",)),
    "knife": (0x1F52A, "knives", ()),
    "bowl": (0x1F963, "bowls", ()),
    "egg": (0x1F95A, "eggs", ()),
    "goblet": (0x1F377, "goblets", ("wine glass",)),
    "cake": (0x1F370, "cakes", ()),
    "car": (0x1F697, "cars", ("automobile",)),
    "bus": (0x1F68C, "buses", ()),
    "bicycle": (0x1F6B2, "bicycles", ("bike",)),
    "traffic light": (0x1F6A6, "traffic lights", ("stoplight",)),
    "stop sign": (0x1F6D1, "stop signs", ()),
    "motorcycle": (0x1F3CD, "motorcycles", ("motorbike",)),
    "truck": (0x1F69A, "trucks", ("lorry",)),
    "scooter": (0x1F6F4, "scooters", ()),
    "mailbox": (0x1F4EB, "mailboxes", ()),
    "gas pump": (0x26FD, "gas pumps", ()),
    "cow": (0x1F404, "cows", ()),
    "horse": (0x1F40E, "horses", ()),
    "pig": (0x1F416, "pigs", ()),
    "sheep": (0x1F411, "sheep", ()),
    "chicken": (0x1F413, "chickens", ("rooster",)),
    "tractor": (0x1F69C, "tractors", ()),
    "duck": (0x1F986, "ducks", ()),
    "corn": (0x1F33D, "corn", ("maize",)),
    "sunflower": (0x1F33B, "sunflowers", ()),
    "umbrella": (0x26F1, "umbrellas", ("parasol",)),
    "boat": (0x26F5, "boats", ("sailboat",)),
    "palm": (0x1F334, "palms", ("palm tree",)),
    "fish": (0x1F41F, "fishes", ()),
    "crab": (0x1F980, "crabs", ()),
    "shell": (0x1F41A, "shells", ("seashell",)),
    "sandal": (0x1FA74, "sandals", ("flip-flop",)),
    "dolphin": (0x1F42C, "dolphins", ()),
    "anchor": (0x2693, "anchors", ()),
    "laptop": (0x1F4BB, "laptops", ("computer",)),
    "printer": (0x1F5A8, "printers", ()),
    "telephone": (0x260E, "telephones", ("phone",)),
    "briefcase": (0x1F4BC, "briefcases", ()),
    "scissors": (0x2702, "scissors", ()),
    "calendar": (0x1F4C5, "calendars", ()),
    "paperclip": (0x1F4CE, "paperclips", ("paper clip",)),
    "tree": (0x1F333, "trees", ()),
    "dog": (0x1F415, "dogs", ("puppy",)),
    "kite": (0x1FA81, "kites", ()),
    "ball": (0x26BD, "balls", ("football",)),
    "tulip": (0x1F337, "tulips", ()),
    "butterfly": (0x1F98B, "butterflies", ()),
    "bird": (0x1F426, "birds", ()),
    "rabbit": (0x1F407, "rabbits", ("bunny",)),
    "cat": (0x1F408, "cats", ("kitten",)),
}
NAMES = list(OBJECTS)
INDEX = {name: i for i, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Kind:
    """A type of scene: groups of objects that come together, objects that come now and then, what people do there."""

    groups: tuple[tuple[str, ...], ...]
    occasional: tuple[str, ...]
    activities: tuple[str, ...]
    sky: tuple[int, int, int]
    ground: tuple[int, int, int]

    @property
    def typical(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


SCENES: dict[str, Kind] = {
    "living room": Kind(
        (("couch", "television", "bulb", "painting"), ("book", "newspaper", "clock"), ("houseplant", "guitar", "cat")),
        ("chair", "dog", "door", "window", "candle", "radio", "laptop", "teddy bear", "cup"),
        ("relax after work", "watch a film together", "sit and talk with guests"),
        (214, 196, 170),
        (150, 110, 80),
    ),
    "bedroom": Kind(
        (("bed", "window", "teddy bear"), ("radio", "candle", "book"), ("mirror", "door", "bulb")),
        ("cat", "chair", "clock", "laptop", "sandal", "painting", "cup", "basket"),
        ("sleep", "get dressed in the morning", "rest on a quiet evening"),
        (190, 185, 215),
        (160, 130, 120),
    ),
    "bathroom": Kind(
        (("toilet", "paper roll", "soap"), ("shower", "bathtub", "sponge"), ("toothbrush", "mirror", "basket")),
        ("window", "door", "candle", "cat", "sandal", "houseplant", "bucket"),
        ("wash themselves", "get ready for the day", "clean their teeth"),
        (205, 228, 235),
        (170, 195, 205),
    ),
    "kitchen": Kind(
        (("pan", "knife", "egg"), ("bread", "cheese", "teapot"), ("banana", "apple", "carrot"), ("bowl", "cup")),
        ("pizza", "goblet", "cake", "chair", "window", "cat", "clock", "fork"),
        ("cook a meal", "prepare breakfast", "wash the dishes"),
        (235, 222, 190),
        (190, 160, 120),
    ),
    "restaurant": Kind(
        (("pizza", "fork", "goblet"), ("cake", "cup", "candle"), ("chair", "painting", "bulb")),
        ("knife", "bread", "cheese", "fish", "window", "tulip", "bowl"),
        ("eat dinner", "celebrate a birthday", "order some food"),
        (150, 90, 80),
        (110, 70, 55),
    ),
    "street": Kind(
        (("car", "traffic light", "bus"), ("bicycle", "scooter", "mailbox"), ("truck", "stop sign", "gas pump")),
        ("motorcycle", "dog", "tree", "bird", "cat", "newspaper", "briefcase"),
        ("drive to work", "cross to the other side", "wait for a ride"),
        (165, 190, 215),
        (120, 120, 125),
    ),
    "farm": Kind(
        (("cow", "horse", "sheep"), ("pig", "chicken", "duck"), ("tractor", "corn", "sunflower")),
        ("dog", "tree", "bucket", "truck", "carrot", "rabbit", "egg", "bird"),
        ("feed the animals", "harvest the crops", "work in the field"),
        (175, 205, 235),
        (150, 165, 90),
    ),
    "beach": Kind(
        (("umbrella", "palm", "sandal"), ("boat", "anchor", "fish"), ("crab", "shell", "dolphin")),
        ("ball", "dog", "bird", "kite", "book", "basket", "bucket"),
        ("swim in the sea", "lie in the sun", "build castles in the sand"),
        (150, 205, 240),
        (235, 215, 165),
    ),
    "office": Kind(
        (("laptop", "printer", "telephone"), ("briefcase", "calendar", "clock"), ("scissors", "paperclip", "chair")),
        ("cup", "houseplant", "book", "window", "bulb", "door", "newspaper"),
        ("write reports", "attend a meeting", "answer calls"),
        (215, 218, 222),
        (140, 145, 155),
    ),
    "park": Kind(
        (("tree", "bird", "butterfly"), ("dog", "ball", "kite"), ("tulip", "rabbit", "bicycle")),
        ("cat", "duck", "sunflower", "umbrella", "book", "scooter", "horse", "basket"),
        ("take a walk", "have a picnic", "play outside"),
        (185, 220, 245),
        (110, 170, 95),
    ),
}
GROUP_ON, IN_GROUP, OUT_OF_GROUP, OCCASIONAL, RARE = 0.6, 0.85, 0.12, 0.13, 0.15
FEWEST, MOST = 6, 9  # objects in a picture
SIDES = {"small": (28, 32, 36), "medium": (46, 52, 58), "large": (70, 78, 86)}  # longest side of a sprite, pixels
SMALL_BELOW, LARGE_FROM = 0.04, 0.10  # area share of the box: the size groups
SNAP, OVERLAP = 8, 0.04  # placement step (pixels); shared area allowed


@dataclass(frozen=True)
class Thing:
    """One object of a picture; box = (x1, y1, x2, y2) in pixels, right and bottom excluded."""

    name: str
    box: tuple[int, int, int, int]
    flip: bool

    @property
    def share(self) -> float:
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1) / SIDE**2

    @property
    def size(self) -> str:
        return "small" if self.share < SMALL_BELOW else "medium" if self.share < LARGE_FROM else "large"


@dataclass(frozen=True)
class Scene:
    kind: str
    things: tuple[Thing, ...]

    @property
    def names(self) -> set[str]:
        return {thing.name for thing in self.things}


def sample_names(rng: random.Random, kind: str) -> list[str]:
    """Objects of one scene: whole groups come or stay away together, then occasional and rarely an unexpected one."""
    scene = SCENES[kind]
    while True:
        names: list[str] = []
        for group in scene.groups:
            chance = IN_GROUP if rng.random() < GROUP_ON else OUT_OF_GROUP
            names += [name for name in group if rng.random() < chance]
        names += [name for name in scene.occasional if rng.random() < OCCASIONAL]
        if rng.random() < RARE:
            names.append(rng.choice(NAMES))
        names = list(dict.fromkeys(names))
        if FEWEST <= len(names) <= MOST:
            return names


def sample_scene(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene with 6 to 9 objects whose boxes hardly overlap."""
    while True:
        chosen = kind or rng.choice(list(SCENES))
        names = sample_names(rng, chosen)
        rng.shuffle(names)
        things = place(names, rng)
        if len(things) == len(names):
            return Scene(chosen, things)


def crowd(rng: random.Random) -> Scene:
    """A dense scene of unrelated objects: training for the eye alone."""
    return Scene(rng.choice(list(SCENES)), place(rng.sample(NAMES, rng.randint(8, 14)), rng, (0.6, 0.3, 0.1)))


def place(
    names: list[str], rng: random.Random, weights: tuple[float, float, float] = (0.40, 0.38, 0.22)
) -> tuple[Thing, ...]:
    """Put objects on an 8-pixel grid, large ones first; after 25 failed tries an object shrinks, after 60 it is left out."""
    placed: list[Thing] = []
    wanted = dict(zip(names, rng.choices(list(SIDES), weights, k=len(names)), strict=True))
    for name in sorted(names, key=lambda name: list(SIDES).index(wanted[name]), reverse=True):
        height, width = _sprite_shape(name)
        for attempt in range(60):
            size = wanted[name] if attempt < 25 else rng.choices(list(SIDES), (0.7, 0.3, 0.0))[0]
            longest = rng.choice(SIDES[size])
            w, h = round(longest * width / max(width, height)), round(longest * height / max(width, height))
            x, y = rng.randint(0, (SIDE - w) // SNAP) * SNAP, rng.randint(0, (SIDE - h) // SNAP) * SNAP
            thing = Thing(name, (x, y, x + w, y + h), rng.random() < 0.5)
            if all(_overlap(thing.box, other.box) <= OVERLAP for other in placed):
                placed.append(thing)
                break
    rng.shuffle(placed)  # the order must not tell the size
    return tuple(placed)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area of two boxes as a share of the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def absent(scene: Scene, rng: random.Random, kind: str, skip: set[str] | frozenset[str] = frozenset()) -> str:
    """An object that is not there, as POPE draws it: "adversarial" (typical of the scene), "popular" (frequent) or "random"."""
    pools = {"adversarial": SCENES[scene.kind].typical, "popular": popular(), "random": NAMES}
    here = scene.names | skip
    # a scene may hold everything that is typical of it
    return rng.choice([n for n in pools[kind] if n not in here] or [n for n in NAMES if n not in here])


@functools.cache
def presence() -> dict[str, dict[str, float]]:
    """P(object present | type of scene), counted over 4,000 scenes of each type drawn with a fixed seed (+0.5 smoothing)."""
    rng, table = random.Random(2026), {}
    for kind in SCENES:
        counts = dict.fromkeys(NAMES, 0.5)
        for _ in range(4000):
            for name in sample_names(rng, kind):
                counts[name] += 1
        table[kind] = {name: round(count / 4001, 6) for name, count in counts.items()}
    return table


@functools.cache
def popular() -> tuple[str, ...]:
    """The 25 objects seen most often over all scenes."""
    table = presence()
    return tuple(sorted(NAMES, key=lambda name: (-sum(table[kind][name] for kind in SCENES), name))[:25])


# ------------------------------------------------------------------------------------------------ painting
@functools.cache
def _sprites() -> dict[str, Image.Image]:
    sheet = Image.open(HERE / "sprites.webp").convert("RGBA")
    cells = {}
    for i, name in enumerate(NAMES):
        x, y = i % SHEET_COLUMNS * SPRITE, i // SHEET_COLUMNS * SPRITE
        cell = sheet.crop((x, y, x + SPRITE, y + SPRITE))
        cells[name] = cell.crop(cell.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    return cells


def _sprite_shape(name: str) -> tuple[int, int]:
    width, height = _sprites()[name].size
    return height, width


@functools.cache
def _layer(name: str, width: int, height: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """(colour times alpha, 1 - alpha) of a sprite at one size, float32 (height, width, 3 or 1)."""
    sprite = _sprites()[name].resize((width, height), Image.Resampling.BILINEAR)
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(sprite, dtype=np.float32)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha, 1 - alpha


@functools.cache
def _backgrounds() -> tuple[dict[str, list[np.ndarray]], list[np.ndarray]]:
    """Forty skies and grounds for each type of scene and 64 fields of grain, made once: painting must keep up with training."""
    rng, ramp = np.random.default_rng(0), np.linspace(-12, 12, SIDE, dtype=np.float32)[None, :, None]
    fields = {}
    for kind, scene in SCENES.items():
        fields[kind] = []
        for _ in range(40):
            tint, horizon = rng.integers(-18, 19, 3), int(SIDE * rng.uniform(0.35, 0.65))
            field = np.empty((SIDE, SIDE, 3), np.float32)
            field[:horizon], field[horizon:] = np.array(scene.sky) + tint, np.array(scene.ground) + tint
            fields[kind].append(field + ramp * rng.choice([-1, 1]))
    grain = [rng.normal(0, 6, (SIDE, SIDE, 1)).astype(np.float32) for _ in range(64)]
    return fields, grain


def paint(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture of a scene, uint8 (192, 192, 3)."""
    fields, grain = _backgrounds()
    picture = rng.choice(fields[scene.kind]).copy()
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        colour, through = _layer(thing.name, x2 - x1, y2 - y1, thing.flip)
        picture[y1:y2, x1:x2] = picture[y1:y2, x1:x2] * through + colour * np.float32(rng.uniform(0.8, 1.12))
    picture += rng.choice(grain)
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)


def label_map(scene: Scene) -> np.ndarray:
    """Which object each vision patch shows: int64 (12, 12), len(NAMES) where none covers a fifth of the patch."""
    labels = np.full((GRID, GRID), len(NAMES), dtype=np.int64)
    cover = np.zeros((GRID, GRID))
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        for row in range(y1 // PATCH, (y2 - 1) // PATCH + 1):
            tall = min(y2, (row + 1) * PATCH) - max(y1, row * PATCH)
            for column in range(x1 // PATCH, (x2 - 1) // PATCH + 1):
                share = tall * (min(x2, (column + 1) * PATCH) - max(x1, column * PATCH)) / PATCH**2
                if share > 0.2 and share >= cover[row, column] * 0.8:
                    labels[row, column], cover[row, column] = INDEX[thing.name], share
    return labels
