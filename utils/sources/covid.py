"""COVID-19 image data collection: films out of publications, of some 470 patients with COVID-19 and other pneumonias."""

import re
from dataclasses import replace

from utils.captions import caption
from utils.films import UNKNOWN_VIEW, VIEWS, Film
from utils.folds import merge_groups
from utils.metadata import parse_table, path_fault
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.sources.folder import age_in_years, data_name

NAME = "covid-chestxray"
COUNT, SIZE, TEXT = "about 900", "0.6 GB", "labels"
LICENSE = "of each film its own; some CC BY-NC-SA, some unknown"
RESTRICTED = True
TERMS = """\
The COVID-19 image data collection (Cohen et al., arXiv:2006.11988, https://github.com/ieee8023/covid-chestxray-dataset) was
gathered from publications. Each film has the licence of its own, which is noted in its row; many forbid commercial use
(CC BY-NC-SA) or changes (CC BY-NC-ND), and of some no licence is known: those are not for passing on. Its labels are
diagnoses of the patients, which a film need not show; its clinical notes tell patients' histories and are not used."""
EXAMPLE = "python download.py --source covid-chestxray --accept_license"

MIRROR = "https://raw.githubusercontent.com/ieee8023/covid-chestxray-dataset/HEAD"
TABLE = "metadata.csv"
COLUMNS = ("patientid", "sex", "age", "finding", "view", "modality", "folder", "filename", "license")


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the collection's table, in its order; CT and what else is no radiograph with its fault.

    Raises:
        Refused: without the table, or for one that cannot be used.
    """
    content = mirror.read(TABLE)
    if content is None:
        raise Refused(f"--mirror {mirror.place} holds no {TABLE}; expected it beside the folder images/")
    rows = parse_table(TABLE, content, COLUMNS, extra_cells=True)
    # One film under two patients: they are one, or the film of one was taken for that of the other
    first = {}
    twice = [(first.setdefault(row["filename"], number), number) for number, row in enumerate(rows)]
    patients = merge_groups([row["patientid"] for row in rows], twice)
    films, seen = [], set()
    for row, patient in zip(rows, patients, strict=True):
        film = film_of({**row, "patientid": patient})
        if film.source_id in seen:
            film = replace(
                film, source_id=f"{film.source_id}, again as film {len(films) + 1}", fault="in the table twice"
            )
        seen.add(film.source_id)
        films.append(film)
    return films


def film_of(row: dict[str, str]) -> Film:
    """Return what one line of the table says."""
    path = f"{row['folder'] or 'images'}/{row['filename']}"
    if path_fault(path):
        raise Refused(f"{TABLE}: filename {row['filename']!r} {path_fault(path)}; expected a plain file name")
    view = VIEWS.get(row["view"].upper(), UNKNOWN_VIEW)
    age, sex = age_in_years(row["age"]), row["sex"] if row["sex"] in ("M", "F") else None
    findings = finding_names(row["finding"])
    return Film(
        source_id=row["filename"],
        path=path,
        file_name=data_name(row["filename"]),
        text=caption(view, age, sex, findings, row["filename"]) if findings is not None else "",
        patient_id=f"covid-{row['patientid']}" if row["patientid"] else None,
        findings=findings,
        view=view,
        age=age,
        sex=sex,
        license=row["license"] or "unknown",
        fault=None if row["modality"] == "X-ray" else f"modality {row['modality'] or 'unknown'}",
    )


def finding_names(finding: str) -> list[str] | None:
    """Return ["COVID-19 pneumonia"] of "Pneumonia/Viral/COVID-19", [] of "No Finding", None where nobody has looked yet."""
    if "todo" in finding.casefold() or finding.casefold() in ("", "unknown"):
        return None
    names = set()
    for name in re.split(r"\s*,\s*", finding):
        first, _, last = name.partition("/")
        last = last.rpartition("/")[2]
        names.add(f"{last} {first.lower()}" if last and first == "Pneumonia" else last or first)
    return sorted(names - {"No Finding"})
