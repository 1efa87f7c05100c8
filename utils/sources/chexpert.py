"""CheXpert, Stanford: 223,414 films of 64,540 patients with labels, and with the reports where CheXpert Plus is at hand."""

import re

from utils.captions import caption
from utils.films import UNKNOWN_VIEW, Film
from utils.metadata import parse_table, path_fault
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import caption_of
from utils.sources.folder import age_in_years

NAME = "chexpert"
COUNT, SIZE, TEXT = "223,414", "439 GB, small 11 GB", "labels; reports with CheXpert Plus"
LICENSE = "Stanford University Dataset Research Use Agreement"
RESTRICTED = True
TERMS = """\
CheXpert (Irvin et al., AAAI 2019) and CheXpert Plus (Chambon et al., 2024) are given to registered researchers under the
Stanford University Dataset Research Use Agreement: no commercial use, no passing on, no attempt to tell who a patient is. Ask
for them at https://aimi.stanford.edu/datasets, unpack them yourself, and name the folder with --mirror. Nothing is downloaded."""
EXAMPLE = (
    "python download.py --source chexpert --accept_license --mirror FOLDER (with train.csv, or df_chexpert_plus_*.csv)"
)

TABLES = ("train.csv", "valid.csv")
PLUS = "df_chexpert_plus_*.csv"
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
PLUS_COLUMNS = ("path_to_image", "section_findings", "section_impression", "frontal_lateral", "ap_pa")
SEXES = {"Male": "M", "Female": "F"}


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the tables, in their order.

    Args:
        mirror: a folder with `train.csv` (and `valid.csv`) of CheXpert beside `train/`, or with the table of CheXpert Plus
            beside its folder of PNGs. Where both are there, the reports are taken.

    Raises:
        Refused: without such a table, or for one that cannot be used.
    """
    names = [] if mirror.is_remote else sorted(path.name for path in mirror.path("").glob(PLUS))
    plus = next(iter(names), None)
    if plus is not None:
        return [plus_film(row, plus) for row in parse_table(plus, mirror.read(plus), PLUS_COLUMNS)]
    tables = {name: content for name in TABLES if (content := mirror.read(name)) is not None}
    if not tables:
        raise Refused(f"--mirror {mirror.place} holds neither {TABLES[0]} nor {PLUS}; {EXAMPLE}")
    return [film_of(row, table) for table in tables for row in parse_table(table, tables[table], COLUMNS)]


def film_of(row: dict[str, str], table: str) -> Film:
    """Return what one line of CheXpert's own table says.

    What is uncertain (-1) or not mentioned is in no caption, and only "No Finding" makes one without finding.
    """
    _, _, path = row["Path"].partition("/")  # of "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    labels = {name: value for name, value in row.items() if name not in COLUMNS}
    positive = sorted(name.capitalize() for name, value in labels.items() if value in ("1.0", "1"))
    # "Pleural other" says nothing that a caption could
    findings = [name for name in positive if name not in ("No finding", "Pleural other")]
    findings = findings or ([] if "No finding" in positive else None)
    patient = patient_of(path, table)
    view, age, sex = view_of(row["AP/PA"], row["Frontal/Lateral"]), age_in_years(row["Age"]), SEXES.get(row["Sex"])
    return Film(
        source_id=path,
        path=path,
        file_name=f"images/{path.rpartition('.')[0].replace('/', '_')}.png",
        text=caption(view, age or None, sex, findings, path) if findings is not None else "",
        patient_id=f"chexpert-{patient}",
        findings=findings,
        view=view,
        age=age or None,  # 0 stands for not known
        sex=sex,
    )


def plus_film(row: dict[str, str], table: str) -> Film:
    """Return what one line of the table of CheXpert Plus says; its films are PNGs under the names of the JPEGs."""
    path = f"PNG/{row['path_to_image'].rpartition('.')[0]}.png"
    patient = patient_of(path, table)
    cells = (row[f"section_{name}"].strip() for name in ("findings", "impression"))
    findings, impression = ("" if cell == "nan" else " ".join(cell.split()) for cell in cells)
    view, age, sex = (
        view_of(row["ap_pa"], row["frontal_lateral"]), age_in_years(row.get("age")), SEXES.get(row.get("sex", ""))
    )  # fmt: skip
    return Film(
        source_id=row["path_to_image"],
        path=path,
        file_name=f"images/{row['path_to_image'].rpartition('.')[0].replace('/', '_')}.png",
        text=caption_of(caption(view, age or None, sex, None), findings, impression),
        patient_id=f"chexpert-{patient}",
        view=view,
        age=age or None,
        sex=sex,
    )


def view_of(projection: str, side: str) -> str:
    """Return the view: "AP" or "PA" of frontal films, of which some have none."""
    if side.strip().lower() == "lateral":
        return "LATERAL"
    if projection.upper() in ("LL", "RL"):  # of films that are called frontal
        return "LATERAL"
    return projection.upper() if projection.upper() in ("AP", "PA") else "FRONTAL" if side else UNKNOWN_VIEW


def patient_of(path: str, table: str) -> str:
    """Return the number of a patient in a path; refuse a path that has none or climbs out of its folder."""
    match = re.search(r"(?:^|/)patient(\d+)/", path)
    if match is None or path_fault(path):
        raise Refused(f"{table}: {path!r} is no path of CheXpert; expected .../patient00001/study1/view1_frontal.jpg")
    return match[1]
