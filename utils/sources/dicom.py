"""DICOM films of your own, from a scanner or an archive, with one table of captions, reports or labels."""

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom
from pydicom.multival import MultiValue
from tqdm import tqdm

from utils.captions import caption
from utils.dicom import is_dicom
from utils.films import FRONTAL_VIEWS, UNKNOWN_VIEW, VIEWS, Film
from utils.metadata import MAX_AGE, SEXES, finding_names, holds_labels, parse_table, renamed
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import text_of
from utils.sources.folder import find_table

NAME = "dicom"
COUNT, SIZE, TEXT = "your own", "", "captions, reports or labels"
LICENSE = "as granted by whoever provided the films"
RESTRICTED = False
IDENTIFYING = True  # ids and file names may tell who the patients are: they are replaced by keyed hashes
TERMS = """\
Your own films, your own responsibility: see that you may use them in this way, and that reports and pixels do not tell who
the patients are. Of a DICOM header view, age in years and sex are kept; patients and files get random names, whose key stays
in the cache folder. Films whose header or pixels say that text is burned in are marked, not changed."""
EXAMPLE = "python download.py --source dicom --mirror FOLDER (DICOM files in it or below, and one *.csv or *.jsonl)"

# What of a header is read at all
TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID", "PatientAge", "PatientSex",
    "PatientBirthDate", "StudyDate", "Modality", "ViewPosition", "PatientOrientation", "PresentationIntentType",
)  # fmt: skip
KEYS = (
    "file_name",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "AccessionNumber",
    "PatientID",
)  # what a table can be joined by
TEXT_COLUMNS = ("text", "report", "impression", "findings", "labels")
RADIOGRAPHS = ("CR", "DX", "DR", "RG", "XA", "RF", "SC", "OT")  # digitised and exported films come as the last two
DIRECTORY = "1.2.840.10008.1.3.10"  # a DICOMDIR, which lists files and is none
DECUBITUS = ("LLD", "RLD")  # lying on a side
OLDEST = 90  # years: who is older is so rare as to be known by it (45 CFR 164.514)


@dataclass(frozen=True)
class Header:
    """What is read of one file: its path below the mirror, and elements by keyword, "" where they are missing."""

    path: str
    elements: dict[str, str]


@dataclass(frozen=True)
class Words:
    """The table of a folder: its rows by key, the column that they are joined by, and the one that has the words."""

    rows: dict[str, dict]
    key: str
    column: str


def list_films(mirror: Mirror) -> list[Film]:
    """Return the DICOM films of a folder by path, and rows of the table that no file is for; ids are still those of the files.

    Args:
        mirror: a local folder with DICOM files under any name at any depth, and one table (*.csv or *.jsonl). Its rows are
            joined by the first of KEYS it has. The words are those of the caption column, else of the first of
            TEXT_COLUMNS: `labels` ("Edema|Effusion") make a sentence, the others are read as `reports.text_of` does.
            A column `patient_id` takes the place of the files' own.

    Raises:
        Refused: for an address, a folder without DICOM files or without one such table, or a table that matches no file.
    """
    if mirror.is_remote:
        raise Refused(f"--source dicom reads a local folder, not {mirror.place}; for an address use --source folder")
    words = read_words(mirror)
    headers = read_headers(Path(mirror.place))
    found = {key for header in headers if (key := key_of(header, words.key)) in words.rows}
    if not found:
        raise Refused(
            f"--mirror {mirror.place}: no {words.key} of the table is that of one of its {len(headers)} DICOM files"
        )
    films = [film_of(header, words) for header in headers]
    if any(film.patient_id for film in films):  # then one without could be anybody's
        films = [film if film.patient_id or film.fault else replace(film, fault="no patient id") for film in films]
    return films + [Film(f"row {key}", key, "", "", fault="not found") for key in words.rows if key not in found]


def read_words(mirror: Mirror) -> Words:
    """Return the table of a folder."""
    table = find_table(mirror)
    ours = mirror.theirs(file_name="image_column", patient_id="patient_column")
    caption_column = mirror.columns.get("caption_column")
    asked = [theirs for theirs, name in ours.items() if theirs != name] + ([caption_column] if caption_column else [])
    rows = [renamed(row, ours) for row in parse_table(table, mirror.read(table), asked)]
    key = next((key for key in KEYS if key in rows[0]), None)
    column = caption_column or next((column for column in TEXT_COLUMNS if column in rows[0]), None)
    if key is None or column is None:
        raise Refused(
            f"{table} has columns {', '.join(rows[0])}; expected one of {', '.join(KEYS)} and one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    by_key = {}
    for number, row in enumerate(rows, start=1):
        value = "" if row.get(key) is None else str(row[key]).strip()
        if not value:
            raise Refused(f"{table}, row {number}: no {key}; whose film it is cannot be told, leave the row out")
        if by_key.setdefault(value, row) is not row:
            raise Refused(f"{table}, row {number}: its {key} is there twice; leave one row out")
        if "patient_id" in row and not str(row["patient_id"] or "").strip():
            raise Refused(
                f"{table}, row {number}: its film has no patient_id; give one to every film or leave the column out"
            )
    if column == "findings" and "labels" not in rows[0] and any(holds_labels(row[column]) for row in rows):
        by_key = {value: renamed(row, {"findings": "labels"}) for value, row in by_key.items()}
        column = "labels"
    return Words(by_key, key, column)


def read_headers(directory: Path) -> list[Header]:
    """Return the headers of all DICOM files below a folder, by path."""
    paths = sorted(walk(directory))
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda path: read_header(path, directory), paths)
        headers = [
            header for header in tqdm(read, "headers", len(paths), unit="file", disable=None) if header is not None
        ]
    if not headers:
        raise Refused(f"--mirror {directory} holds no DICOM file; expected some in it or below")
    return headers


