"""From a film as it was published to an 8-bit grey square: decoding, grey scale, borders, geometry, PNG.

Left stays left and top stays top. Whatever cannot be turned into a film that a radiologist would recognise raises
`UnusableFilm`, whose text is the reason written to `rejected.jsonl`: fixed words, so that reasons can be counted.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from utils.dicom import UnreadableDicom, declares_text, is_dicom, read_dicom
from utils.provenance import CHUNK, eight_bits

PREPROCESSING = 3  # raise it when the same film gives other pixels: older sets are then made again, not mixed

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # Pillow would also run Ghostscript on an EPS file
MAX_PIXELS = 80_000_000  # four times the largest detector in use, and below the size at which Pillow warns
MIN_SIDE_PX = 64
MAX_PAD_FREE_ASPECT = 1.25  # beyond it a centre crop would cut apices or costophrenic angles
COLOUR_SPREAD = 32  # grey levels between the channels of a pixel that is plainly coloured
MAX_COLOURED = 0.02  # share of such pixels; a small coloured mark on a film is below it, a screenshot above
SCALE_PERCENTILES = (0.1, 99.9)
# A border is lines of one grey at the edge: shutters, the edge of a plate, what a scanner filled in
BORDER_SPREAD = 6  # grey levels from the line's median, at most
SPREAD_SHARE = 0.05  # of the film's own range: one of few grey levels has lines of lung that are as even
BORDER_SHARE = 0.99  # of the line's pixels: a side marker is longer, as a rule, and is not cut off
LEAST_BORDER = 0.01  # of the side; a thinner one stays
MOST_BORDER = 1 / 3
LINES_AT_ONCE, PIXELS_A_LINE = 32, 512  # looked at
# Letters are saturated, as high as these shares of the film, and stand in a row
LETTER_LEVEL, LETTER_CONTRAST = 240, 60
LETTER_HEIGHTS = (0.008, 0.06)
LEAST_LETTER_PX = 7
LEAST_LETTERS = 3  # a marker has one, and at times the initials of who took the film
LETTER_SIDE_PX = 1024
THUMBNAIL_PX = 128
UNKNOWN_VIEW = "UNKNOWN"  # of a film that may be lateral; None is that of a table which says nothing of views
FRONTAL_VIEWS = ("PA", "AP", "FRONTAL")
VIEWS = {
    **dict.fromkeys(("PA", "POSTEROANTERIOR", "POSTERO-ANTERIOR"), "PA"),
    **dict.fromkeys(("AP", "ANTEROPOSTERIOR", "ANTERO-POSTERIOR", "AP SUPINE", "AP ERECT", "AP_HORIZONTAL"), "AP"),
    **dict.fromkeys(("LATERAL", "LAT", "L", "LL", "RL", "LEFT LATERAL", "RIGHT LATERAL"), "LATERAL"),
    "FRONTAL": "FRONTAL",
}


class UnusableFilm(ValueError):
    """A film that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Film:
    """One film of a source: where it lies below the mirror, and what is known of it."""

    source_id: str
    path: str  # below the mirror, with "/"; its last part is the member's name where the film lies in an archive
    file_name: str  # in the data folder
    text: str
    patient_id: str | None = None
    findings: list[str] | None = None  # empty: none of the listed findings; None: not known
    view: str | None = None
    age: int | None = None  # years
    sex: str | None = None  # "M" or "F"
    boxes: list[dict] | None = None  # of each finding: name, side, zone and box, left top right bottom as fractions
    archive: str | None = None  # below the mirror; a film that lies unpacked at `path` is taken from there
    license: str | None = None  # its own, where the films of a source have different ones
    sha256: str | None = None  # of the file at `path`, where the table has it
    fault: str | None = None  # why its source leaves it out: the table says that it is no chest radiograph
    is_prepared: bool | None = None  # True for one that download.py made: its borders may be padding

    def described(self) -> dict:
        """Return what the source's table says of it; what most sources do not know only where it is known."""
        rare = ("boxes", "license", "sha256", "fault", "is_prepared")
        described = {name: value for name, value in vars(self).items() if name != "archive"}
        return {name: value for name, value in described.items() if name not in rare or value is not None}


def view_named(name: object) -> str | None:
    """Return the view that a table calls by any of its usual names, another one as it is, None where it says nothing."""
    text = " ".join(str(name or "").replace(".", "").split()).upper()
    return VIEWS.get(text, text) or None


