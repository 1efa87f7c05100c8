"""Findings drawn into a normal frontal chest film: a small model of how they look, for synthetic films and labels.

What is modelled: the outline of each finding on a film of 128 x 128 pixels, its side and zone, its grey level
relative to the same film's lung, heart and abdomen, soft edges, and the film's own texture showing through. A pleural
effusion fills the base up to a meniscus that climbs the lateral wall; in a pneumothorax the lung shrinks towards its
medial base, outlined by the visceral pleura, and leaves a dark rim; nodules and masses are round; cardiomegaly
pushes the heart's borders outwards; a pacemaker is a metal can with leads that run through the right atrium.

What is not modelled: projection and scatter, a supine patient, loculated fluid, tension, shift of the mediastinum,
change of the vessels, calcification, cavities, causes and consequences (no oedema with cardiomegaly), nor how often a
finding occurs. What is drawn is plain to see and much alike from film to film (a nodule or a mass lies in the middle of
its zone), so that a small adapter can learn it in minutes. Films with drawn findings are SYNTHETIC. They show what
software does and are not for diagnosis, nor for training or testing anything that will be used for it.

The patient's right is at the image's left. Rows and columns are in pixels, counted from the centre of the first.
Everything is decided by the film and the generator passed in: equal input gives equal bytes.
"""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from assets.anatomy import ATLAS_PLACES, SIDES, SIZE, Lung, Lungs, checked, find_lungs, rows_between

FINE = 4  # shapes are drawn at so many times the resolution

ZONES = ("upper", "middle", "lower")
FINDINGS = ("pleural effusion", "pneumothorax", "nodule", "mass", "cardiomegaly", "pacemaker")
SIDED = ("pleural effusion", "pneumothorax", "nodule", "mass", "pacemaker")
ZONED = ("nodule", "mass")

DIAMETERS = {
    "nodule": (10.5, 12.5),
    "mass": (15.0, 18.0),
}  # pixels; 30 mm, which part the two, are 12.8 on a 300 mm film
OFF_CENTRE = 1.5  # pixels that a nodule or a mass may lie off the middle of its zone
MIN_RIM = 8.5  # pixels of air beside the smallest pneumothorax
CARDIOTHORACIC = (0.63, 0.72)  # ratio aimed at; above 0.5 counts as enlarged in adults, above 0.55 in small children
FINDING_COUNTS = (0.10, 0.75, 0.15)  # chances of 0, 1 and 2 findings in a film
FINDING_WEIGHTS = (1.5, 0.6, 1.8, 1.9, 0.6, 0.8)  # what is harder to learn comes oftener

NORMAL_PHRASES = (
    "No acute finding.",
    "Normal.",
    "Clear lungs.",
    "The lungs are clear.",
    "Normal heart size.",
    "No finding.",
    "Unremarkable.",
)
PHRASES = {
    "pleural effusion": (
        "{Side} pleural effusion.",
        "Pleural effusion on the {side}.",
        "There is a {side} pleural effusion.",
        "There is pleural fluid on the {side}.",
        "{Side} effusion.",
    ),
    "pneumothorax": (
        "{Side} pneumothorax.",
        "Pneumothorax on the {side}.",
        "There is a {side} pneumothorax.",
        "There is a pneumothorax on the {side} side.",
        "Collapsed lung with a pleural line on the {side}, pneumothorax.",
    ),
    "nodule": (
        "{Side} {zone} zone nodule.",
        "There is a nodule in the {side} {zone} zone.",
        "Nodule in the {side} {zone} lung.",
        "Pulmonary nodule in the {side} {zone} zone.",
        "There is a round nodule in the {side} {zone} lung zone.",
    ),
    "mass": (
        "{Side} {zone} zone mass.",
        "There is a mass in the {side} {zone} zone.",
        "Round mass in the {side} {zone} lung.",
        "Lung mass in the {side} {zone} zone.",
        "There is a mass in the {side} {zone} lung zone.",
    ),
    "cardiomegaly": (
        "Cardiomegaly.",
        "Enlarged heart.",
        "The heart is enlarged.",
        "There is cardiomegaly.",
        "Enlarged cardiac silhouette.",
    ),
    "pacemaker": (
        "{Side} pacemaker.",
        "Pacemaker over the {side} chest with leads.",
        "{Side} chest pacemaker.",
        "There is a pacemaker on the {side}.",
        "Cardiac pacemaker over the {side} chest.",
    ),
}


