"""DICOM films of your own, from a scanner or an archive, with one table of captions, reports or labels."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom
from tqdm import tqdm

from utils.captions import caption
from utils.dicom import is_dicom
from utils.films import UNKNOWN_VIEW, Film
from utils.metadata import MAX_AGE, parse_table
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import caption_sentences, sections_of
from utils.sources.folder import find_table, finding_names

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
    "PatientBirthDate", "StudyDate", "Modality", "ViewPosition", "PatientOrientation",
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
VIEWS = {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL", "LAT": "LATERAL"}


SEXES = {"M": "M", "F": "F"}  # "O" is other


@dataclass(frozen=True)
class Header:
    """What is read of one file: its path below the mirror, and elements by keyword, "" where they are missing."""

    path: str
    elements: dict[str, str]


def list_films(mirror: Mirror) -> list[Film]:
    """Return the DICOM films of a folder that the table has words for, by path; ids are still those of the files.

    Args:
        mirror: a local folder with DICOM files under any name at any depth, and one table (*.csv or *.jsonl). Its rows
            are joined by the first of KEYS it has. The words are those of `text`; of `report`; of `impression` and
            `findings`; or of `labels` ("Edema|Effusion"). It may have a `patient_id` for files whose own is empty.

    Raises:
        Refused: for an address, a folder without DICOM files or without one such table, or a table that matches no file.
    """
    if mirror.is_remote:
        raise Refused(f"--source dicom reads a local folder, not {mirror.place}; for an address use --source folder")
    table, key, rows = read_words(mirror)
    headers = read_headers(Path(mirror.place))
    matched = [header for header in headers if key_of(header, key) in rows]
    if not matched:
        raise Refused(
            f"{table}: no {key} is that of a DICOM file in {mirror.place}; one is {key_of(headers[0], key)!r}"
        )
    films = [film_of(header, rows.get(key_of(header, key))) for header in headers]
    if any(film.patient_id for film in films):  # then one without could be anybody's
        films = [film if film.patient_id or film.fault else replace(film, fault="no patient id") for film in films]
    return films


def read_words(mirror: Mirror) -> tuple[str, str, dict[str, dict]]:
    """Return the table's name, the key it is joined by, and its rows by that key."""
    table = find_table(mirror)
    ours = mirror.theirs(file_name="image_column", text="caption_column", patient_id="patient_column")
    asked = [theirs for theirs, name in ours.items() if theirs != name]
    rows = [
        {ours.get(column, column): cell for column, cell in row.items()}
        for row in parse_table(table, mirror.read(table), asked)
    ]
    key = next((key for key in KEYS if key in rows[0]), None)
    if key is None or not any(column in rows[0] for column in TEXT_COLUMNS):
        raise Refused(
            f"{table} has columns {', '.join(rows[0])}; expected one of {', '.join(KEYS)} and one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    by_key = {}
    for row in rows:
        value = str(row.get(key) or "").strip()
        if by_key.setdefault(value, row) is not row:
            raise Refused(f"{table}: {key} {value!r} is there twice; leave one row out")
    return table, key, by_key


def read_headers(directory: Path) -> list[Header]:
    """Return the headers of all DICOM files below a folder, by path."""
    paths = sorted(Path(root, name) for root, _, names in os.walk(directory) for name in names)
    with ThreadPoolExecutor() as pool:
        headers = [
            header
            for header in tqdm(
                pool.map(lambda path: read_header(path, directory), paths),
                "headers",
                len(paths),
                unit="file",
                disable=None,
            )
            if header is not None
        ]
    if not headers:
        raise Refused(f"--mirror {directory} holds no DICOM file; expected some in it or below")
    return headers


def read_header(path: Path, directory: Path) -> Header | None:
    """Return the header of a file, None of one that is no DICOM film; a damaged header has no elements."""
    if not is_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        if dataset.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY:
            return None
        elements = {tag: dataset.get(tag) for tag in TAGS}
    except Exception:  # a damaged file makes pydicom raise almost anything; its film is rejected when it is decoded
        elements = dict.fromkeys(TAGS)
    texts = {
        tag: "\\".join(map(str, value))
        if isinstance(value, (list, tuple)) or hasattr(value, "append")
        else str(value or "")
        for tag, value in elements.items()
    }
    return Header(path.relative_to(directory).as_posix(), texts)


def key_of(header: Header, key: str) -> str:
    """Return what a row of the table must have under `key` to be this file's."""
    return header.path if key == "file_name" else header.elements[key].strip()


def film_of(header: Header, row: Mapping | None) -> Film:
    """Return what a header and its row of the table say of a film."""
    elements = header.elements
    view, age, sex = view_of(elements), age_of(elements), SEXES.get(elements["PatientSex"].strip().upper())
    findings = finding_names((row or {}).get("labels"))
    modality = elements["Modality"].upper()
    patient_id = str((row or {}).get("patient_id") or "").strip() or elements["PatientID"].strip()
    return Film(
        source_id=header.path,
        path=header.path,
        file_name=f"images/{header.path}.png",
        text=words_of(row, view, age, sex, findings, header.path) if row else "",
        patient_id=patient_id or None,
        findings=findings,
        view=view,
        age=age,
        sex=sex,
        fault=f"modality {modality}"
        if modality and modality not in RADIOGRAPHS
        else None
        if row
        else "not in the table",
    )


def words_of(row: Mapping, view: str, age: int | None, sex: str | None, findings: list[str] | None, film: str) -> str:
    """Return the caption that a row gives: its text as it is, its report cleaned, or its labels as a sentence."""
    if "text" in row:
        return " ".join(str(row["text"] or "").split())
    if "report" in row or "impression" in row or "findings" in row:
        sections = sections_of(str(row["report"] or "")) if "report" in row else row
        sentences = caption_sentences(str(sections.get("findings") or ""), str(sections.get("impression") or ""))
        return " ".join([caption(view, age, sex, None), *sentences]) if sentences else ""
    return caption(view, age, sex, findings, film) if findings is not None else ""


def view_of(elements: Mapping[str, str]) -> str:
    """Return the view by View Position, else by the axes of Patient Orientation: left to right is frontal."""
    view = VIEWS.get(elements["ViewPosition"].strip().upper())
    if view is None:
        row_axis = elements["PatientOrientation"].partition("\\")[0].strip().upper()[:1]
        view = "FRONTAL" if row_axis in ("L", "R") else "LATERAL" if row_axis in ("A", "P") else UNKNOWN_VIEW
    return view


def age_of(elements: Mapping[str, str]) -> int | None:
    """Return the age in years, written as "058Y", "011M", "006W" or "020D", or from the dates of birth and study."""
    text = elements["PatientAge"].strip().upper()
    if text[:-1].isdecimal() and text[-1:] in "YMWD":
        years = int(text[:-1]) // {"Y": 1, "M": 12, "W": 52, "D": 365}[text[-1]]
    else:
        birth, study = elements["PatientBirthDate"], elements["StudyDate"]
        if not (len(birth) == len(study) == 8 and birth.isdecimal() and study.isdecimal()):
            return None
        years = int(study[:4]) - int(birth[:4]) - (study[4:] < birth[4:])
    return years if 0 <= years <= MAX_AGE else None
