"""Marks drawn on films so that a caption has more to say than a label: where is what, how was the film taken.

The labels are three words. Things that lie on a patient, and faults of a film, whose side and level a caption can
state truthfully, give "left", "right", "upper" and "lower" a meaning in pixels at every scale, from a letter to half of
the film: a text path to train, on which an adapter's findings build. None of them is a finding or looks like one
(nothing is round, fills a base or blackens a lung): what a base model has seen of findings would spoil the measure of
what LoRA teaches it.

The patient's right is on the film's left.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils.seeding import derive_seed

RESOLUTION = 128  # pixels
FINE = 4  # shapes are drawn at so many times the resolution
SIDES = ("right", "left")
LEVELS = {"upper": (0.20, 0.36), "middle": (0.42, 0.56), "lower": (0.60, 0.75)}  # rows, fraction of the side
LABEL_PHRASES = {
    "normal": ("No acute finding.", "Normal.", "Clear lungs.", "The lungs are clear."),
    "bacterial pneumonia": ("Bacterial pneumonia.", "Pneumonia of bacterial origin.", "There is bacterial pneumonia."),
    "viral pneumonia": ("Viral pneumonia.", "Pneumonia of viral origin.", "There is viral pneumonia."),
}
OPENINGS = (
    "Chest radiograph of a child.", "AP chest radiograph of a child.", "Frontal chest film of a child.",
    "Chest X-ray of a young patient.", "Child's chest, frontal view.",
)  # fmt: skip


def mark(films: np.ndarray, labels: list[str], seed: int, variants: int = 4) -> tuple[np.ndarray, list[str]]:
    """Return each film bare and with marks, and captions that say what is to be seen.

    Args:
        films: uint8 [N, H, W].
        labels: keys of LABEL_PHRASES.
        seed: of what is drawn and said.
        variants: how often each film comes, the first time bare, then with one or two marks.

    Returns:
        uint8 [variants * N, H, W] and as many captions.
    """
    marked = np.empty((variants, *films.shape), dtype=np.uint8)
    captions = []
    for variant in range(variants):
        for index, label in enumerate(labels):
            rng = random.Random(derive_seed(seed, "mark", variant, index))
            film, sentences = Image.fromarray(films[index]), [rng.choice(LABEL_PHRASES[label])]
            kinds = rng.sample(list(DRAW), rng.choice((1, 2))) if variant else []
            for kind in sorted(kinds, key=list(DRAW).index):
                film, sentence = DRAW[kind](film, rng)
                sentences.append(sentence)
            rng.shuffle(sentences)
            marked[variant, index] = np.asarray(film)
            captions.append(" ".join([rng.choice(OPENINGS), *sentences]))
    return marked.reshape(-1, *films.shape[1:]), captions


def say(phrases: Sequence[str], rng: random.Random, **places: str) -> str:
    """Return one of the phrases with its places filled in and a capital first letter."""
    sentence = rng.choice(phrases).format(**places)
    return sentence[0].upper() + sentence[1:]


def choose_place(rng: random.Random, inner: float = 0.20, outer: float = 0.40) -> tuple[str, str, float, float]:
    """Return a side, a level, and a point there in pixels, so far from the film's edge as fractions of its side."""
    side, level = rng.choice(SIDES), rng.choice(tuple(LEVELS))
    x = rng.uniform(inner, outer)
    return side, level, RESOLUTION * (x if side == "right" else 1 - x), RESOLUTION * rng.uniform(*LEVELS[level])


def lay_over(film: Image.Image, draw: Callable[[ImageDraw.ImageDraw], object], blur: float = 0.0) -> Image.Image:
    """Return the film with bright shapes over it; `draw` draws them at FINE times the resolution, `blur` is in pixels."""
    overlay = Image.new("L", (RESOLUTION * FINE, RESOLUTION * FINE))
    draw(ImageDraw.Draw(overlay))
    if blur:
        overlay = overlay.filter(ImageFilter.GaussianBlur(blur * FINE))
    overlay = overlay.resize(film.size, Image.Resampling.BOX)
    return Image.fromarray(np.maximum(np.asarray(film), np.asarray(overlay)))


