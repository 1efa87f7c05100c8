"""Generated films as DICOM Secondary Capture (PS3.3 A.8.1), which says in several places that nobody was X-rayed.

For tests of archives and viewers. Each film is of a virtual patient and in a study of its own.
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from utils.files import canonical_json
from utils.provenance import DISCLAIMER

LABEL = "SYNTHETIC - NOT FOR DIAGNOSIS"
DERIVATION = ("base", "adapters", "scheduler", "num_inference_steps", "guidance_scale", "noise_seed", "versions")
LONGEST_TEXT = 1024  # characters of an ST element, the shortest that is used here
LONGEST_COMMENT = 10240  # of an LT element


def encode_dicom(film: np.ndarray, made: dict, burn_label: bool = False) -> bytes:
    """Return a film generated from text alone as a DICOM file; equal films give equal bytes, dates are empty.

    Args:
        film: grey, uint8 or uint16 [H, W], bright where dense.
        made: as in the film's PNG, see `provenance.encode_png`. Age and sex of its labels become the virtual patient's.
        burn_label: write LABEL into the film's lower margin.
    """
    if burn_label:
        film = with_label(film)
    digest = hashlib.sha256(canonical_json(made).encode() + film.tobytes()).hexdigest()
    labels = made["labels"]
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"

    # Patient, study, series
    dataset.PatientName, dataset.PatientID = f"SYNTHETIC^{digest[:8].upper()}", f"SYNTHETIC-{digest[:16].upper()}"
    dataset.PatientBirthDate, dataset.PatientSex = "", labels.get("sex") if labels.get("sex") in ("M", "F") else ""
    if isinstance(labels.get("age"), int):
        dataset.PatientAge = f"{labels['age']:03d}Y"
    dataset.PatientComments = DISCLAIMER
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = (
        generate_uid(entropy_srcs=[digest, level]) for level in ("study", "series", "instance")
    )
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = dataset.AccessionNumber = ""
    dataset.StudyID, dataset.StudyDescription = digest[:8].upper(), "Synthetic chest radiograph"
    dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = "OT", 1, "Synthetic, not for diagnosis"
    dataset.BodyPartExamined, dataset.ConversionType = "CHEST", "SYN"

    # Image
    dataset.SOPClassUID, dataset.InstanceNumber, dataset.PatientOrientation = SecondaryCaptureImageStorage, 1, ""
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.SyntheticData = "YES"
    dataset.BurnedInAnnotation = "YES" if burn_label else "NO"
    dataset.LossyImageCompression = "00"
    dataset.ContentDate = dataset.ContentTime = ""
    dataset.ImageComments = made["prompt"][:LONGEST_COMMENT]
    dataset.DerivationDescription = canonical_json({name: made[name] for name in DERIVATION})[:LONGEST_TEXT]

    # Pixels
    bits = film.dtype.itemsize * 8
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = film.shape
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (bits - 1), 2**bits
    pixels = film.astype("<u2" if bits == 16 else "u1").tobytes()
    dataset.add_new("PixelData", "OW", pixels + b"\0" * (len(pixels) % 2))

    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def with_label(film: np.ndarray) -> np.ndarray:
    """Return a film, uint8 or uint16 [H, W], with LABEL in white on black along its lower edge, in a legible size."""
    height, width = film.shape
    size = max(7, width // 32)
    strip = Image.new("L", (width, size + 4), 0)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=size)
    text = LABEL if font.getlength(LABEL) < width else LABEL.partition(" ")[0]
    draw.text((2, 1), text, fill=255, font=font)
    labelled = film.copy()
    labelled[-strip.height :] = np.asarray(strip).astype(film.dtype) * (257 if film.dtype == np.uint16 else 1)
    return labelled
