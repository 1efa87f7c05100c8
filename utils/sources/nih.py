"""NIH ChestX-ray14: 112,120 frontal films of 30,805 patients, with labels but without reports."""

import re
from collections.abc import Callable

from utils.captions import caption
from utils.films import Film
from utils.metadata import MAX_AGE, parse_table, path_fault
from utils.refusal import Refused

NAME = "nih"
LICENSE = "NIH ChestX-ray14: unrestricted use with attribution"
RESTRICTED = False
TERMS = """\
NIH ChestX-ray14 may be used without restriction. Its publisher asks you to
  - link to the original download site: https://nihcc.app.box.com/v/ChestXray-NIHCC
  - acknowledge the NIH Clinical Center as the provider of the data
  - cite Wang et al., "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised
    Classification and Localization of Common Thorax Diseases", CVPR 2017.
Its labels were mined from reports by software; "No Finding" does not mean that the film is normal."""
EXAMPLE = "python download.py --source nih --mirror FOLDER_OR_ADDRESS"

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the later one has the impossible ages corrected
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")


def list_films(mirror: str | None, read_file: Callable[[str], bytes | None]) -> list[Film]:
    """Return all films of the published table, in its order.

    Args:
        mirror: where the table lies, with the films in `images/`.
        read_file: gives a file below the mirror as bytes, or None where there is none.

    Raises:
        Refused: without a mirror, without a table, or for a table that cannot be used.
    """
    if mirror is None:
        raise Refused(
            "--source nih needs --mirror: the films are 45 GB in archives at https://nihcc.app.box.com/v/ChestXray-NIHCC; "
            "unpack them and name the folder (or its address) that holds Data_Entry_2017_v2020.csv and images/"
        )
    for table in TABLES:
        content = read_file(table)
        if content is not None:
            # The header's "OriginalImage[Width,Height]" is two columns, and some copies end each line in a comma
            return [film_of(row, table) for row in parse_table(table, content, COLUMNS, extra_cells=True)]
    raise Refused(f"--mirror {mirror} holds no {' or '.join(TABLES)}; expected one beside the folder images/")


def film_of(row: dict[str, str], table: str) -> Film:
    """Return what one line of the table says."""
    name = row["Image Index"]
    fault = path_fault(name)
    if fault or "/" in name:
        raise Refused(f"{table}: Image Index {name!r} {fault or 'is a path'}; expected a plain file name")
    if not row["Patient ID"]:
        raise Refused(f"{table}: {name} has no Patient ID; without it no patient can be kept in one fold")
    view = row["View Position"].upper() or None
    age = age_in_years(row["Patient Age"])
    sex = row["Patient Gender"].upper() if row["Patient Gender"].upper() in ("M", "F") else None
    findings = finding_names(row["Finding Labels"])
    return Film(
        source_id=name,
        path=f"images/{name}",
        file_name=f"images/{name.rpartition('.')[0] or name}.png",
        text=caption(view, age, sex, findings),
        patient_id=f"nih-{row['Patient ID'].lstrip('0') or 0}",
        findings=findings,
        view=view,
        age=age,
        sex=sex,
    )


def age_in_years(text: str) -> int | None:
    """Return the age written as "58", "058Y", "011M" or "020D", None where it is missing or cannot be true."""
    match = re.fullmatch(r"(\d{1,4})([YMD]?)", text.upper())
    if match is None:
        return None
    number, unit = int(match[1]), match[2]
    years = number // {"M": 12, "D": 365}.get(unit, 1)
    return years if years <= MAX_AGE else None


def finding_names(labels: str) -> list[str] | None:
    """Return the labels of "Edema|Pleural_Thickening" as ["Edema", "Pleural thickening"]; "No Finding" is []."""
    names = {name.strip().replace("_", " ").capitalize() for name in labels.split("|")} - {"", "No finding"}
    return sorted(names) if labels else None
