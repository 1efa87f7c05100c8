"""PadChest, Hospital San Juan, Alicante: 160,861 films of 67,625 patients, with labels and where in the chest they are."""

import ast
import re
from collections.abc import Collection

from utils.captions import capitalised, caption, describe_findings
from utils.films import UNKNOWN_VIEW, Film
from utils.metadata import MAX_AGE, parse_table, path_fault
from utils.mirror import Mirror
from utils.refusal import Refused

NAME = "padchest"
COUNT, SIZE, TEXT = "160,861", "1 TB", "labels with their place"
LICENSE = "PadChest Dataset Research Use Agreement"
RESTRICTED = True
TERMS = """\
PadChest (Bustos et al., Medical Image Analysis 2020) is given for research under the PadChest Dataset Research Use Agreement:
no commercial use, no passing on, no attempt to tell who a patient is. Ask for it at
https://bimcv.cipf.es/bimcv-projects/padchest, keep its zip archives or unpack them, and name the folder with --mirror. Nothing
is downloaded. Its reports are in Spanish, reduced to stems, and are not used; three labels in four were read by software."""
EXAMPLE = (
    "python download.py --source padchest --accept_license --mirror FOLDER (with the table and 0.zip, 1.zip, ...)"
)

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = (
    "ImageID", "ImageDir", "StudyDate_DICOM", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection", "Labels",
    "LabelsLocalizationsBySentence",
)  # fmt: skip
VIEWS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP", "L": "LATERAL", "COSTAL": "COSTAL"}
SIDES = {" left side": "loc left", " right side": "loc right", " both sides": "loc bilateral"}
WRITTEN_OUT = {"dai": "implantable defibrillator"}  # the Spanish abbreviation
NO_FINDING = {"", "normal", "unchanged", "exclude", "suboptimal study"}


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the table, in its order.

    Args:
        mirror: a folder with the table (packed or not), and the films in `0.zip` and so on, unpacked in `0/` and so on
            or `images/0/` and so on, or all in `images/`.

    Raises:
        Refused: without the table, or for one that cannot be used.
    """
    content = mirror.read_packed(TABLE)
    if content is None:
        raise Refused(f"--mirror {mirror.place} holds no {TABLE} or {TABLE}.gz; expected it beside the films")
    rows = parse_table(TABLE, content, COLUMNS)
    layouts = ("images/{ImageID}", "images/{ImageDir}/{ImageID}", "{ImageDir}/{ImageID}")
    there = (layout for row in rows for layout in layouts if mirror.path(layout.format(**row)).is_file())
    unpacked = mirror.path("images").is_dir()
    layout = next(there, layouts[-1]) if unpacked else layouts[-1]
    return [film_of(row, layout) for row in rows]


def film_of(row: dict[str, str], layout: str) -> Film:
    """Return what one line of the table says; `layout` is where films lie unpacked."""
    name, folder = row["ImageID"], row["ImageDir"]
    fault = path_fault(f"{folder}/{name}")
    if fault or "/" in name or not folder.isdecimal():
        raise Refused(f"{TABLE}: ImageID {name!r} in {folder!r} {fault or 'is a path'}; expected a plain file name")
    groups, excluded = label_groups(row)
    findings = sorted({label for labels, _ in groups for label in labels})
    labels = listed(row["Labels"])
    is_known = bool(groups) or ("normal" in labels and "unchanged" not in labels)  # as what it was, is not said
    view, age = VIEWS.get(row["Projection"], UNKNOWN_VIEW), age_in_years(row)
    sex = row["PatientSex_DICOM"] if row["PatientSex_DICOM"] in ("M", "F") else None
    sentences = [caption(view, age, sex, None if groups else [], name), *map(sentence, groups)]
    return Film(
        source_id=name,
        path=layout.format(**row),
        file_name=f"images/{name.rpartition('.')[0] or name}.png",
        text=" ".join(dict.fromkeys(sentences)) if is_known else "",
        patient_id=f"padchest-{row['PatientID']}" if row["PatientID"] not in ("", "nan") else None,
        findings=findings if is_known else None,
        view=view,
        age=age,
        sex=sex,
        archive=f"{folder}.zip",
        fault="excluded by its owner" if excluded or row["Projection"] == "EXCLUDE" else None,
    )


def label_groups(row: dict[str, str]) -> tuple[list[tuple[list[str], list[str]]], bool]:
    """Return for each sentence of the report its findings and where they are, and whether the film was excluded.

    What is normal and what says nothing of this film ("unchanged") is left out. Where sentences are not kept apart, it is
    not known what is where: then the findings stand alone.
    """
    labels, groups = (listed(row[column]) for column in ("Labels", "LabelsLocalizationsBySentence"))
    if not all(isinstance(group, list) for group in groups):
        groups = [labels]
    groups = [[part for name in group for part in label_and_side(str(name).strip(), labels)] for group in groups]
    if not {name for group in groups for name in group} >= set(labels):
        groups = [labels]  # sentences that have lost some of their labels
    found = []
    for group in groups:
        names = list(dict.fromkeys(WRITTEN_OUT.get(name, name) for name in group))
        findings = [name for name in names if not name.startswith("loc ") and name.casefold() not in NO_FINDING]
        if findings:
            found.append((findings, [name.removeprefix("loc ") for name in names if name.startswith("loc ")]))
    return found, "exclude" in labels


def label_and_side(name: str, labels: Collection[str]) -> list[str]:
    """Return a label of a sentence as the film's own `labels` have it, and the side that it names as a place of its own."""
    for ending, place in SIDES.items():
        if name not in labels and (label := name.removesuffix(ending)) in labels:
            return [label, place]
    return [name]


def listed(cell: str) -> list:
    """Return the list that a cell holds as Python writes it, its texts stripped, empty for what is none."""
    try:
        value = ast.literal_eval(re.sub(r"\bnan\b(?=\s*[,\]])", "''", cell))
    except (ValueError, SyntaxError):
        return []
    if not isinstance(value, list):
        return []
    return [name.strip() if isinstance(name, str) else name for name in value]


def sentence(group: tuple[list[str], list[str]]) -> str:
    """Return "Pleural effusion: right." of a finding and its place."""
    labels, places = group
    return f"{capitalised(describe_findings(labels))}{': ' if places else ''}{', '.join(places)}."


def age_in_years(row: dict[str, str]) -> int | None:
    """Return the year of the study less that of birth, None where one is missing or the age cannot be true."""
    try:
        age = int(row["StudyDate_DICOM"][:4]) - int(float(row["PatientBirth"]))
    except ValueError:
        return None
    return age if 0 <= age <= MAX_AGE else None