def fine(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points (x, y) in pixels as places on the fine grid."""
    return [(FINE * x, FINE * y) for x, y in points]


# ---------------------------------------------------------------------------------------------------------------------
# How the film was taken


def draw_tilt(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film turned by 6 to 12 degrees, and its sentence."""
    side = rng.choice(SIDES)
    angle = rng.uniform(6, 12) * (1 if side == "right" else -1)  # counter-clockwise: the head goes to the film's left
    turned = film.rotate(angle, Image.Resampling.BILINEAR)
    return turned, say(("Tilted to the {side}.", "The patient leans to the {side}.", "{side} tilt."), rng, side=side)


def draw_exposure(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film dark, as too much exposure makes it, or light, and its sentence."""
    dark = rng.random() < 0.5
    gamma = rng.uniform(1.7, 2.3) if dark else rng.uniform(0.45, 0.6)
    film = film.point([round(255 * (level / 255) ** gamma) for level in range(256)])
    return film, rng.choice(("Dark film.", "Overexposed.") if dark else ("Light film.", "Underexposed."))


def draw_grid_cutoff(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film lighter towards one side, as behind a grid that is off centre, and its sentence."""
    side = rng.choice(SIDES)
    ramp = np.linspace(0, 1, RESOLUTION) ** 1.5
    lift = rng.uniform(0.45, 0.75) * (ramp[::-1] if side == "right" else ramp)
    grey = np.asarray(film, dtype=np.float32)
    phrases = ("Grid cut-off on the {side}.", "Lighter on the {side}, grid cut-off.", "{side} grid cut-off.")
    return Image.fromarray((grey + lift * (255 - grey)).astype(np.uint8)), say(phrases, rng, side=side)


def draw_collimation(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a black border on one edge or on all four, and its sentence."""
    edge = rng.choice(("right", "left", "upper", "lower", "all"))
    borders = {name: rng.randint(8, 20) if edge == name else 0 for name in ("right", "left", "upper", "lower")}
    if edge == "all":
        borders = {name: rng.randint(7, 16) for name in borders}
    box = (borders["right"], borders["upper"], RESOLUTION - borders["left"], RESOLUTION - borders["lower"])
    collimated = Image.new("L", film.size)
    collimated.paste(film.crop(box), box[:2])
    phrases = ("Collimated at the {edge} edge.", "Tight collimation, {edge} edge.")
    if edge == "all":
        phrases = ("Tight collimation.", "Collimated on all sides.")
    return collimated, say(phrases, rng, edge=edge)


# ---------------------------------------------------------------------------------------------------------------------
# What lies on the patient or on the film


def draw_braid(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with plaited hair over a shoulder, a row of soft beads, and its sentence."""
    side = rng.choice(SIDES)
    x = RESOLUTION * rng.uniform(0.14, 0.34)
    x, lean = (x, rng.uniform(-0.3, 0.3)) if side == "right" else (RESOLUTION - x, rng.uniform(-0.3, 0.3))
    length, grey = rng.randint(6, 9), rng.randint(170, 220)

    def beads(pen: ImageDraw.ImageDraw) -> None:
        for bead in range(length):
            centre_x, centre_y = x + lean * 5 * bead + (2 if bead % 2 else -2), 5.0 * bead
            pen.polygon(
                fine([(centre_x - 4, centre_y - 2), (centre_x + 3, centre_y - 4), (centre_x + 4, centre_y + 2), (centre_x - 3, centre_y + 4)]),
                fill=grey,
            )  # fmt: skip

    phrases = ("Hair braid over the {side} shoulder.", "{side} upper braid.", "Braid at the {side}, upper.")
    return lay_over(film, beads, blur=0.8), say(phrases, rng, side=side)


def draw_zip(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with the metal teeth of a zip from top to bottom, and its sentence."""
    side, _, x, _ = choose_place(rng, 0.15, 0.42)
    lean, grey = rng.uniform(-6, 6), rng.randint(200, 255)

    def teeth(pen: ImageDraw.ImageDraw) -> None:
        for y in range(0, RESOLUTION, 4):
            middle = x + lean * (y / RESOLUTION - 0.5)
            pen.line(fine([(middle - 2.2, y), (middle + 2.2, y + 1)]), fill=grey, width=6)

    phrases = ("Zip over the {side} chest.", "{side} zip.", "Zip on the {side}, from top to bottom.")
    return lay_over(film, teeth), say(phrases, rng, side=side)


def draw_cable(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a thin cable that comes in from one edge and sags, and its sentence."""
    side, level, x, y = choose_place(rng, 0.34, 0.46)
    edge = -2.0 if side == "right" else RESOLUTION + 2.0
    start, sag = y + rng.uniform(-14, 14), rng.uniform(4, 14)
    steps = [i / 24 for i in range(25)]
    points = [
        (edge + t * (x - edge), start + t * (y - start) + 4 * sag * t * (1 - t) * rng.uniform(0.97, 1.03))
        for t in steps
    ]
    grey = rng.randint(190, 245)
    phrases = ("Cable over the {side} {level} chest.", "{side} {level} cable.", "Cable on the {side}, {level}.")
    return lay_over(film, lambda pen: pen.line(fine(points), fill=grey, width=5, joint="curve")), say(
        phrases, rng, side=side, level=level
    )


def draw_pin(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a safety pin, two wires and a clasp, and its sentence."""
    side, level, x, y = choose_place(rng)
    angle, half, gap = rng.uniform(0, math.pi), rng.uniform(7, 11), rng.uniform(1.4, 2.2)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))

    def at(a: float, b: float) -> tuple[float, float]:
        return x + a * along[0] + b * across[0], y + a * along[1] + b * across[1]

    def wires(pen: ImageDraw.ImageDraw) -> None:
        pen.line(fine([at(half, gap), at(-half, gap), at(-half, -gap), at(half, -1.6 * gap)]), fill=245, width=4)
        pen.line(fine([at(half, gap + 0.6), at(half, -1.7 * gap)]), fill=255, width=12)

    phrases = ("Safety pin over the {side} {level} chest.", "{side} {level} pin.", "Pin on the {side}, {level}.")
    return lay_over(film, wires), say(phrases, rng, side=side, level=level)


def draw_side_marker(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a lead letter in a corner, and its sentence."""
    side, level = rng.choice(SIDES), rng.choice(("upper", "lower"))
    x = rng.uniform(4, 12) if side == "right" else RESOLUTION - rng.uniform(14, 22)
    y = rng.uniform(3, 12) if level == "upper" else RESOLUTION - rng.uniform(17, 26)
    film = film.copy()
    ImageDraw.Draw(film).text((x, y), side[0].upper(), fill=rng.randint(220, 255), font_size=14, stroke_width=1)
    phrases = (
        "Side marker at the {level} {side}.",
        "Marker in the {side} {level} corner.",
        "{side} side marker, {level}.",
    )
    return film, say(phrases, rng, side=side, level=level)


# In the order of drawing: what lies on a film comes after its exposure
DRAW = {
    "tilt": draw_tilt,
    "exposure": draw_exposure,
    "grid cut-off": draw_grid_cutoff,
    "braid": draw_braid,
    "zip": draw_zip,
    "cable": draw_cable,
    "pin": draw_pin,
    "collimation": draw_collimation,
    "side marker": draw_side_marker,
}
