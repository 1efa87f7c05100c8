"""DICOM films to grey levels, in the order of PS3.4 N.2: stored values, Modality LUT, VOI LUT or window, polarity.

Read with pydicom and its plug-ins for JPEG, JPEG-LS, JPEG 2000 and RLE. Pixels come out of a file, and nothing of its header.
"""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pydicom.config
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing, pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

# Many files break the standard in elements that are not used here. For all threads at once: a filter within one leaks
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module="pydicom")

# One for each compression, and of those that can read it one that survives damaged files. GDCM does not: it ends the
# process, so what it alone can read it reads in a process of its own
JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
JPEG_2000 = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
PLUGINS = {
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit), "pillow"),
    **dict.fromkeys(JPEG_LS, "pyjpegls"),
    **dict.fromkeys(JPEG_2000, "pylibjpeg"),
    RLELossless: "pydicom",
}
ISOLATED = (JPEGLossless, JPEGLosslessSV1)
ISOLATED_S = 60.0  # longest that a film may take there

MAX_INFLATED_BYTES = 1 << 28
MAGIC_AT, MAGIC = 128, b"DICM"
# Elements that may stand there without a value: it is not known
MAY_BE_EMPTY = ("VOILUTFunction", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence")
BEYOND = np.array([-1e12, 1e12])  # every window: what it makes of them are the levels of black and white


class UnreadableDicom(ValueError):
    """A DICOM file without a film that can be shown; the message is the reason."""


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM files do; one that cannot be read does not."""
    try:
        with open(path, "rb") as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except OSError:
        return False


def declares_text(path: Path) -> bool:
    """Return whether a header says that text is burned into the film (0028,0301)."""
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["BurnedInAnnotation"])
    return str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES"


def read_dicom(path: Path, max_pixels: int) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Return a film as it is to be shown: what is bright is dense, whatever the polarity of the file.

    A VOI LUT, or else the first window, is the grey scale that the film was meant to be read with, and is kept.

    Args:
        max_pixels: of a film; a larger one is not decoded.

    Returns:
        Levels, float64 [H, W], and those of black and white, None where the file does not say; of a colour picture
        RGB, uint8 [H, W, 3], and None.

    Raises:
        UnreadableDicom: no film, several frames, too large, or damaged.
    """
    try:
        return decode_dicom(path, max_pixels)
    except UnreadableDicom:
        raise
    except Exception as error:  # a damaged file makes pydicom and its plug-ins raise almost anything
        raise UnreadableDicom("cannot be decoded") from error


def decode_dicom(path: Path, max_pixels: int) -> tuple[np.ndarray, tuple[float, float] | None]:
    """As `read_dicom`, but a damaged file raises whatever pydicom makes of it."""
    check_inflated(path)
    dataset = pydicom.dcmread(path)
    height, width, frames = (int(dataset.get(name) or 0) for name in ("Rows", "Columns", "NumberOfFrames"))
    if "PixelData" not in dataset or not height * width:
        raise UnreadableDicom("no film in it")
    if frames > 1:
        raise UnreadableDicom("several frames")
    if height * width > max_pixels:
        raise UnreadableDicom("too large")
    if dataset.get("HighBit") not in (None, dataset.BitsStored - 1):
        raise UnreadableDicom("values not in the lowest bits")  # which pydicom takes to be there
    for name in MAY_BE_EMPTY:
        if name in dataset and dataset[name].is_empty:
            del dataset[name]  # pydicom would stop there
    stored = decompress(path, dataset)  # [H, W], or [H, W, 3] of a colour picture
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return (colours >> (8 * (colours.itemsize - 1))).astype(np.uint8), None
    if stored.ndim == 3:
        return (stored >> max(0, dataset.BitsStored - 8)).astype(np.uint8), None

    levels, limits = apply_voi(np.asarray(apply_modality_lut(stored, dataset), np.float64), dataset)
    # One statement in two places: PS3.3 C.8.11.3 allows INVERSE with MONOCHROME1 only
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        levels = -levels
        limits = limits and (-limits[1], -limits[0])
    padding = is_padding(stored, dataset)
    if padding.any() and not padding.all():
        levels[padding] = levels[~padding].min()  # black, also where the film was inverted
    return levels, limits


def check_inflated(path: Path) -> None:
    """Refuse a deflated file of more bytes than any film has: pydicom would take all of them into memory."""
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        begins = MAGIC_AT + len(MAGIC) + 12 + meta.FileMetaInformationGroupLength  # 12 bytes say the length
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(path.read_bytes()[begins:], MAX_INFLATED_BYTES)
        if inflater.unconsumed_tail:
            raise UnreadableDicom("too large")


def check_frame(dataset: pydicom.Dataset) -> None:
    """Refuse a compressed frame of another size than the file's: its decoder would make room for any."""
    syntax = dataset.file_meta.TransferSyntaxUID
    expected = (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    if syntax in JPEG_2000:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        right, bottom, left, top, *_, samples = struct.unpack_from(">8IH", frame, frame.index(b"\xff\x4f\xff\x51") + 8)
        said = (bottom - top, right - left, samples)
    elif syntax in JPEG_LS:
        frame, place = get_frame(dataset.PixelData, 0, number_of_frames=1), 2
        while frame[place + 1] != 0xF7:  # segments before that of the frame
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
        said = struct.unpack_from(">HHB", frame, place + 5)
    else:
        return
    if said != expected:
        raise UnreadableDicom("cannot be decoded")


def decompress(path: Path, dataset: pydicom.Dataset) -> np.ndarray:
    """Return the stored values of a file's only frame, [H, W] or RGB [H, W, 3]."""
    syntax = dataset.file_meta.TransferSyntaxUID
    check_frame(dataset)
    if syntax in ISOLATED:
        command = [sys.executable, __file__, str(path.absolute())]
        done = subprocess.run(command, capture_output=True, timeout=ISOLATED_S, check=True)
        return np.load(io.BytesIO(done.stdout), allow_pickle=False)
    if syntax == JPEGExtended12Bit and dataset.BitsStored > 8:
        try:
            return pixel_array(dataset, decoding_plugin="pylibjpeg", allow_excess_frames=False)
        except Exception as error:
            raise UnreadableDicom("12-bit lossy JPEG, which needs pip install pylibjpeg-libjpeg") from error
    return pixel_array(dataset, decoding_plugin=PLUGINS.get(syntax, ""), allow_excess_frames=False)


def apply_voi(levels: np.ndarray, dataset: pydicom.Dataset) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Return levels after the VOI LUT or the window, and the levels of black and white, None without either."""
    tables = dataset.get("VOILUTSequence")
    if tables and tables[0].get("LUTData") is not None:
        # Not pydicom's own: it counts the places of an 8-bit table in 8 bits, so that more than 256 of them wrap round
        count, first, _ = tables[0].LUTDescriptor
        if first > 32767 and levels.min() < 0:
            first -= 1 << 16  # read without a sign, which implicit VR does not tell
        data = tables[0].LUTData
        if isinstance(data, bytes):
            data = np.frombuffer(data, "<u2" if dataset.original_encoding[1] is not False else ">u2")
            if len(data) < (count or 1 << 16):  # two entries of 8 bits a word, the first in its lower half
                data = data.astype("<u2").view("u1")
        table = np.asarray(data, np.float64)[: count or 1 << 16]
        places = np.clip(np.rint(levels) - first, 0, len(table) - 1).astype(int)
        if table.max() > table.min():
            # The table's own range: 12 bits in a table that is declared to have 16 are not a dark film
            return table[places], (float(table.min()), float(table.max()))
    if dataset.get("WindowCenter") is not None and float(np.ravel(dataset.get("WindowWidth") or 0)[0]) >= 1:
        black, white = apply_windowing(BEYOND, dataset)
        return apply_windowing(levels, dataset), (float(black), float(white))
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    as_stored = slope in (None, 1) and intercept in (None, 0) and "ModalityLUTSequence" not in dataset
    if dataset.BitsStored == 8 and not dataset.PixelRepresentation and as_stored:
        return levels, (0.0, 255.0)
    return levels, None


def is_padding(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Return which pixels were filled in to make the film a rectangle, bool [H, W]."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


if __name__ == "__main__":  # the process of its own: values to the standard output
    np.save(
        sys.stdout.buffer, pixel_array(pydicom.dcmread(sys.argv[1]), decoding_plugin="gdcm", allow_excess_frames=False)
    )