def draw(
    grey: np.ndarray,
    finding: str,
    side: str | None,
    zone: str | None,
    rng: np.random.Generator,
    lungs: Lungs | None = None,
    severity: float | None = None,
    off_centre: float = OFF_CENTRE,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one finding into a film.

    Args:
        grey: a film without that finding, uint8, [128, 128].
        finding: one of `FINDINGS`.
        side: "right" or "left", the patient's; None for cardiomegaly.
        zone: "upper", "middle" or "lower" for a nodule or a mass, else None.
        rng: decides place, size and shape; the same state gives the same bytes.
        lungs: from `find_lungs`, of this film or of the one it was before other findings; None finds them.
        severity: 0 (small, yet plain to see) to 1 (large); None draws it evenly.
        off_centre: pixels that a nodule or a mass may lie off the middle of its zone.

    Returns:
        The film, uint8, [128, 128], and what was drawn as a mask, bool, [128, 128]: fluid, air with the pleural line,
        the nodule or mass, the enlarged heart whole, the can with its leads.

    Raises:
        ValueError: for a finding, side, zone or severity that does not exist, or a film of another shape.
    """
    check_place(finding, side, zone)
    film = checked(grey)
    if severity is None:
        severity = float(rng.uniform())
    if not 0 <= severity <= 1:
        raise ValueError(f"expected a severity between 0 and 1, got {severity}")
    lungs = find_lungs(grey) if lungs is None else lungs
    if finding == "cardiomegaly":
        film, mask = draw_cardiomegaly(film, lungs, severity, rng)
    elif finding == "pacemaker":
        film, mask = draw_pacemaker(film, lungs, side, severity, rng)
    else:
        lung = getattr(lungs, side)
        air, tissue = grey_levels(film, lungs, lung)
        if finding == "pleural effusion":
            film, mask = draw_effusion(film, lung, air, tissue, severity, rng)
        elif finding == "pneumothorax":
            film, mask = draw_pneumothorax(film, lung, air, tissue, severity, rng)
        else:
            film, mask = draw_round(film, lung, tissue - air, finding, zone, severity, rng, off_centre)
    return film.round().clip(0, 255).astype(np.uint8), mask


def check_place(finding: str, side: str | None, zone: str | None) -> None:
    """Raise ValueError unless the finding exists and has exactly the side and the zone that it needs."""
    if finding not in FINDINGS:
        raise ValueError(f"unknown finding {finding!r}; expected one of {', '.join(FINDINGS)}")
    if side not in (SIDES if finding in SIDED else (None,)):
        expected = " or ".join(SIDES) if finding in SIDED else "None"
        raise ValueError(f"side of {finding}: expected {expected}, got {side!r}")
    if zone not in (ZONES if finding in ZONED else (None,)):
        expected = ", ".join(ZONES) if finding in ZONED else "None"
        raise ValueError(f"zone of {finding}: expected {expected}, got {zone!r}")


def grey_levels(film: np.ndarray, lungs: Lungs, lung: Lung) -> tuple[float, float]:
    """Return the grey levels of a lung and of the soft tissue between the lungs: the contrast that the film has."""
    top, bottom = rows_between(lungs.right, lungs.left, 0.3, 0.85)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    between = (columns > lungs.right.inner[:, None] + 1) & (columns < lungs.left.inner[:, None] - 1)
    between &= (rows >= top) & (rows < bottom)
    air = float(np.median(film[lung.mask])) if lung.mask.any() else float(film.mean())
    tissue = float(np.median(film[between])) if between.any() else float(film.mean())
    return air, float(np.clip(tissue, air + 30, air + 110))


def fine_grid() -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the sub-pixels, [H * FINE, W * FINE] each, in pixels."""
    places = (np.arange(SIZE * FINE) + 0.5) / FINE - 0.5
    return np.broadcast_arrays(places[:, None], places[None, :])


def soften(shape: np.ndarray, blur: float) -> np.ndarray:
    """Return a shape on the fine grid, [H * FINE, W * FINE] in [0, 1], as cover of the pixels, [H, W], edges blurred.

    Args:
        blur: standard deviation in pixels.
    """
    cover = shape.astype(np.float64).reshape(SIZE, FINE, SIZE, FINE).mean(axis=(1, 3))
    return ndimage.gaussian_filter(cover, blur)


def texture(film: np.ndarray, scale: float) -> np.ndarray:
    """Return what of the film is finer than `scale` pixels: ribs, vessels, grain."""
    return film - ndimage.gaussian_filter(film, scale)


def grain(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Return smooth noise of standard deviation 1, [H, W], correlated over about `scale` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), scale)
    return noise / noise.std()