def prepare_film(path: Path, resolution: int, is_prepared: bool = False) -> tuple[bytes, dict]:
    """Return the PNG of a film and what to note of it; of one that was prepared before no border is cut off.

    Returns:
        The PNG's bytes (8-bit grey, `resolution` squared) and width and height of the original in pixels, the borders cut
        off it (left, top, right, bottom, in pixels), geometry, whether text is burned in, and the difference hash of the
        result in hexadecimal.

    Raises:
        UnusableFilm: with the reason.
    """
    grey = decode_film(path)
    borders = (0, 0, 0, 0) if is_prepared else find_borders(grey)
    square, geometry = to_square(without_borders(grey, borders), resolution)
    height, width = grey.shape
    return encode_png(square), {
        "width": width,
        "height": height,
        "borders": list(borders),
        "geometry": geometry,
        "burned_in_text": has_letters(grey) or (is_dicom(path) and declares_text(path)),
        "dhash": f"{difference_hash(square):016x}",
    }


def decode_film(path: Path) -> np.ndarray:
    """Decode a film to 8-bit grey, upright as its EXIF orientation says.

    8-bit grey values are kept as they are, and so is the grey scale that a DICOM file asks for. Alpha that is opaque
    everywhere is dropped, any other is composited on black. More than 8 bits are scaled to 8, see `scale_to_8_bit`, but
    those of generate.py, which are of 16 bits, are rounded.

    Returns:
        Grey levels, uint8, [H, W].

    Raises:
        UnusableFilm: unreadable, truncated, absurdly large, tiny, blank or coloured.
    """
    if is_dicom(path):
        grey = show_dicom(path)
    else:
        image = load_image(path)
        if image.mode.startswith("I") or image.mode == "F":
            levels = np.asarray(image)
            if CHUNK in image.info:  # a generated film, whose grey scale is its own
                return eight_bits(levels)
            # Pillow turns the grey scale of such a TIFF round for 8 bits only
            white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
            grey = scale_to_8_bit(65535 - levels if white_is_zero else levels)
        else:
            try:
                grey = flatten(image)
            except UnusableFilm:
                raise
            except ValueError:  # not every mode of Pillow's can be turned into grey
                raise UnusableFilm("cannot be decoded") from None
    # Every 64th pixel first: where these alone vary by 8, all of them vary by 1
    if grey[::8, ::8].std() < 8 and grey.std() < 1:
        raise UnusableFilm("blank")
    return grey


def show_dicom(path: Path) -> np.ndarray:
    """Return a DICOM film as 8-bit grey, uint8 [H, W]: by its own grey scale, or else as `scale_to_8_bit` does."""
    try:
        levels, limits = read_dicom(path, MAX_PIXELS)
    except UnreadableDicom as fault:
        raise UnusableFilm(str(fault)) from None
    if min(levels.shape[:2]) < MIN_SIDE_PX:
        raise UnusableFilm(f"smaller than {MIN_SIDE_PX} px")
    if levels.ndim == 3:
        return flatten(Image.fromarray(levels))
    if not np.isfinite(levels).all():
        raise UnusableFilm("cannot be decoded")
    return scale_to_8_bit(levels - levels.min()) if limits is None else stretch(levels, *limits)


def load_image(path: Path) -> Image.Image:
    """Open and decode an image file whole and turn it upright; refuse what is no image, broken, too large or small."""
    depth = 8  # bits a channel of a PNG
    try:
        with open(path, "rb") as file:  # given the path, Pillow 13 maps a TIFF that lies on its side with wrong lines
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height <= MAX_PIXELS:
                if image.format == "PNG":  # decoding skips the checksums, and one swap of bytes in eighty gets through
                    image.verify()
                    file.seek(24)
                    depth = file.read(1)[0]
                    image = Image.open(file, formats=FORMATS)  # what was verified cannot be decoded
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnusableFilm("too large") from None
    except FileNotFoundError:
        raise UnusableFilm("not found") from None
    except Exception:  # a damaged file makes Pillow's decoders raise almost anything
        raise UnusableFilm("cannot be decoded") from None
    if width * height > MAX_PIXELS:
        raise UnusableFilm("too large")
    if min(width, height) < MIN_SIDE_PX:
        raise UnusableFilm(f"smaller than {MIN_SIDE_PX} px")
    if depth == 16 and not image.mode.startswith("I"):
        # Pillow keeps the upper 8 bits, of a film of 12 next to nothing
        raise UnusableFilm("16 bits a channel, but not grey")
    return image


