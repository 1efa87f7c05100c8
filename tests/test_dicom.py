"""DICOM films: what is dense is bright whatever the file says it how, and nothing of the header comes along."""

import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from utils.dicom import apply_voi
from utils.films import UnusableFilm, decode_film, prepare_film

ROWS, COLUMNS = 96, 128


def chest(bits: int) -> np.ndarray:
    """Return a film of a ramp and a bright marker in the upper left corner, uint16 [ROWS, COLUMNS]."""
    film = np.linspace(0.1, 0.7, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    film[4:12, 4:20] = 1.0
    film[-4:] = 0.0
    return np.round(film * (2**bits - 1)).astype(np.uint16)


def save(folder: Path, pixels: np.ndarray, bits: int, name: str = "film.dcm", **elements) -> Path:
    """Save pixels as a CR film whose header says who the patient is."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Somebody^Known", "ID-4711", "CR"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    path = folder / name
    dataset.save_as(path, enforce_file_format=True)
    return path


def voi_lut(table: np.ndarray, first: int, declared_bits: int) -> pydicom.Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table), first, declared_bits])
    item.add_new("LUTData", "US", table.tolist())
    return pydicom.Sequence([item])


def test_eight_bits_are_kept_as_they_are(tmp_path: Path) -> None:
    pixels = chest(8).astype(np.uint8)
    np.testing.assert_array_equal(decode_film(save(tmp_path, pixels, 8)), pixels)
    same = save(tmp_path, pixels, 8, RescaleSlope=1, RescaleIntercept=0)  # as some tools write into every file
    np.testing.assert_array_equal(decode_film(same), pixels)


def test_eight_bits_through_a_modality_table_span_the_greys(tmp_path: Path) -> None:
    """Values are then the table's, up to 4,080 here: against 255 nearly all would be white."""
    pixels = chest(8).astype(np.uint8)
    table = voi_lut(np.arange(256, dtype=np.uint16) * 16, 0, 16)
    table[0].ModalityLUTType = "OD"
    film = decode_film(save(tmp_path, pixels, 8, ModalityLUTSequence=table))
    assert (film == 255).mean() < 0.05
    assert np.corrcoef(film.ravel(), pixels.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_both_polarities_give_the_same_film(tmp_path: Path, bits: int) -> None:
    pixels = chest(bits).astype(np.uint8 if bits == 8 else np.uint16)
    upright = decode_film(save(tmp_path, pixels, bits))
    inverse = (2**bits - 1 - pixels).astype(pixels.dtype)
    for elements in ({}, {"PresentationLUTShape": "INVERSE"}):
        path = save(tmp_path, inverse, bits, PhotometricInterpretation="MONOCHROME1", **elements)
        assert np.abs(decode_film(path).astype(int) - upright).max() <= 1
    assert upright[4:12, 4:20].min() == 255, "the marker is bright, and in its corner"
    assert upright[-3:].max() == 0


@pytest.mark.parametrize(
    "window", [{"WindowCenter": 1024, "WindowWidth": 1024}, {"WindowCenter": [1024, 9], "WindowWidth": [1024, 9]}]
)
def test_the_first_window_is_the_grey_scale(tmp_path: Path, window: dict) -> None:
    film = decode_film(save(tmp_path, chest(12), 12, **window))
    expected = ((chest(12).astype(float) - 1023.5) / 1023 + 0.5).clip(0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.abs(film - expected).max() <= 0.51


def test_signed_values_with_a_rescale_and_a_window(tmp_path: Path) -> None:
    pixels = (chest(12).astype(np.int16) - 2048).astype(np.int16)
    elements = {
        "RescaleSlope": 2,
        "RescaleIntercept": 100,
        "WindowCenter": 100,
        "WindowWidth": 4096,
        "RescaleType": "US",
    }
    film = decode_film(save(tmp_path, pixels, 12, **elements))
    expected = ((pixels * 2.0 + 100 - 99.5) / 4095 + 0.5).clip(0, 1) * 255
    assert np.abs(film - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("output_bits", "declared"), [(16, 16), (12, 16), (8, 8), (10, 10)], ids=lambda bits: f"{bits}"
)
def test_a_voi_lut_uses_the_whole_range_of_its_output(tmp_path: Path, output_bits: int, declared: int) -> None:
    """12-bit film: scaled by what is declared it would be black, by what is stored clipped; 8 bits would wrap round."""
    table = np.round((np.arange(4096) / 4095) ** 2 * (2**output_bits - 1)).astype(np.uint16)
    film = decode_film(save(tmp_path, chest(12), 12, VOILUTSequence=voi_lut(table, 0, declared)))
    expected = (chest(12) / 4095.0) ** 2 * 255
    assert np.abs(film - expected).max() <= 1.01


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_voi_lut_may_have_two_entries_a_word(big_endian: bool) -> None:
    """Eight bits an entry in OW: read as 16 bits, half of the table was missing and bright films clipped."""
    table = np.round((np.arange(4096) / 4095) ** 2 * 255).astype(np.uint8)
    item, dataset = Dataset(), Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.add_new("LUTData", "OW", (table.view("<u2").astype(">u2") if big_endian else table).tobytes())
    dataset.VOILUTSequence = [item]
    dataset.set_original_encoding(False, not big_endian)
    levels, bounds = apply_voi(chest(12), dataset)
    np.testing.assert_array_equal(levels, table[chest(12)])
    assert bounds == (0.0, 255.0)


def test_a_voi_lut_comes_before_polarity(tmp_path: Path) -> None:
    table = np.round((np.arange(4096) / 4095) ** 2 * 65535).astype(np.uint16)
    elements = {"VOILUTSequence": voi_lut(table, 0, 16), "PhotometricInterpretation": "MONOCHROME1"}
    film = decode_film(save(tmp_path, 4095 - chest(12), 12, **elements))
    expected = (1 - (1 - chest(12) / 4095.0) ** 2) * 255
    assert np.abs(film - expected).max() <= 1.01


def test_a_voi_lut_begins_at_its_first_value(tmp_path: Path) -> None:
    table = np.linspace(0, 1023, 1024).astype(np.uint16)
    film = decode_film(save(tmp_path, chest(12), 12, VOILUTSequence=voi_lut(table, 1000, 10)))
    expected = (chest(12).astype(float) - 1000).clip(0, 1023) / 1023 * 255
    assert np.abs(film - expected).max() <= 0.51


def test_a_voi_lut_may_begin_below_zero() -> None:
    """Implicit VR does not tell that its first value has a sign."""
    dataset = Dataset()
    dataset.VOILUTSequence = voi_lut(np.arange(4096, dtype=np.uint16), 65536 - 1024, 12)
    levels, _ = apply_voi(chest(12) - 1024.0, dataset)
    np.testing.assert_array_equal(levels, chest(12))


@pytest.mark.parametrize("polarity", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black(tmp_path: Path, polarity: str) -> None:
    pixels = chest(12)
    pixels[:, :10] = 4095
    path = save(tmp_path, pixels, 12, PhotometricInterpretation=polarity, PixelPaddingValue=4095)
    assert decode_film(path)[:, :10].max() == 0


def test_a_window_of_no_width_is_no_window(tmp_path: Path) -> None:
    film = decode_film(save(tmp_path, chest(12), 12, WindowCenter=0, WindowWidth=0))
    assert film.min() == 0 and film.max() == 255


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["RLE", "JPEG-LS"])
def test_compressed_films_are_the_same(tmp_path: Path, syntax: str) -> None:
    plain = save(tmp_path, chest(12), 12)
    dataset = pydicom.dcmread(plain)
    dataset.compress(syntax)
    dataset.save_as(tmp_path / "compressed.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(decode_film(tmp_path / "compressed.dcm"), decode_film(plain))


def test_a_deflated_film_is_read_and_a_bomb_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = save(tmp_path, chest(12), 12)
    dataset = pydicom.dcmread(plain)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(decode_film(tmp_path / "deflated.dcm"), decode_film(plain))
    monkeypatch.setattr("utils.dicom.MAX_INFLATED_BYTES", 2 * ROWS * COLUMNS)  # the header comes on top of the pixels
    with pytest.raises(UnusableFilm, match="too large"):
        decode_film(tmp_path / "deflated.dcm")


def test_no_decoder_makes_room_for_what_a_frame_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame of 60,000 pixels a side in a film of a hundred took gigabytes before it was refused."""
    dataset = pydicom.dcmread(save(tmp_path, chest(12), 12))
    dataset.compress(JPEGLSLossless)
    dataset.save_as(tmp_path / "ls.dcm", enforce_file_format=True)
    (tmp_path / "2000.dcm").write_bytes(
        Path(get_testdata_file("MR_small_jp2klossless.dcm", download=False)).read_bytes()
    )
    monkeypatch.setattr("utils.dicom.pixel_array", lambda *_, **__: pytest.fail("asked to decode"))
    sizes = {
        "ls.dcm": (b"\xff\xf7", struct.pack(">HH", ROWS, COLUMNS)),
        "2000.dcm": (b"\xff\x4f\xff\x51", struct.pack(">II", 64, 64)),
    }
    for name, (marker, size) in sizes.items():
        content = (tmp_path / name).read_bytes()
        begins = content.index(size, content.index(marker))
        (tmp_path / name).write_bytes(content[:begins] + b"\x60" * len(size) + content[begins + len(size) :])
        with pytest.raises(UnusableFilm, match="cannot be decoded"):
            decode_film(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    ["MR_small_implicit", "MR_small_bigendian", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"],
)
def test_pydicoms_own_film_is_the_same_in_every_transfer_syntax(name: str) -> None:
    reference, other = (Path(get_testdata_file(f"{film}.dcm", download=False)) for film in ("MR_small", name))
    np.testing.assert_array_equal(decode_film(other), decode_film(reference))


def test_nothing_of_the_header_comes_along(tmp_path: Path) -> None:
    path = save(tmp_path, chest(12), 12)
    assert b"Somebody" in path.read_bytes()
    png, noted = prepare_film(path, 64)
    assert b"Somebody" not in png and b"4711" not in png and "Somebody" not in repr(noted)
    assert (noted["width"], noted["height"]) == (COLUMNS, ROWS)


def broken(path: Path, change) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"NumberOfFrames": 2}, "several frames"),
        ({"Rows": 30000, "Columns": 30000}, "too large"),
        ({"Rows": 0}, "no film in it"),
        ({"Rows": 8, "Columns": 8}, "smaller than 64 px"),
        ({"BitsStored": 77, "HighBit": 76}, "cannot be decoded"),
        ({"HighBit": 15}, "values not in the lowest bits"),
    ],
)
def test_files_without_a_usable_film_are_rejected_with_a_reason(tmp_path: Path, elements: dict, reason: str) -> None:
    with pytest.raises(UnusableFilm, match=reason):
        decode_film(save(tmp_path, chest(12), 12, **elements))


@pytest.mark.parametrize(
    "elements",
    [
        {"VOILUTFunction": "", "WindowCenter": 2047, "WindowWidth": 4096},
        {"RescaleSlope": None, "RescaleIntercept": None},
    ],
)
def test_an_element_without_a_value_is_not_known(tmp_path: Path, elements: dict) -> None:
    known = {name: value for name, value in elements.items() if value}
    expected = decode_film(save(tmp_path, chest(12), 12, **known))
    np.testing.assert_array_equal(decode_film(save(tmp_path, chest(12), 12, **elements)), expected)


def test_bytes_beyond_the_film_are_no_second_film(tmp_path: Path) -> None:
    twice = np.concatenate([chest(12), chest(12)])
    path = save(tmp_path, twice, 12, Rows=ROWS)
    np.testing.assert_array_equal(decode_film(path), decode_film(save(tmp_path, chest(12), 12, "one.dcm")))


@pytest.mark.parametrize(("name", "reason"), [("gone.dcm", "not found"), ("", "cannot be decoded")])
def test_a_path_that_cannot_be_read_is_a_rejected_film(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UnusableFilm, match=reason):
        decode_film(tmp_path / name)


@pytest.mark.parametrize("keep", [140, 400, 5000])
def test_a_file_cut_short_is_rejected(tmp_path: Path, keep: int) -> None:
    with pytest.raises(UnusableFilm, match="cannot be decoded|no film in it"):
        decode_film(broken(save(tmp_path, chest(12), 12), lambda content: content[:keep]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("examples_rgb_color.dcm", "colour picture"),
        ("examples_palette.dcm", "colour picture"),
        ("test-SR.dcm", "no film in it"),
        ("JPEG-lossy.dcm", "12-bit lossy JPEG, which needs pip install pylibjpeg-libjpeg"),
    ],
)
def test_other_things_that_dicom_files_hold(name: str, reason: str) -> None:
    with pytest.raises(UnusableFilm, match=reason):
        decode_film(Path(get_testdata_file(name, download=False)))


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEGLSLossless, "MR_small_jp2klossless.dcm"])
def test_damaged_files_never_raise_anything_else(tmp_path: Path, syntax: str | None) -> None:
    """Nor end the process, as some decoders do."""
    path = save(tmp_path, chest(12), 12, WindowCenter=2048, WindowWidth=4096)
    if syntax in (RLELossless, JPEGLSLossless):
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax)
        dataset.save_as(path, enforce_file_format=True)
    elif syntax is not None:
        path = Path(get_testdata_file(syntax, download=False))
    content, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    rejected = 0
    for i in range(200):
        damaged = content.copy()
        places = rng.integers(132, 1200 if i % 2 else len(content), size=rng.integers(1, 6))  # the header, or anywhere
        damaged[places] = rng.integers(256, size=len(places))
        (tmp_path / "damaged.dcm").write_bytes(damaged.tobytes())
        try:
            decode_film(tmp_path / "damaged.dcm")
        except UnusableFilm:
            rejected += 1
    assert 0 < rejected < 200


@pytest.mark.parametrize("place", [None, 4000, 5000, 6000])
def test_lossless_jpeg_is_read_in_a_process_that_may_fall(tmp_path: Path, place: int | None) -> None:
    content = bytearray(Path(get_testdata_file("SC_rgb_jpeg_gdcm.dcm", download=False)).read_bytes())
    if place is not None:
        content[place : place + 40] = bytes(range(40, 80))
    (tmp_path / "film.dcm").write_bytes(content)
    with pytest.raises(UnusableFilm, match="colour picture" if place is None else "colour picture|cannot be decoded"):
        decode_film(tmp_path / "film.dcm")
