"""Where the lungs and the heart lie on a frontal chest film: an atlas of the mean lung, moved to the film's edges.

Made for drawing findings into films (`assets/drawing.py`). Rows and columns are in pixels, counted from the centre of
the first; the patient's right is at the image's left.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

SIZE = 128  # pixels, height and width of a film
SIDES = ("right", "left")

# Mean lung of small children's films: columns from the midline at nine heights between the apex (0) and the
# costophrenic angle (1), and the dome's height at five places from the mediastinum (0) to the wall (1).
ATLAS_HEIGHTS = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0])
ATLAS_OUTER = {
    "right": np.array([-17.0, -23.0, -28.0, -34.0, -38.0, -42.0, -44.5, -46.0, -47.0]),
    "left": np.array([17.0, 23.0, 28.0, 33.5, 37.5, 41.5, 44.5, 46.0, 47.0]),
}
ATLAS_INNER = {
    "right": np.array([-11.0, -9.5, -9.5, -10.0, -11.5, -13.0, -14.5, -14.0, -14.0]),
    "left": np.array([11.0, 9.5, 10.5, 14.0, 19.0, 24.5, 28.0, 29.0, 29.0]),
}
ATLAS_PLACES = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
ATLAS_DOME = {
    "right": np.array([0.87, 0.855, 0.87, 0.92, 1.0]),
    "left": np.array([0.91, 0.90, 0.91, 0.945, 1.0]),
}
ATLAS_HEIGHT = 83.0  # pixels from apex to costophrenic angle
ATLAS_CENTRE = 62.0  # row halfway between them
REACH = 10  # pixels that a border may move from the atlas
STRAY = 6.0  # pixels from the atlas that cost as much as one standard deviation of edge strength
BEND = 0.4  # cost of a step of one pixel between neighbours


@dataclass(frozen=True, eq=False)
class Lung:
    """One lung as it was estimated.

    Attributes:
        mask: bool, [H, W].
        inner: column of the mediastinal border in each row, [H]; held constant above the apex and below the base.
        outer: column of the chest wall in each row, [H]; likewise.
        apex: row of the top.
        dome: row of the highest point of the hemidiaphragm.
        base: row of the costophrenic angle.
    """

    mask: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    apex: float
    dome: float
    base: float


@dataclass(frozen=True, eq=False)
class Lungs:
    """The anatomy of one film as far as drawing needs it.

    Attributes:
        right, left: the patient's, so that `right` is at the image's left.
        midline: column of the spine.
        heart_row: row of the heart's centre.
        heart: columns of the heart's right and left border where each is farthest from the midline.
    """

    right: Lung
    left: Lung
    midline: float
    heart_row: float
    heart: tuple[float, float]

    @property
    def thorax_width(self) -> float:
        """Greatest inner width of the chest, pixels."""
        top, bottom = rows_between(self.right, self.left, 0.3, 0.95)
        return float((self.left.outer - self.right.outer)[top:bottom].max())

    @property
    def cardiothoracic_ratio(self) -> float:
        """Width of the heart over the width of the chest."""
        return (self.heart[1] - self.heart[0]) / self.thorax_width


def rows_between(right: Lung, left: Lung, low: float, high: float) -> tuple[int, int]:
    """Return the first row and the end of the rows between two heights of the lungs, 0 at the apex, 1 at the base."""
    apex, base = (right.apex + left.apex) / 2, (right.base + left.base) / 2
    return int(apex + low * (base - apex)), int(apex + high * (base - apex)) + 1


def find_lungs(grey: np.ndarray) -> Lungs:
    """Estimate the lungs of a frontal film: an atlas is placed whole, then each border moves to the nearest edge.

    Never fails: borders are held within `REACH` of the atlas, so that a film without any edge gives the mean lung.

    Args:
        grey: uint8, [128, 128].
    """
    film = without_background(checked(grey))
    midline, apex, height, width = place_atlas(film)
    rows = np.arange(SIZE)
    edges_x = ndimage.gaussian_filter(film, 1.5, order=(0, 1))
    edges_y = ndimage.gaussian_filter(film, 1.5, order=(1, 0))
    edges_x, edges_y = edges_x / (edges_x.std() + 1e-3), edges_y / (edges_y.std() + 1e-3)
    lungs = {}
    for side, towards_wall in (("right", -1), ("left", 1)):
        heights = (rows - apex) / height
        outer = midline + width * np.interp(heights, ATLAS_HEIGHTS, ATLAS_OUTER[side])
        inner = midline + width * np.interp(heights, ATLAS_HEIGHTS, ATLAS_INNER[side])
        top, end = (int(np.clip(row, 0, SIZE)) for row in (apex, apex + height + 1))
        inside = slice(top, end)
        outer[inside] = snap(outer[inside], towards_wall * edges_x[inside])  # brighter beyond the wall
        inner[inside] = snap(inner[inside], -towards_wall * edges_x[inside])
        outer[end:], inner[end:] = outer[end - 1], inner[end - 1]
        lungs[side] = close_lung(side, edges_y, inner, outer, apex, height)
    right, left = lungs["right"], lungs["left"]
    top, bottom = rows_between(right, left, 0.05, 0.4)
    middle = float((right.inner + left.inner)[top:bottom].mean() / 2)
    midline = 0.5 * (midline + middle)
    top, bottom = rows_between(right, left, 0.55, 0.9)
    heart = float(np.percentile(right.inner[top:bottom], 10)), float(np.percentile(left.inner[top:bottom], 90))
    heart_row = apex + 0.74 * height
    return Lungs(right, left, midline, float(heart_row), heart)


def checked(grey: np.ndarray) -> np.ndarray:
    """Return the film as float64, [128, 128].

    Raises:
        ValueError: unless it is uint8, [128, 128].
    """
    if grey.dtype != np.uint8 or grey.shape != (SIZE, SIZE):
        raise ValueError(f"expected a film of uint8 [{SIZE}, {SIZE}], got {grey.dtype} {list(grey.shape)}")
    return grey.astype(np.float64)


def without_background(film: np.ndarray) -> np.ndarray:
    """Fill the dark surroundings of the patient with the nearest skin: air outside is as dark as air in the lungs."""
    low, high = np.percentile(film, (1, 99))
    dark, _ = ndimage.label(ndimage.gaussian_filter(film, 1) < low + 0.12 * (high - low))
    rim = np.unique(np.concatenate([dark[0], dark[:, 0], dark[:, -1]]))
    outside = ndimage.binary_dilation(np.isin(dark, rim[rim > 0]), iterations=3)
    outside[20:, 22:-22] = False  # a dark lung that touches the edge of the film is not background
    if not outside.any():
        return film
    _, (rows, columns) = ndimage.distance_transform_edt(outside, return_indices=True)
    return film[rows, columns]


def place_atlas(film: np.ndarray) -> tuple[float, float, float, float]:
    """Return midline column, apex row, height in pixels and relative width at which the atlas fits the film best.

    Best: the lungs are darkest against a band around them, less a penalty for leaving the mean place and size.
    Searched at a quarter of the resolution over sizes, and over all shifts by Fourier transform.
    """
    step = 4
    smooth = ndimage.gaussian_filter(film, 2.0)
    background = ndimage.gaussian_filter(smooth, 24)
    contrast = (smooth - background) / (np.sqrt(ndimage.gaussian_filter((smooth - background) ** 2, 24)) + 4.0)
    small = contrast.reshape(SIZE // step, step, SIZE // step, step).mean(axis=(1, 3)).clip(-2, 2)
    padded = np.zeros((SIZE // step * 2,) * 2)
    padded[: SIZE // step, : SIZE // step] = small
    spectrum = np.fft.rfft2(padded)
    shifts = np.arange(-5, 6)  # of `step` pixels
    drift = (shifts[:, None] * step / 12) ** 2 + (shifts[None, :] * step / 12) ** 2
    best = (-np.inf, 0.0, 0.0, 1.0, 1.0)
    for tall in np.arange(0.65, 1.21, 0.07):
        for wide in np.arange(0.65, 1.21, 0.07):
            scores = np.fft.irfft2(spectrum * atlas_spectrum(tall, wide, step), padded.shape)
            size = (np.log(tall) / 0.25) ** 2 + (np.log(wide) / 0.25) ** 2 + (np.log(tall / wide) / 0.2) ** 2
            scores = scores[np.ix_(shifts, shifts)] - 0.04 * drift - 0.04 * size
            down, across = np.unravel_index(scores.argmax(), scores.shape)
            if scores[down, across] > best[0] + 1e-9:
                best = (scores[down, across], shifts[down] * step, shifts[across] * step, tall, wide)
    _, down, across, tall, wide = best
    height = ATLAS_HEIGHT * tall
    return SIZE / 2 + across, ATLAS_CENTRE + down - height / 2, height, wide


@cache
def atlas_spectrum(tall: float, wide: float, step: int) -> np.ndarray:
    """Return the conjugate spectrum of the weights that measure how well an atlas of some size fits.

    The weights, [H / step, W / step], are negative in the lungs, positive in a band around them, zero elsewhere.
    """
    height = ATLAS_HEIGHT * tall
    apex = ATLAS_CENTRE - height / 2
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for side in SIDES:
        heights = (rows[:, 0] - apex) / height
        outer = SIZE / 2 + wide * np.interp(heights, ATLAS_HEIGHTS, ATLAS_OUTER[side])
        inner = SIZE / 2 + wide * np.interp(heights, ATLAS_HEIGHTS, ATLAS_INNER[side])
        places = (columns - inner[:, None]) / (outer - inner)[:, None]
        dome = apex + height * np.interp(places, ATLAS_PLACES, ATLAS_DOME[side])
        mask |= (places >= 0) & (places <= 1) & (rows >= apex) & (rows <= dome)
    band = ndimage.distance_transform_edt(~mask) <= 8
    weights = np.where(mask, -1 / mask.sum(), np.where(band, 1 / (band & ~mask).sum(), 0.0))
    small = weights.reshape(SIZE // step, step, SIZE // step, step).sum(axis=(1, 3))
    return np.conj(np.fft.rfft2(small, (2 * SIZE // step, 2 * SIZE // step)))


def snap(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return a border moved to the strongest edge nearby, as smooth as can be (dynamic programming).

    Args:
        places: the atlas's border, one column a line, [N].
        edges: edge strength, positive where a border of this kind runs, [N, M].
    """
    if not len(places):
        return places
    moves = np.arange(-REACH, REACH + 1)
    columns = (places[:, None] + moves).round().astype(int).clip(0, edges.shape[1] - 1)
    costs = -np.take_along_axis(edges, columns, axis=1).clip(-1, 3) + (moves / STRAY) ** 2  # [N, moves]
    bends = BEND * (moves[:, None] - moves[None, :]) ** 2.0
    total, came_from = costs[0], []
    for cost in costs[1:]:
        reached = total[None, :] + bends  # [to, from]
        came_from.append(reached.argmin(axis=1))
        total = cost + reached.min(axis=1)
    path = [int(total.argmin())]
    for step in reversed(came_from):
        path.append(int(step[path[-1]]))
    return places + ndimage.gaussian_filter1d(moves[path[::-1]].astype(float), 2.5, mode="nearest")


def close_lung(
    side: str, edges_y: np.ndarray, inner: np.ndarray, outer: np.ndarray, apex: float, height: float
) -> Lung:
    """Return a lung from its two upright borders, with the hemidiaphragm found between them."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    low_row = int(np.clip(apex + 0.93 * height, 0, SIZE - 1))
    places = (columns[0] - inner[low_row]) / (outer[low_row] - inner[low_row])
    dome = apex + height * np.interp(places, ATLAS_PLACES, ATLAS_DOME[side])
    first, last = np.flatnonzero((places >= 0) & (places <= 1))[[0, -1]]
    dome[first : last + 1] = snap(dome[first : last + 1], edges_y[:, first : last + 1].T)
    dome[:first], dome[last + 1 :] = dome[first], dome[last]
    across = (columns - inner[:, None]) / (outer - inner)[:, None]
    # The apex is a vault: at the very top only the middle of the width is lung
    vault = apex + 0.08 * height * (2 * across - 1).clip(-1, 1) ** 2
    mask = (across >= 0) & (across <= 1) & (rows >= vault) & (rows <= dome[None, :])
    inside = dome[first : last + 1]
    return Lung(mask, inner, outer, float(apex), float(inside.min()), float(inside.max()))
