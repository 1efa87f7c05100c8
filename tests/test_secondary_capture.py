"""Generated films as DICOM: the same pixels, a virtual patient, and nothing that a validator objects to."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage

from tests.test_provenance import film, made
from utils.dicom import read_dicom
from utils.secondary_capture import encode_dicom

# The validator's dictionary of 2022 does not know the attribute that the standard has gained since
NEWER = "not a recognized standard attribute - (0x0008,0x001c)"

FULL = made(
    3, prompt="PA film. Überlagerung.", base="assets/cxr-tiny", adapters=[{"sha256": "a" * 64, "scale": 1.0}] * 9,
    scheduler="dpmsolver++", num_inference_steps=25, guidance_scale=4.0, versions={"torch": "2.13.0"},
    labels={"sex": "M", "age": 8},
)  # fmt: skip


def read(tmp_path: Path, *args, **options) -> pydicom.Dataset:
    (tmp_path / "film.dcm").write_bytes(encode_dicom(*args, **options))
    return pydicom.dcmread(tmp_path / "film.dcm")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_film_says_that_it_is_synthetic_and_keeps_every_level(tmp_path: Path, dtype: type) -> None:
    dataset = read(tmp_path, film(1, dtype)[:31, :31], FULL)
    np.testing.assert_array_equal(dataset.pixel_array, film(1, dtype)[:31, :31])
    assert dataset.SOPClassUID == SecondaryCaptureImageStorage
    assert list(dataset.ImageType) == ["DERIVED", "SECONDARY"]
    assert (dataset.SyntheticData, dataset.ConversionType, dataset.BurnedInAnnotation) == ("YES", "SYN", "NO")
    assert str(dataset.PatientName).startswith("SYNTHETIC") and dataset.PatientID.startswith("SYNTHETIC")
    assert (dataset.PatientAge, dataset.PatientSex, dataset.ImageComments) == ("008Y", "M", FULL["prompt"])
    assert not [element for element in dataset.iterall() if element.VR in ("DA", "TM", "DT") and element.value]
    levels, limits = read_dicom(tmp_path / "film.dcm", 10**6)  # as download.py would take it
    black, white = limits
    np.testing.assert_allclose(
        (levels - black) / (white - black), film(1, dtype)[:31, :31] / np.iinfo(dtype).max, atol=1e-6
    )


def test_equal_films_are_equal_files_and_others_have_other_ids(tmp_path: Path) -> None:
    assert encode_dicom(film(1), FULL) == encode_dicom(film(1), FULL)
    files = [read(tmp_path, film(1), FULL | {"seed": seed}) for seed in range(3)]
    files += [read(tmp_path, film(2), FULL), read(tmp_path, film(2), FULL, burn_label=True)]
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert len({dataset[name].value for dataset in files}) == 5
    uids = [dataset[f"{level}InstanceUID"].value for dataset in files for level in ("SOP", "Series", "Study")]
    assert len(set(uids)) == 15 and max(map(len, uids)) <= 64


@pytest.mark.parametrize("side", [128, 512])
def test_the_label_is_written_into_the_lower_edge_only(tmp_path: Path, side: int) -> None:
    grey = np.full((side, side), 100, np.uint8)
    dataset = read(tmp_path, grey, FULL, burn_label=True)
    labelled = dataset.pixel_array
    assert dataset.BurnedInAnnotation == "YES"
    assert (grey == 100).all(), "the film itself is left alone"
    assert (labelled[: side * 9 // 10] == 100).all()
    assert labelled[-side // 32 :].min() == 0 and labelled[-side // 32 :].max() > 200


def test_missing_labels_are_left_empty(tmp_path: Path) -> None:
    dataset = read(tmp_path, film(), FULL | {"labels": {"sex": "unknown", "age": "40"}})
    assert dataset.PatientSex == "" and "PatientAge" not in dataset


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dicom3tools")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("burn_label", [False, True])
def test_a_validator_finds_no_error(tmp_path: Path, dtype: type, burn_label: bool) -> None:
    read(tmp_path, film(1, dtype), FULL, burn_label)
    said = subprocess.run(["dciodvfy", tmp_path / "film.dcm"], capture_output=True, text=True).stderr
    assert "SCImage" in said
    assert [line for line in said.splitlines() if line.startswith("Error") and NEWER not in line] == []
