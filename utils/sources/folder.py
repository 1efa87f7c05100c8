"""Films of your own: a folder, or an address, with one table that names them."""

import hashlib
import re
from pathlib import Path

from utils.films import Film, view_named
from utils.metadata import MAX_AGE, MAX_NAME_BYTES, SEXES, finding_names, parse_table, path_fault, renamed
from utils.mirror import Mirror
from utils.refusal import Refused

NAME = "folder"
COUNT, SIZE, TEXT = "your own", "", "yours"
LICENSE = "as granted by whoever provided the films"
RESTRICTED = False
TERMS = """\
Your own films, your own responsibility: see that you may use them in this way, and that neither the films nor the
table tell who the patients are."""
EXAMPLE = "python download.py --source folder --mirror FOLDER_OR_ADDRESS"

TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
SUFFIX = re.compile(r"\.(?:png|jpe?g|jp2|tiff?|bmp|gif|webp|dcm|dicom|ima)$", re.IGNORECASE)  # others may be of a name
KNOWN = (*COLUMNS, "patient_id", "findings", "view", "age", "sex", "sha256", "borders", "geometry")


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the table, in its order.

    Args:
        mirror: holds the table (`metadata.jsonl` or `metadata.csv`; in a folder any single *.csv or *.jsonl) and,
            below it, the films. Its `columns` say where the table has other names than ours.

    Raises:
        Refused: without exactly one table, or for a table that cannot be used.
    """
    table = find_table(mirror)
    ours = mirror.theirs(file_name="image_column", text="caption_column", patient_id="patient_column")
    asked = [theirs for theirs, name in ours.items() if name in COLUMNS or theirs != name]
    rows = parse_table(table, mirror.read(table), asked)
    used = {*ours, *KNOWN} - (set(ours.values()) - set(ours))
    if unused := [column for column in dict.fromkeys(column for row in rows for column in row) if column not in used]:
        print(f"{table}: not used: {', '.join(unused)}; used where they are there: {', '.join(KNOWN[:7])}", flush=True)
    rows = [renamed(row, ours) for row in rows]
    films = [film_of(row, table) for row in rows]
    for column in ("age", "sex"):
        cells = [row.get(column) for row, film in zip(rows, films, strict=True) if getattr(film, column) is None]
        if lost := [cell for cell in cells if str(cell or "").strip()]:
            print(f"{table}: {column} is not understood in {len(lost)} of {len(rows)} rows, such as {lost[0]!r}; expected "
                  f"{'years' if column == 'age' else 'M or F'}. Captions and figures do without", flush=True)  # fmt: skip
    return films


def find_table(mirror: Mirror) -> str:
    """Return the name of the one table below the mirror."""
    if mirror.is_remote:
        tables = [name for name in TABLES if mirror.read(name) is not None][:1]
        looked_for = " or ".join(TABLES)
    else:
        tables = sorted(path.name for path in Path(mirror.place).iterdir() if path.suffix in (".csv", ".jsonl"))
        tables = [name for name in tables if name in TABLES] or tables
        looked_for = "*.csv or *.jsonl"
    if len(tables) != 1:
        found = ", ".join(tables) or "none"
        raise Refused(
            f"--mirror {mirror.place}: expected one table ({looked_for}) with {' and '.join(COLUMNS)}, found {found}"
        )
    return tables[0]


def film_of(row: dict, table: str) -> Film:
    """Return what one line of the table says; what is written in an unknown way counts as not known."""
    name = row["file_name"]
    fault = path_fault(name)
    if fault:
        raise Refused(f"{table}: file_name {name!r} {fault}; expected a path below the mirror, written with /")
    text = " ".join(str(row["text"] or "").split())
    if not text:
        raise Refused(f"{table}: {name} has no text; every film needs a caption")
    patient_id = None if row.get("patient_id") is None else str(row["patient_id"]).strip()
    if "patient_id" in row and not patient_id:
        raise Refused(f"{table}: {name} has no patient_id; give one to every film or leave the column out")
    return Film(
        source_id=name,
        path=name,
        file_name=data_name(name),
        text=text,
        patient_id=patient_id,
        findings=finding_names(row.get("findings")),
        view=view_named(row.get("view")),
        age=age_in_years(row.get("age")),
        sex=SEXES.get(str(row.get("sex") or "").strip().upper()),
        sha256=file_hash(row.get("sha256")),
        is_prepared=True if {"borders", "geometry"} <= set(row) else None,
    )


def file_hash(value: object) -> str | None:
    """Return a SHA-256 as 64 small hexadecimal digits, None where the cell holds anything else."""
    digits = str(value or "").strip().lower()
    return digits if re.fullmatch("[0-9a-f]{64}", digits) else None


def data_name(name: str) -> str:
    """Return the name in the data folder: "images/a/b.jpg" and "a/b.jpg" become "images/a_b.png"."""
    flat = name.removeprefix("images/").replace("/", "_")
    flat = SUFFIX.sub("", flat) or flat
    if len(flat.encode()) > MAX_NAME_BYTES:  # of deep folders named after UIDs
        flat = f"{flat[:40]}_{hashlib.sha256(flat.encode()).hexdigest()[:16]}"
    return f"images/{flat}.png"


def age_in_years(value: object) -> int | None:
    """Return the age as a whole number of years, None where it is missing or cannot be true."""
    try:
        age = int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return age if 0 <= age <= MAX_AGE else None
