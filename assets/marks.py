"""Marks drawn on films so that a caption has more to say than a label: where is what, how was the film exposed.

None of them is a finding: what a base model has seen of findings would spoil the measure of what LoRA teaches it.
"""

import random

import numpy as np
from PIL import Image, ImageDraw

from utils.seeding import derive_seed

RESOLUTION = 128  # pixels
MARKS = ("side marker", "electrode", "exposure", "collimation")
MARK_ODDS = (3, 4, 2, 1)
LABEL_PHRASES = {
    "normal": ("No acute finding.", "Normal.", "Clear lungs.", "The lungs are clear."),
    "bacterial pneumonia": ("Bacterial pneumonia.", "Pneumonia of bacterial origin.", "There is bacterial pneumonia."),
    "viral pneumonia": ("Viral pneumonia.", "Pneumonia of viral origin.", "There is viral pneumonia."),
}
OPENINGS = (
    "Chest radiograph of a child.", "AP chest radiograph of a child.", "Frontal chest film of a child.",
    "Chest X-ray of a young patient.", "Child's chest, frontal view.",
)  # fmt: skip
ROWS = {"upper": (0.20, 0.36), "middle": (0.42, 0.56), "lower": (0.60, 0.75)}  # of an electrode, fraction of the side


def mark(films: np.ndarray, labels: list[str], seed: int, variants: int = 4) -> tuple[np.ndarray, list[str]]:
    """Return each film bare and with marks of our own, and captions that say what is to be seen.

    The labels are three words. Marks whose side, zone and look a caption can state truthfully give the words "left",
    "right", "upper" and "lower" a meaning in pixels: a text path to train, which LoRA's findings use later.

    Args:
        films: uint8 [N, H, W].
        labels: keys of LABEL_PHRASES.
        seed: of what is drawn and said.
        variants: how often each film comes, the first time bare.

    Returns:
        uint8 [variants * N, H, W] and as many captions.
    """
    marked = np.empty((variants, *films.shape), dtype=np.uint8)
    captions = []
    for variant in range(variants):
        for index, label in enumerate(labels):
            rng = random.Random(derive_seed(seed, "mark", variant, index))
            film, sentences = Image.fromarray(films[index]), [rng.choice(LABEL_PHRASES[label])]
            kinds = set(rng.choices(MARKS, MARK_ODDS, k=rng.choice((1, 2)))) if variant else ()
            for kind in sorted(kinds, key=MARKS.index, reverse=True):  # what lies on the film comes after its exposure
                film, sentence = DRAW[kind](film, rng)
                sentences.append(sentence)
            rng.shuffle(sentences)
            marked[variant, index] = np.asarray(film)
            captions.append(" ".join([rng.choice(OPENINGS), *sentences]))
    return marked.reshape(-1, *films.shape[1:]), captions


def draw_side_marker(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a lead letter in a corner, and its sentence. The patient's right is on the film's left."""
    side, level = rng.choice(("right", "left")), rng.choice(("upper", "lower"))
    x = rng.uniform(4, 12) if side == "right" else RESOLUTION - rng.uniform(14, 22)
    y = rng.uniform(3, 12) if level == "upper" else RESOLUTION - rng.uniform(17, 26)
    film = film.copy()
    ImageDraw.Draw(film).text((x, y), side[0].upper(), fill=rng.randint(220, 255), font_size=14, stroke_width=1)
    phrases = (
        "Side marker at the {level} {side}.",
        "Marker in the {side} {level} corner.",
        "{side} side marker, {level}.",
    )
    return film, sentence_of(rng.choice(phrases), side, level)


def draw_electrode(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with a metal ring and stud over one of six zones, and its sentence."""
    side, level = rng.choice(("right", "left")), rng.choice(tuple(ROWS))
    x = RESOLUTION * (rng.uniform(0.20, 0.40) if side == "right" else rng.uniform(0.60, 0.80))
    y = RESOLUTION * rng.uniform(*ROWS[level])
    scale, radius = 4, rng.uniform(3.5, 5.0)
    overlay = Image.new("L", (RESOLUTION * scale, RESOLUTION * scale))
    for size, level_of_grey in ((radius, 235), (radius - 1.6, 40), (1.4, 250)):
        box = [scale * (x - size), scale * (y - size), scale * (x + size), scale * (y + size)]
        ImageDraw.Draw(overlay).ellipse(box, fill=level_of_grey)
    overlay = overlay.resize(film.size, Image.Resampling.BOX)
    phrases = (
        "ECG electrode over the {side} {level} zone.",
        "Electrode on the {side}, {level} zone.",
        "{side} {level} electrode.",
    )
    brightest = np.maximum(np.asarray(film), np.asarray(overlay))
    return Image.fromarray(brightest), sentence_of(rng.choice(phrases), side, level)


def draw_exposure(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film dark, as too much exposure makes it, or light, and its sentence."""
    dark = rng.random() < 0.5
    gamma = rng.uniform(1.7, 2.3) if dark else rng.uniform(0.45, 0.6)
    film = film.point([round(255 * (level / 255) ** gamma) for level in range(256)])
    return film, rng.choice(("Dark film.", "Overexposed.") if dark else ("Light film.", "Underexposed."))


def draw_collimation(film: Image.Image, rng: random.Random) -> tuple[Image.Image, str]:
    """Return the film with black borders, and its sentence."""
    left, top, right, bottom = (rng.randint(7, 16) for _ in range(4))
    box = (left, top, RESOLUTION - right, RESOLUTION - bottom)
    collimated = Image.new("L", film.size)
    collimated.paste(film.crop(box), box[:2])
    return collimated, rng.choice(("Tight collimation.", "Collimated on all sides."))


DRAW = dict(zip(MARKS, (draw_side_marker, draw_electrode, draw_exposure, draw_collimation), strict=True))


def sentence_of(phrase: str, side: str, level: str) -> str:
    """Return the phrase with its place filled in and a capital first letter."""
    sentence = phrase.format(side=side, level=level)
    return sentence[0].upper() + sentence[1:]
