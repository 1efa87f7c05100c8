"""Drawn findings: the stated side and zone, the right sign, the same bytes for the same state. Films are phantoms."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from assets.anatomy import SIDES, SIZE, Lungs, find_lungs
from assets.drawing import (
    FINDING_COUNTS,
    FINDING_WEIGHTS,
    FINDINGS,
    NORMAL_PHRASES,
    SIDED,
    ZONED,
    ZONES,
    draw,
    phrase,
    virtual_findings,
)

PLACES = [
    (finding, side, zone)
    for finding in FINDINGS
    for side in (SIDES if finding in SIDED else (None,))
    for zone in (ZONES if finding in ZONED else (None,))
]
WORDS = {
    "pleural effusion": ("effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax",),
    "nodule": ("nodule",),
    "mass": ("mass",),
    "cardiomegaly": ("cardiomegaly", "enlarged"),
    "pacemaker": ("pacemaker",),
}


def phantom(shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return a chest of ellipses with ribs and grain, uint8 [128, 128]: dark lungs, heart at the image's right."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    rows, columns = (rows - 62) / scale + 62, (columns - 64 - shift) / scale + 64
    film = np.where(np.abs(columns - 64) < 56, 150.0, 5.0)
    lungs = np.zeros((SIZE, SIZE), dtype=bool)
    for centre, dome in ((40, 92), (88, 95)):
        lung = ((columns - centre) / 20) ** 2 + ((rows - 78) / 58) ** 2 < 1
        lungs |= lung & (rows < dome + 0.01 * (columns - centre) ** 2)
    film[lungs] = 70
    film[lungs & (np.sin(rows * 0.75 + 0.0015 * (columns - 64) ** 2) > 0.5)] = 95
    film[((columns - 71) / 21) ** 2 + ((rows - 80) / 22) ** 2 < 1] = 165
    film[(np.abs(columns - 64) < 9) & (rows < 120)] = 180
    film[(rows > 97) & (np.abs(columns - 64) < 54)] = 185
    film = ndimage.gaussian_filter(film, 0.8) + np.random.default_rng(seed).normal(0, 3, film.shape)
    return film.clip(0, 255).astype(np.uint8)


FILMS = [phantom(), phantom(4, 0.92, 1), phantom(-5, 1.04, 2)]
LUNGS = [find_lungs(film) for film in FILMS]


@pytest.fixture(params=range(len(FILMS)))
def film(request: pytest.FixtureRequest) -> np.ndarray:
    return FILMS[request.param]


@pytest.fixture
def lungs(request: pytest.FixtureRequest, film: np.ndarray) -> Lungs:
    return LUNGS[request.node.callspec.params["film"]]


def test_lungs_are_found_where_they_are_dark(film: np.ndarray, lungs: Lungs) -> None:
    for side in SIDES:
        mask = getattr(lungs, side).mask
        assert mask.dtype == bool and mask.shape == film.shape
        assert (film[mask] < 120).mean() > 0.85
    assert (np.nonzero(lungs.right.mask)[1] < lungs.midline).all()
    assert (np.nonzero(lungs.left.mask)[1] > lungs.midline).all()
    assert lungs.midline - lungs.heart[0] < lungs.heart[1] - lungs.midline, "the heart lies to the left"


@pytest.mark.parametrize("grey", (0, 255))
@pytest.mark.parametrize(("finding", "side", "zone"), PLACES)
def test_a_film_without_any_chest_does_not_fail(finding: str, side: str, zone: str, grey: int) -> None:
    blank = np.full((SIZE, SIZE), grey, dtype=np.uint8)
    film, mask = draw(blank, finding, side, zone, np.random.default_rng(0))
    assert film.dtype == np.uint8 and mask.any()


@pytest.mark.parametrize(("finding", "side", "zone"), PLACES)
def test_same_state_same_bytes(finding: str, side: str, zone: str) -> None:
    film = FILMS[0]
    kept = film.copy()
    first, mask = draw(film, finding, side, zone, np.random.default_rng(7))
    again, mask_again = draw(film, finding, side, zone, np.random.default_rng(7), lungs=find_lungs(film))
    other, _ = draw(film, finding, side, zone, np.random.default_rng(8))
    assert first.tobytes() == again.tobytes() and mask.tobytes() == mask_again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert np.array_equal(film, kept), "the film passed in is left alone"
    assert first.dtype == np.uint8 and first.shape == film.shape
    assert mask.dtype == bool and mask.shape == film.shape


@pytest.mark.parametrize("severity", (0.0, 1.0))
@pytest.mark.parametrize(("finding", "side", "zone"), PLACES)
def test_the_mask_covers_the_change(
    finding: str, side: str, zone: str, severity: float, film: np.ndarray, lungs: Lungs
) -> None:
    new, mask = draw(film, finding, side, zone, np.random.default_rng(1), lungs, severity=severity)
    change = np.abs(new.astype(int) - film) > 25
    assert mask.sum() >= 20
    assert (change & mask).sum() >= 15, "nothing to see"
    near = ndimage.binary_dilation(mask, iterations=2)
    # Around the enlarged heart the lungs are pressed together, and that is no part of the heart
    assert (change & near).sum() >= (0.6 if finding == "cardiomegaly" else 0.95) * change.sum()


@pytest.mark.parametrize(("finding", "side", "zone"), [place for place in PLACES if place[1]])
def test_the_change_lies_on_the_stated_side(
    finding: str, side: str, zone: str, film: np.ndarray, lungs: Lungs
) -> None:
    _, mask = draw(film, finding, side, zone, np.random.default_rng(2), lungs)
    if finding == "pacemaker":  # leads end left of the midline and run through the vena cava, right of it, always
        mask = ndimage.binary_opening(mask, iterations=3)
    columns = np.nonzero(mask)[1]
    assert len(columns)
    assert ((columns < lungs.midline) == (side == "right")).mean() >= 0.9


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("finding", ZONED)
def test_zones_lie_below_one_another(finding: str, side: str, film: np.ndarray, lungs: Lungs) -> None:
    lung = getattr(lungs, side)
    for seed in range(3):
        masks = [draw(film, finding, side, zone, np.random.default_rng(seed), lungs)[1] for zone in ZONES]
        rows = [np.nonzero(mask)[0].mean() for mask in masks]
        assert rows == sorted(rows)
        thirds = (np.array(rows) - lung.apex) / (lung.base - lung.apex) * 3
        assert [int(third) for third in thirds] == [0, 1, 2]


def test_nodules_are_smaller_than_masses(film: np.ndarray, lungs: Lungs) -> None:
    for severity in (0.0, 1.0):
        widths = {}
        for finding in ZONED:
            rng = np.random.default_rng(3)
            _, mask = draw(film, finding, "right", "middle", rng, lungs, severity=severity)
            widths[finding] = np.flatnonzero(mask.any(axis=0)).size
        assert 7 <= widths["nodule"] <= 13
        assert widths["nodule"] < widths["mass"] <= 19


@pytest.mark.parametrize("side", SIDES)
def test_fluid_is_bright_and_lies_low_and_air_is_dark(side: str, film: np.ndarray, lungs: Lungs) -> None:
    lung = getattr(lungs, side)
    rng = np.random.default_rng(4)
    changes, masks = {}, {}
    for finding in ("pleural effusion", "pneumothorax"):
        new, mask = draw(film, finding, side, None, rng, lungs)
        changes[finding], masks[finding] = (new.astype(int) - film)[mask & lung.mask].mean(), mask
    assert changes["pleural effusion"] > 30
    assert changes["pneumothorax"] < -15
    fluid, air = (np.nonzero(masks[finding])[0].mean() for finding in masks)
    assert air < (lung.apex + lung.base) / 2 + 10 < fluid
    # The meniscus: fluid climbs higher at the wall than at the mediastinum
    rows, columns = np.nonzero(masks["pleural effusion"])
    far = np.abs(columns - lungs.midline)
    at_wall = far > (far.min() + far.max()) / 2
    assert rows[at_wall].min() + 5 < rows[~at_wall].min()


def test_severity_is_size(film: np.ndarray, lungs: Lungs) -> None:
    for finding in ("pleural effusion", "pneumothorax", "cardiomegaly"):
        side = "right" if finding in SIDED else None
        areas = [
            draw(film, finding, side, None, np.random.default_rng(5), lungs, severity=severity)[1].sum()
            for severity in (0.0, 0.5, 1.0)
        ]
        assert areas == sorted(areas)


def test_cardiomegaly_widens_the_heart(film: np.ndarray, lungs: Lungs) -> None:
    new, mask = draw(film, "cardiomegaly", None, None, np.random.default_rng(6), lungs)
    assert np.flatnonzero(mask.any(axis=0)).size / lungs.thorax_width > 0.58
    row = int(lungs.heart_row)
    bright = [(ndimage.gaussian_filter(grey, 2.0)[row - 3 : row + 4] > 125).mean(axis=0) for grey in (film, new)]
    inside = slice(int(lungs.right.outer[row]) + 5, int(lungs.left.outer[row]) - 4)
    assert bright[1][inside].sum() > bright[0][inside].sum() + 6


@pytest.mark.parametrize(
    ("finding", "side", "zone"),
    [
        ("fracture", "left", None),
        ("pneumothorax", "middle", None),
        ("pneumothorax", None, None),
        ("pneumothorax", "left", "upper"),
        ("nodule", "left", "apical"),
        ("nodule", "left", None),
        ("cardiomegaly", "left", None),
    ],
)
def test_what_does_not_exist_is_refused(finding: str, side: str, zone: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        draw(FILMS[0], finding, side, zone, np.random.default_rng(0))
    with pytest.raises(ValueError, match="expected"):
        phrase(finding, side, zone, np.random.default_rng(0))


def test_other_films_are_refused() -> None:
    for film in (FILMS[0][:64], FILMS[0].astype(np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            find_lungs(film)
    with pytest.raises(ValueError, match="severity"):
        draw(FILMS[0], "cardiomegaly", None, None, np.random.default_rng(0), severity=1.5)


@pytest.mark.parametrize(("finding", "side", "zone"), PLACES)
def test_phrases_name_what_was_drawn(finding: str, side: str, zone: str) -> None:
    rng = np.random.default_rng(0)
    said = {phrase(finding, side, zone, rng) for _ in range(100)}
    assert len(said) >= 4
    for sentence in said:
        words = sentence.lower()
        assert sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence
        assert any(name in words for name in WORDS[finding])
        assert [place in words for place in SIDES] == [place == side for place in SIDES]
        assert [place in words for place in ZONES] == [place == zone for place in ZONES]
        assert sentence not in NORMAL_PHRASES


def test_virtual_findings_are_balanced() -> None:
    rng = np.random.default_rng(0)
    films = [virtual_findings(rng) for _ in range(4000)]
    counts = Counter(len(film) for film in films)
    for number, chance in enumerate(FINDING_COUNTS):
        assert counts[number] / len(films) == pytest.approx(chance, rel=0.15)
    drawn = [place for film in films for place in film]
    assert set(drawn) == set(PLACES)
    alone = Counter(film[0][0] for film in films if len(film) == 1)
    for finding, weight in zip(FINDINGS, FINDING_WEIGHTS, strict=True):
        assert alone[finding] / alone.total() == pytest.approx(weight / sum(FINDING_WEIGHTS), rel=0.15)
    sides = Counter(side for _, side, _ in drawn if side)
    assert sides["left"] / sides.total() == pytest.approx(0.5, abs=0.03)
    for first, second in (film for film in films if len(film) == 2):
        assert first[0] != second[0]
        assert first[1] is None or first[1] != second[1]