def blend(film: np.ndarray, cover: np.ndarray, level: np.ndarray | float, keep: float, scale: float) -> np.ndarray:
    """Bring the covered part of a film to a grey level, with a share `keep` of its own texture on top."""
    return film + cover * (level + keep * texture(film, scale) - film)


def across(lung: Lung) -> np.ndarray:
    """Return the place between mediastinum (0) and chest wall (1) on the fine grid, [H * FINE, W * FINE]."""
    rows, columns = fine_grid()
    inner = np.interp(rows[:, 0], np.arange(SIZE), lung.inner)[:, None]
    outer = np.interp(rows[:, 0], np.arange(SIZE), lung.outer)[:, None]
    return (columns - inner) / (outer - inner)


def fine_mask(mask: np.ndarray) -> np.ndarray:
    """Return a mask with smooth edges on the fine grid, bool, [H * FINE, W * FINE]."""
    rows, columns = fine_grid()
    soft = ndimage.gaussian_filter(mask.astype(np.float64), 1.0)
    return ndimage.map_coordinates(soft, [rows, columns], order=1, mode="nearest") > 0.5


def draw_effusion(
    film: np.ndarray, lung: Lung, air: float, tissue: float, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Fill the base with fluid: level towards the heart, climbing the chest wall, as dense as the abdomen below."""
    height = lung.base - lung.apex
    rows, _ = fine_grid()
    place = across(lung)
    wall = lung.base - height * (0.36 + 0.32 * severity + rng.uniform(-0.03, 0.03))
    heart = min(lung.dome + 1.0, lung.base - height * (0.14 + 0.34 * severity + rng.uniform(-0.03, 0.03)))
    steepness = rng.uniform(2.2, 3.2)
    surface = heart - (heart - wall) * place.clip(0, 1.1) ** steepness
    floor = np.interp(place, ATLAS_PLACES, lung.dome + 4 + (lung.base - lung.dome) * np.array([0, 0, 0.2, 0.5, 1]))
    fluid = (rows > surface) & (rows < floor) & (place > -0.08) & (place < 1.04)
    cover = soften(fluid, 1.0)
    abdomen = film[int(lung.base) : int(lung.base) + 14][lung_columns(lung)]
    dense = np.median(abdomen) if abdomen.size else tissue
    level = min(np.clip(dense, air + 0.85 * (tissue - air), tissue + 22), 225)
    depth = ((rows - surface) / height).clip(0, 0.5).reshape(SIZE, FINE, SIZE, FINE).mean(axis=(1, 3))
    level = level - 6 + 18 * depth + 1.5 * grain(rng, 0.7)
    new = blend(film, 0.96 * cover, level, 0.3, 4.0)
    return np.maximum(new, film - 12 * cover), cover > 0.5  # fluid never darkens what lies behind it


def lung_columns(lung: Lung) -> tuple[slice, slice]:
    """Return all rows and the inner two thirds of the columns that a lung's base spans."""
    row = int(np.clip(lung.dome, 0, SIZE - 1))
    inner, outer = lung.inner[row], lung.outer[row]
    first, last = sorted((inner, inner + (outer - inner) * 0.67))
    return slice(None), slice(int(max(first, 0)), int(max(last, first + 1)) + 1)


def draw_pneumothorax(
    film: np.ndarray, lung: Lung, air: float, tissue: float, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink the lung towards its medial base; what it leaves is black and without vessels, its edge a thin line."""
    row_of_base = lung.dome + 2
    rows, columns = fine_grid()
    pleural_space = fine_mask(lung.mask)
    top, bottom = (int(lung.apex + share * (lung.dome - lung.apex)) for share in (0.3, 0.9))
    width = float(np.abs(lung.outer - lung.inner)[max(top, 0) : max(bottom, 1)].mean())
    wide = min(0.70 - 0.20 * severity, 1 - MIN_RIM / width) + rng.uniform(-0.02, 0.02)
    wide = max(wide, 0.35)
    tall = 0.84 - 0.12 * severity + rng.uniform(-0.02, 0.02)
    inner = np.interp(rows[:, 0], np.arange(SIZE), lung.inner)[:, None]
    # A point of the shrunken lung lay, before, farther from the mediastinum and higher
    before_rows = row_of_base + (rows - row_of_base) / np.where(rows < row_of_base, tall, 1.0)
    before_inner = np.interp(before_rows[:, 0], np.arange(SIZE), lung.inner)[:, None]
    before_columns = before_inner + (columns - inner) / wide
    soft = ndimage.gaussian_filter(lung.mask.astype(np.float64), 2.0)
    collapsed = ndimage.map_coordinates(soft, [before_rows, before_columns], order=1, mode="nearest") > 0.5
    mediastinal = across(lung) < 0.12
    rim, count = ndimage.label(pleural_space & ~collapsed & ~mediastinal)
    if count:
        rim = rim == 1 + np.bincount(rim.ravel())[1:].argmax()  # slivers along the diaphragm are left out
    cover = soften(rim, 0.7)
    edge = collapsed & ~ndimage.binary_erosion(collapsed, iterations=FINE)
    near_rim = ndimage.binary_dilation(rim, iterations=2 * FINE)
    line = soften(edge & near_rim & pleural_space, 0.4)
    inside = soften(collapsed & pleural_space, 1.0)
    # Without vessels air is darker than the darkest part of the lung, by a share of the film's own contrast
    contrast = tissue - air
    dark = np.percentile(film[lung.mask], 15) if lung.mask.any() else film.mean()
    level = np.minimum(dark - 0.22 * contrast, ndimage.gaussian_filter(film, 4.0) - 0.3 * contrast)
    level = level.clip(12, None) + 1.5 * grain(rng, 0.7)
    new = film + inside * contrast * (0.10 + 0.12 * severity)
    new = new + cover * (level + 0.5 * texture(film, 4.0) - new)
    new = new + line * (12 + 0.55 * contrast)
    return new, (cover > 0.5) | (line > 0.5)


def draw_round(
    film: np.ndarray,
    lung: Lung,
    contrast: float,
    finding: str,
    zone: str,
    severity: float,
    rng: np.random.Generator,
    off_centre: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Put a round opacity into a third of a lung, somewhere dark enough to see it."""
    small, large = DIAMETERS[finding]
    radius = (small + (large - small) * severity) / 2
    row, column = choose_place(film, lung, zone, radius, rng, off_centre)
    window = tuple(
        slice(int(max(0, at - 1.4 * radius) * FINE), int((at + 1.4 * radius + 1) * FINE)) for at in (row, column)
    )
    rows, columns = (places[window] for places in fine_grid())
    angles = np.arctan2(rows - row, columns - column)
    lobes = sum(
        rng.uniform(0.0, 0.06 if finding == "mass" else 0.03) * np.cos(count * angles + rng.uniform(0, 2 * np.pi))
        for count in (2, 3, 5)
    )
    distance = np.hypot(rows - row, columns - column) / (radius * (1 + lobes))
    disc, profile = np.zeros((2, SIZE * FINE, SIZE * FINE))
    disc[window] = distance < 1
    profile[window] = (1.0 - distance**2).clip(0, None) ** 0.3  # flatter than a ball, whose rim nobody sees
    cover, mask = soften(profile, 0.45), soften(disc, 0.0) > 0.5
    around = np.hypot(*np.mgrid[:SIZE, :SIZE] - np.array([row, column])[:, None, None])
    ring = (around > radius) & (around < radius + 4)
    local = film[ring].mean()
    level = min(local + np.clip(1.2 * contrast, 65, 110), 240) + 1.5 * grain(rng, 0.7)
    new = blend(film, cover, level, 0.2, 3.0)
    return np.maximum(new, film - 10 * cover), mask


def choose_place(
    film: np.ndarray, lung: Lung, zone: str, radius: float, rng: np.random.Generator, off_centre: float
) -> tuple[float, float]:
    """Return row and column for the centre: near the middle of the zone, clear of the borders, rather dark."""
    third = (lung.base - lung.apex) / 3
    top = lung.apex + third * (ZONES.index(zone) + (0.35 if zone == "upper" else 0.15))
    bottom = lung.apex + third * (ZONES.index(zone) + (0.6 if zone == "lower" else 0.85))
    depth = ndimage.distance_transform_edt(lung.mask)
    rows = np.arange(SIZE)[:, None]
    within = np.where((rows >= top) & (rows <= bottom), depth, 0.0)
    # A mass is wider than the top of a child's lung: there it may overlap the wall, but its centre stays inside
    enough = min(radius + 1.5, 0.8 * within.max())
    candidates = np.argwhere(within >= max(enough, 0.5))
    if not len(candidates):
        candidates = np.argwhere((within > 0) | (depth == depth.max()))
    away = np.hypot(*(candidates - np.median(candidates, axis=0)).T)
    candidates = candidates[away <= max(off_centre, away.min())]
    chosen = candidates[rng.integers(len(candidates), size=6)]
    blurred = ndimage.gaussian_filter(film, max(1.5, radius / 2))
    row, column = chosen[blurred[chosen[:, 0], chosen[:, 1]].argmin()] + rng.uniform(-0.5, 0.5, size=2)
    return float(row), float(column)


def draw_cardiomegaly(
    film: np.ndarray, lungs: Lungs, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Widen the heart to a globe: its borders move outwards, the lungs beside it are pressed together."""
    low, high = CARDIOTHORACIC
    right, left, middle = lungs.right, lungs.left, lungs.midline
    ratio = max(low + (high - low) * severity, lungs.cardiothoracic_ratio + 0.08) + rng.uniform(-0.01, 0.01)
    top, bottom = rows_between(right, left, 0.3, 0.95)
    widest = top + int((left.outer - right.outer)[top:bottom].argmax())
    room = {"right": middle - right.outer[widest], "left": left.outer[widest] - middle}
    share = 0.63 + rng.uniform(-0.03, 0.03)  # of the width that lies to the left
    width = min(ratio, 0.82) * lungs.thorax_width
    reach = {"right": min((1 - share) * width, 0.72 * room["right"]), "left": min(share * width, 0.86 * room["left"])}
    height = (right.base + left.base - right.apex - left.apex) / 2
    rows = np.arange(SIZE, dtype=np.float64)
    centre = lungs.heart_row + 0.02 * height
    up = ((rows - centre) / np.where(rows < centre, 0.42 * height, 0.36 * height)).clip(-1, 1)
    globe = (1 - np.abs(up) ** 2.0) ** 0.65
    columns = np.arange(SIZE, dtype=np.float64)
    source = np.tile(columns, (SIZE, 1))
    borders = {}
    for side, lung, sign in (("right", right, -1), ("left", left, 1)):
        old = (sign * (lung.inner - middle)).clip(7, None)
        wall = np.maximum(sign * (lung.outer - middle), old + 6)
        new = np.maximum(old, np.minimum(globe * reach[side], wall - 0.3 * (wall - old)))  # some lung stays visible
        new = np.maximum(ndimage.gaussian_filter1d(new, 2.0), old)
        borders[side] = middle + sign * new
        for row in range(SIZE):
            knots_new, knots_old = [0.0, 5.0, new[row], wall[row], 300.0], [0.0, 5.0, old[row], wall[row], 300.0]
            distances = sign * (columns - middle)
            here = distances > 0
            source[row, here] = middle + sign * np.interp(distances[here], knots_new, knots_old)
    shift = ndimage.gaussian_filter(source - columns, 1.5)
    grid = np.broadcast_to(rows[:, None], (SIZE, SIZE))
    new = ndimage.map_coordinates(film, [grid, columns + shift], order=3, mode="nearest")
    fine_rows, fine_columns = fine_grid()
    edges = [np.interp(fine_rows[:, 0], rows, borders[side])[:, None] for side in SIDES]
    floor = (right.dome + left.dome) / 2 + 4
    shape = (fine_columns > edges[0]) & (fine_columns < edges[1])
    shape &= (fine_rows > centre - 0.38 * height) & (fine_rows < floor)
    cover = soften(shape, 1.2)
    # The stretched heart is as dense as the old one was; the lift fades in from the great vessels down
    fade = ((rows - centre) / (0.4 * height) + 1).clip(0, 0.6)[:, None] / 0.6
    bright = np.percentile(film[cover > 0.5], 60) if (cover > 0.5).any() else film.max()
    # Averaged over the heart alone: with the lung beside it the border would light up
    level = ndimage.gaussian_filter(new * cover, 4.0) / (ndimage.gaussian_filter(cover, 4.0) + 1e-3)
    lift = fade * ((bright - level).clip(0, 40) * 0.8 + 5)
    return new + cover * lift, cover > 0.5


def draw_pacemaker(
    film: np.ndarray, lungs: Lungs, side: str, severity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put a metal can below the collar bone, with one lead to the right ventricle or a second one to the atrium."""
    lung, sign = getattr(lungs, side), (-1 if side == "right" else 1)
    height = lung.base - lung.apex
    width = lungs.thorax_width
    half_wide, half_tall = 0.085 * width * (0.9 + 0.25 * severity), 0.075 * width * (0.9 + 0.25 * severity)
    row = lung.apex + height * rng.uniform(0.16, 0.20)
    wall = np.interp(row + 4, np.arange(SIZE), lung.outer)
    column = wall - sign * rng.uniform(0.0, 0.3) * half_wide
    column = float(np.clip(column, half_wide + 2, SIZE - 3 - half_wide))
    tilt = sign * rng.uniform(0.0, 0.25)
    rows, columns = fine_grid()
    along = (columns - column) * np.cos(tilt) + (rows - row) * np.sin(tilt)
    down = (rows - row) * np.cos(tilt) - (columns - column) * np.sin(tilt)
    distance = (np.abs(along / half_wide) ** 2.8 + np.abs(down / half_tall) ** 2.8) ** (1 / 2.8)
    can = distance < 1
    header = can & (down < -0.45 * half_tall)  # clear resin, with the plugs of the leads in it
    core = (distance < 0.82) & ~header
    metal = soften(can, 0.35)
    board = core & (sign * along > 0)  # the electronics beside the battery let more through
    level = 238 - 50 * soften(header & (distance < 0.88), 0.3) - 10 * soften(core, 0.5)
    level = level - soften(board, 0.5) * (14 + 7 * grain(rng, 0.8))
    new = film + metal * (np.maximum(level, film + 15) + 0.15 * texture(film, 3.0) - film)
    leads = draw_leads(lungs, (row - 0.55 * half_tall, column - sign * 0.5 * half_wide), sign, severity, rng)
    leads = leads * (1 - metal)
    new = new + leads * (np.clip(film + 95, 190, 240) - new).clip(0, None)
    return new, (metal > 0.5) | (leads > 0.3)


def draw_leads(
    lungs: Lungs, start: tuple[float, float], sign: int, severity: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the cover of one or two leads, [H, W]: under the collar bone, down the upper vena cava, into the heart.

    Args:
        start: row and column of the plug.
        sign: -1 for a can on the patient's right, 1 on the left.
    """
    height = (lungs.right.base + lungs.left.base - lungs.right.apex - lungs.left.apex) / 2
    apex = (lungs.right.apex + lungs.left.apex) / 2
    middle = lungs.midline
    cava = middle - 0.045 * lungs.thorax_width  # right of the spine's middle
    row, column = start
    vein = [
        (row, column),
        (row - 0.07 * height, column - sign * 3.0),
        (apex + 0.03 * height, middle + sign * 0.62 * abs(column - middle)),
        (apex + 0.12 * height, middle + sign * 0.25 * abs(column - middle)),
        (apex + 0.24 * height, cava + 1.0),
        (apex + 0.42 * height, cava),
    ]
    tip = middle + 0.72 * (lungs.heart[1] - middle), apex + height * rng.uniform(0.84, 0.90)
    ventricle = [
        (apex + 0.60 * height, cava - 1.0),
        (apex + 0.77 * height, cava + 2.0),
        (apex + 0.86 * height, middle + 0.25 * (lungs.heart[1] - middle)),
        (tip[1], tip[0]),
    ]
    atrium = [
        (apex + 0.60 * height, cava - 2.5),
        (apex + 0.69 * height, cava - 3.0),
        (apex + 0.71 * height, cava - 6.5),
        (apex + 0.63 * height, cava - 8.5),
    ]
    shapes = Image.new("L", (SIZE * FINE, SIZE * FINE))
    pen = ImageDraw.Draw(shapes)
    courses = [ventricle] if severity < 0.35 else [ventricle, atrium]
    for number, course in enumerate(courses):
        points = smooth_course(np.array([*vein, *course]) + [0.0, 1.2 * number])
        corners = [((x + 0.5) * FINE, (y + 0.5) * FINE) for y, x in points]
        pen.line(corners, fill=255, width=4, joint="curve")
        pen.line(corners[-6:], fill=255, width=8, joint="curve")  # the electrode at the tip
    return soften(np.asarray(shapes) / 255, 0.3).clip(0, 1)


def smooth_course(points: np.ndarray) -> np.ndarray:
    """Return a curve through points, [N, 2], as many more of them (Catmull-Rom)."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    steps = np.linspace(0, 1, 16, endpoint=False)[:, None]
    pieces = []
    for before, start, end, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(
            start
            + 0.5 * steps * (end - before)
            + steps**2 * (before - 2.5 * start + 2 * end - 0.5 * after)
            + steps**3 * (1.5 * (start - end) + 0.5 * (after - before))
        )
    return np.concatenate([*pieces, points[-1:]])


# --- words and chance ------------------------------------------------------------------------------------------------


def phrase(finding: str, side: str | None, zone: str | None, rng: np.random.Generator) -> str:
    """Return one sentence that names the finding, and its side and zone where it has them; nothing else is said.

    Raises:
        ValueError: for a finding, side or zone that does not exist.
    """
    check_place(finding, side, zone)
    forms = PHRASES[finding]
    form = forms[rng.integers(len(forms))]
    return form.format(side=side, Side=side and side.capitalize(), zone=zone)


def virtual_findings(rng: np.random.Generator) -> list[tuple[str, str | None, str | None]]:
    """Return what to draw into one film, in the order to draw it: (finding, side, zone) none, one or two times.

    Findings come by FINDING_WEIGHTS, sides and zones equally often. Two findings differ, and two with a side lie on different
    sides, so that neither hides the other; cardiomegaly comes first because it moves the lungs' borders.
    """
    count = int(rng.choice(len(FINDING_COUNTS), p=FINDING_COUNTS))
    chances = np.array(FINDING_WEIGHTS) / sum(FINDING_WEIGHTS)
    names = sorted(rng.choice(FINDINGS, size=count, replace=False, p=chances), key=lambda name: name != "cardiomegaly")
    first = int(rng.integers(len(SIDES)))
    placed = []
    for number, name in enumerate(names):
        side = SIDES[(first + number) % len(SIDES)] if name in SIDED else None
        zone = ZONES[rng.integers(len(ZONES))] if name in ZONED else None
        placed.append((str(name), side, zone))
    return placed
