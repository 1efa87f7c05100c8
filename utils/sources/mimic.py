"""MIMIC-CXR, Beth Israel Deaconess, Boston: 377,110 films of 65,379 patients with the radiologist's report."""

import re
import zipfile
from dataclasses import replace

from utils.captions import caption
from utils.films import UNKNOWN_VIEW, VIEWS, Film
from utils.metadata import parse_table
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import caption_sentences, sections_of

NAME = "mimic-cxr"
COUNT, SIZE, TEXT = "377,110", "4.7 TB, JPEG 560 GB", "reports"
LICENSE = "PhysioNet Credentialed Health Data License 1.5.0"
RESTRICTED = True
TERMS = """\
MIMIC-CXR and MIMIC-CXR-JPG (Johnson et al., Scientific Data 2019) are given to credentialed users of PhysioNet who have signed
its data use agreement: no passing on, of models that may have memorised them neither, no attempt to tell who a patient is.
Ask for them at https://physionet.org/content/mimic-cxr and https://physionet.org/content/mimic-cxr-jpg, download them with your
own account, and name the folder with --mirror. Nothing is downloaded here."""
EXAMPLE = (
    "python download.py --source mimic-cxr --accept_license --mirror FOLDER (with files/, mimic-cxr-2.0.0-metadata.csv.gz and "
    "mimic-cxr-reports.zip)"
)

TABLE = "mimic-cxr-2.0.0-metadata.csv"
COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition")
LABELS = "mimic-cxr-2.0.0-chexpert.csv"
REPORTS = "mimic-cxr-reports.zip"


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the table, in its order; those whose report says nothing of them have no text.

    Findings are those that CheXpert's labeller found in the report, where its table is there.

    Args:
        mirror: a folder with `files/p10/p10000032/s50414267/<dicom_id>.jpg` (of MIMIC-CXR-JPG) or `.dcm` (of MIMIC-CXR), the
            table of metadata (which MIMIC-CXR-JPG has), and the reports, zipped or in `files/p10/p10000032/s50414267.txt`.

    Raises:
        Refused: without table or reports, or for a table that cannot be used.
    """
    table = mirror.read_packed(TABLE)
    if table is None:
        raise Refused(f"--mirror {mirror.place} holds no {TABLE}.gz; it comes with MIMIC-CXR-JPG. {EXAMPLE}")
    reports = mirror.open_zip(REPORTS)
    names = set() if reports is None else set(reports.namelist())
    labels = findings_of(mirror.read_packed(LABELS))
    films, captions = [], {}
    for row in parse_table(TABLE, table, COLUMNS):
        subject, study, image = row["subject_id"], row["study_id"], row["dicom_id"]
        if not (subject.isdecimal() and study.isdecimal() and re.fullmatch(r"[\w-]+", image)):
            raise Refused(f"{TABLE}: subject {subject!r}, study {study!r}, film {image!r} is no line of MIMIC-CXR")
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        if study not in captions:  # films of one study share a report
            captions[study] = caption_of(read_report(mirror, reports, names, f"{folder}.txt"))
        view = VIEWS.get(row["ViewPosition"].upper(), UNKNOWN_VIEW)
        films.append(
            Film(
                source_id=image,
                path=f"{folder}/{image}",
                file_name=f"images/{image}.png",
                text=f"{caption(view, None, None, None)} {captions[study]}" if captions[study] else "",
                patient_id=f"mimic-{subject}",
                findings=labels.get(study),
                view=view,
            )
        )
    if not any(film.text for film in films):
        raise Refused(
            f"--mirror {mirror.place} holds no reports; expected {REPORTS}, or files/p10/p10000032/s50414267.txt"
        )
    suffix = suffix_of(mirror, films)
    return [replace(film, path=film.path + suffix) for film in films]


def read_report(mirror: Mirror, reports: zipfile.ZipFile | None, names: set[str], path: str) -> str:
    """Return a report, "" where there is none."""
    content = reports.read(path) if path in names else mirror.read(path)
    return (content or b"").decode("utf-8", "replace")


def caption_of(report: str) -> str:
    """Return what a report says of its films."""
    sections = sections_of(report)
    return " ".join(caption_sentences(sections["findings"], sections["impression"]))


def findings_of(content: bytes | None) -> dict[str, list[str]]:
    """Return the findings of each study that has any, or has "No Finding"; what is uncertain (-1) is left out."""
    findings = {}
    for row in parse_table(LABELS, content, ("study_id",)) if content is not None else ():
        positive = sorted(
            name.capitalize() for name, value in row.items() if value == "1.0" and not name.endswith("_id")
        )
        if positive:
            findings[row["study_id"]] = [name for name in positive if name != "No finding"]
    return findings


def suffix_of(mirror: Mirror, films: list[Film]) -> str:
    """Return the suffix of the films that are there: those of one delivery are all of one kind."""
    there = (
        suffix
        for film in films
        for suffix in (".jpg", ".dcm", ".png")
        if mirror.path(f"{film.path}{suffix}").is_file()
    )
    return ".jpg" if mirror.is_remote else next(there, ".jpg")