def flatten(image: Image.Image) -> np.ndarray:
    """Reduce an image of at most 8 bits a channel to grey.

    Returns:
        Grey levels, uint8, [H, W].

    Raises:
        UnusableFilm: for a colour picture.
    """
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))  # [H, W]
        image = image.convert("RGB")
    else:
        alpha = None
    if image.mode not in ("1", "L"):
        channels = np.asarray(image.convert("RGB"))  # [H, W, 3]
        spread = channels.max(axis=2) - channels.min(axis=2)
        if (spread > COLOUR_SPREAD).mean() > MAX_COLOURED:
            raise UnusableFilm("colour picture")
    grey = np.asarray(image.convert("L"))
    if alpha is None or (alpha == 255).all():
        return grey
    return np.round(grey * (alpha / 255.0)).astype(np.uint8)


def scale_to_8_bit(levels: np.ndarray) -> np.ndarray:
    """Scale grey levels of more than 8 bits to 8, linearly between two percentiles of the exposed pixels.

    Dividing by 256 would leave a 12-bit film in a 16-bit file all but black; the true range would let one dead pixel
    or a burnt-in marker do the same. The percentiles are taken over the pixels that are not zero, because collimated
    borders would otherwise be the histogram, and lie so far out (0.1 and 99.9) that two pixels in a thousand
    saturate at most.

    Args:
        levels: integers of any sign or floats, [H, W].

    Returns:
        Grey levels, uint8, [H, W].

    Raises:
        UnusableFilm: where all levels are equal or some are not finite.
    """
    if not np.isfinite(levels).all():
        raise UnusableFilm("cannot be decoded")
    exposed = levels[levels != 0] if levels.min() == 0 else levels
    if not exposed.size:
        raise UnusableFilm("blank")
    low, high = np.percentile(exposed, SCALE_PERCENTILES)
    if high == low:
        low, high = levels.min(), levels.max()
    if high == low:
        raise UnusableFilm("blank")
    return stretch(levels, low, high)