def walk(directory: Path) -> Iterator[Path]:
    """Yield all files below a folder, also through links, but no folder twice."""
    seen = set()
    for root, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if (real := os.path.realpath(os.path.join(root, name))) not in seen and not seen.add(real)
        ]
        yield from (Path(root, name) for name in names)


def read_header(path: Path, directory: Path) -> Header | None:
    """Return the header of a file, None of one that is no DICOM film; a damaged header has no elements."""
    if not is_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        if dataset.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY:
            return None
        elements = {tag: text_of_element(dataset.get(tag)) for tag in TAGS}
    except Exception:  # a damaged file makes pydicom raise almost anything; its film is rejected
        elements = dict.fromkeys(TAGS, "")
    name = path.relative_to(directory).as_posix()
    return Header(
        name.encode("utf-8", "backslashreplace").decode(), elements
    )  # bytes that are no UTF-8 cannot be noted


def text_of_element(value: object) -> str:
    """Return an element's value as in the file: several values with a backslash between them."""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str("" if value is None else value).strip()


def key_of(header: Header, key: str) -> str:
    """Return what a row of the table must have under `key` to be this file's."""
    return header.path if key == "file_name" else header.elements[key]


def film_of(header: Header, words: Words) -> Film:
    """Return what a header and its row of the table say of a film."""
    elements, row = header.elements, words.rows.get(key_of(header, words.key))
    view, age, sex = view_of(elements), age_of(elements), SEXES.get(elements["PatientSex"].upper())  # "O" is other
    findings = finding_names((row or {}).get("labels"))
    if row is None:
        text = ""
    elif words.column == "labels":
        text = caption(view, age, sex, findings, header.path) if findings is not None else ""
    else:
        text = text_of(row, words.column, caption(view, age, sex, None))
    patient_id = str((row or {}).get("patient_id") or elements["PatientID"]).strip()
    return Film(
        source_id=header.path,
        path=header.path,
        file_name=f"images/{header.path}.png",
        text=text,
        patient_id=patient_id.casefold() or None,
        findings=findings,
        view=view,
        age=age,
        sex=sex,
        fault="not in the table" if row is None else fault_of(elements),
    )


def fault_of(elements: Mapping[str, str]) -> str | None:
    """Return why a file is no film, None where it may be one; no other text of its header comes out."""
    modality = elements["Modality"].upper()
    if modality and modality not in RADIOGRAPHS:
        return f"modality {modality}" if re.fullmatch("[A-Z]{2,8}", modality) else "modality not known"
    if elements["PresentationIntentType"].upper() == "FOR PROCESSING":
        return "not for presentation"  # the detector's values, beside the film that was made of them
    # Not turned here: headers are wrong at times, and "left" in a caption must be left on the film
    row, _, column = elements["PatientOrientation"].upper().partition("\\")
    if view_of(elements) in FRONTAL_VIEWS and (row.strip()[:1] == "R" or column.strip()[:1] == "H"):
        return "mirrored or upside down by its header"
    return None


def view_of(elements: Mapping[str, str]) -> str:
    """Return the view by View Position, else by the axes of Patient Orientation: left to right is frontal."""
    view = VIEWS.get(elements["ViewPosition"].upper())
    if elements["ViewPosition"].upper() in DECUBITUS:
        return UNKNOWN_VIEW
    if view is None:
        row_axis = elements["PatientOrientation"].partition("\\")[0].strip().upper()[:1]
        view = "FRONTAL" if row_axis in ("L", "R") else "LATERAL" if row_axis in ("A", "P") else UNKNOWN_VIEW
    return view


def age_of(elements: Mapping[str, str]) -> int | None:
    """Return the age in years, 90 at most, written as "058Y", "011M", "006W" or "020D", or from dates of birth and study."""
    text = elements["PatientAge"].upper()
    if text[:-1].isdecimal() and text[-1:] in ("Y", "M", "W", "D"):
        years = int(text[:-1]) // {"Y": 1, "M": 12, "W": 52, "D": 365}[text[-1]]
    else:
        birth, study = elements["PatientBirthDate"], elements["StudyDate"]
        if not (len(birth) == len(study) == 8 and birth.isdecimal() and study.isdecimal()):
            return None
        years = int(study[:4]) - int(birth[:4]) - (study[4:] < birth[4:])
    return min(years, OLDEST) if 0 <= years <= MAX_AGE else None