def stretch(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return levels as 8-bit grey, uint8: `low` and what is below is black, `high` and what is above is white."""
    scaled = (levels - np.float64(low)) * (255 / (np.float64(high) - low))
    return np.round(scaled.clip(0, 255)).astype(np.uint8)


def to_square(
    grey: np.ndarray, resolution: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[np.ndarray, str]:
    """Bring a film to a square: long ones are padded with black, others lose their margin.

    A square film of the right size comes back unchanged, bit for bit.

    Args:
        grey: uint8, [H, W].
        resolution: side of the result in pixels.
        resample: Pillow filter.

    Returns:
        Grey levels, uint8, [resolution, resolution], and "none", "crop" or "pad".
    """
    height, width = grey.shape
    if height == width:
        if height == resolution:
            return grey, "none"
        return np.asarray(Image.fromarray(grey).resize((resolution, resolution), resample)), "none"
    short, long = sorted((height, width))
    if long <= MAX_PAD_FREE_ASPECT * short:
        left, top = (width - short) // 2, (height - short) // 2
        box = (left, top, left + short, top + short)
        cropped = Image.fromarray(grey).resize((resolution, resolution), resample, box=box)
        return np.asarray(cropped), "crop"
    inner_width = max(1, round(width * resolution / long))
    inner_height = max(1, round(height * resolution / long))
    inner = Image.fromarray(grey).resize((inner_width, inner_height), resample)
    square = np.zeros((resolution, resolution), dtype=np.uint8)
    top, left = (resolution - inner_height) // 2, (resolution - inner_width) // 2
    square[top : top + inner_height, left : left + inner_width] = np.asarray(inner)
    return square, "pad"


def find_borders(grey: np.ndarray) -> tuple[int, int, int, int]:
    """Return how many pixels to cut off at each edge of a film, because they show none of it: left, top, right, bottom.

    Of a border as much is kept as makes the rest square: else `to_square` would cut the film itself instead.

    Args:
        grey: uint8, [H, W].
    """
    low, high = np.percentile(grey[::8, ::8], (1, 99))
    spread = min(BORDER_SPREAD, SPREAD_SHARE * (high - low))
    left, top, right, bottom = (border_of(lines, spread) for lines in (grey.T, grey, grey.T[::-1], grey[::-1]))
    excess = (len(grey) - top - bottom) - (grey.shape[1] - left - right)  # of the height
    left, right = less(left, right, excess)
    top, bottom = less(top, bottom, -excess)
    rest = min(len(grey) - top - bottom, grey.shape[1] - left - right)
    return (left, top, right, bottom) if rest >= MIN_SIDE_PX else (0, 0, 0, 0)


def less(first: int, second: int, excess: int) -> tuple[int, int]:
    """Return two borders made thinner by `excess` pixels in all, each in proportion, as far as they go."""
    rest = max(0, first + second - max(0, excess))
    kept = round(first * rest / max(1, first + second))
    return kept, rest - kept


def border_of(lines: np.ndarray, spread: float) -> int:
    """Return how many of the first lines are of one grey each, within `spread` levels, 0 where they are few; uint8 [L, N]."""
    most = int(len(lines) * MOST_BORDER)
    step = max(1, lines.shape[1] // PIXELS_A_LINE)
    count = 0
    for start in range(0, most, LINES_AT_ONCE):
        block = lines[start : min(start + LINES_AT_ONCE, most), ::step].astype(np.int16)
        near = np.abs(block - np.median(block, axis=1, keepdims=True)) <= spread
        even = near.mean(axis=1) >= BORDER_SHARE
        count += len(even) if even.all() else int(np.argmin(even))
        if not even.all():
            break
    return count if count >= LEAST_BORDER * len(lines) else 0


def without_borders(grey: np.ndarray, borders: tuple[int, int, int, int]) -> np.ndarray:
    """Return a film without its borders, uint8 [H, W]."""
    left, top, right, bottom = borders
    return grey[top : len(grey) - bottom, left : grey.shape[1] - right]


def has_letters(grey: np.ndarray) -> bool:
    """Return whether a film has text burned in: three or more letters in a row, as in "PORTABLE" or a name.

    Looks for small saturated patches with sharp edges, of like height, on one base line. A single side marker is none.

    Args:
        grey: uint8, [H, W].
    """
    factor = -(-max(grey.shape) // LETTER_SIDE_PX)
    small = grey if factor == 1 else np.asarray(Image.fromarray(grey).reduce(factor))
    low, high = (share * max(small.shape) for share in LETTER_HEIGHTS)
    saturated = small >= LETTER_LEVEL
    rows, columns = (np.flatnonzero(saturated.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return False
    # Mostly a small part of the film, and it is the labels that take long; two pixels around for the edges of letters
    part = np.s_[max(0, rows[0] - 2) : rows[-1] + 3, max(0, columns[0] - 2) : columns[-1] + 3]
    small, (labels, _) = small[part], ndimage.label(saturated[part], np.ones((3, 3)))
    letters = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if max(low, LEAST_LETTER_PX) <= height <= high and 2 <= width <= 1.6 * height:
            around = np.s_[max(0, rows.start - 2) : rows.stop + 2, max(0, columns.start - 2) : columns.stop + 2]
            if is_letter(small[around], labels[around] == number, height * width):
                letters.append((columns.start, columns.stop, rows.stop, height))
    letters.sort()
    return any(row_length(letters, first) >= LEAST_LETTERS for first in range(len(letters)))


def is_letter(grey: np.ndarray, patch: np.ndarray, area: int) -> bool:
    """Return whether a patch fills its box as letters do and stands out sharply; uint8 and bool, [h, w]."""
    edge = ndimage.binary_dilation(patch, iterations=2) & ~ndimage.binary_dilation(patch) & (grey < LETTER_LEVEL)
    fill = patch.sum() / area
    return 0.15 <= fill <= 0.95 and edge.any() and np.median(grey[edge]) <= LETTER_LEVEL - LETTER_CONTRAST


def row_length(letters: list[tuple[int, int, int, int]], first: int) -> int:
    """Return how many letters stand in a row with one: left, right, base and height of each, sorted."""
    length, (_, right, base, height) = 1, letters[first]
    for left, next_right, next_base, next_height in letters[first + 1 :]:
        is_beside = -0.3 * height <= left - right <= 1.5 * height
        if is_beside and abs(next_base - base) <= 0.2 * height and 0.75 <= next_height / height <= 1.33:
            length, right, base, height = length + 1, next_right, next_base, next_height
    return length


def is_upsampled(row: dict, resolution: int) -> bool:
    """Return whether a film, of which `row` says size, borders and geometry, had fewer pixels than its square."""
    left, top, right, bottom = row["borders"]
    sides = row["width"] - left - right, row["height"] - top - bottom
    return (max(sides) if row["geometry"] == "pad" else min(sides)) < resolution


def encode_png(grey: np.ndarray) -> bytes:
    """Return an 8-bit grey PNG of uint8 [H, W]; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    # Grain has no matches to look for: with runs only a film is as small as at the default level 6, in a fifth of the time
    Image.fromarray(grey).save(buffer, format="PNG", compress_level=1, compress_type=Image.RLE)
    return buffer.getvalue()


def difference_hash(grey: np.ndarray) -> int:
    """Return 64 bits, one for each step to the right in a 9 x 8 thumbnail: set where it gets brighter.

    Proposes near-duplicates only; frontal films resemble one another too much for it to decide.
    """
    small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def thumbnail(grey: np.ndarray) -> np.ndarray:
    """Return a film at 128 px, uint8 [128, 128], on which near-duplicates are decided."""
    return np.asarray(Image.fromarray(grey).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX))
