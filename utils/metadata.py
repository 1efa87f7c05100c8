"""The data folder: a Hugging Face *imagefolder* whose table is read with suspicion.

`metadata.jsonl` has one row a film, see `read_metadata`; `utils/check.py` compares a whole folder with its records.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from utils.files import canonical_json, sha256_file
from utils.refusal import Refused

MAX_AGE = 110  # years; published tables have ages above 400
MAX_NAME_BYTES = 200
TABLES = ("metadata.jsonl", "metadata.csv")
SEXES = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F"}
NO_FINDING = ("", "no finding", "no findings", "normal", "none", "nan")  # names of findings that are none


def parse_table(name: str, content: bytes, columns: Collection[str], extra_cells: bool = False) -> list[dict]:
    """Return the rows of a table, by column; cells of a CSV table are stripped strings.

    Args:
        name: of the table, ends in `.csv` or `.jsonl`.
        content: the file, UTF-8.
        columns: that every row must have.
        extra_cells: whether a CSV line may have more cells than the header.

    Raises:
        Refused: for what is no such table, lacks columns or has no rows; the message names table and line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"{name} is not text in UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)") from None
    rows = list(
        csv_rows(name, text, columns, extra_cells) if name.endswith(".csv") else json_rows(name, text, columns)
    )
    if not rows:
        raise Refused(f"{name} has no rows; expected one a film")
    return rows


def csv_rows(name: str, text: str, columns: Collection[str], extra_cells: bool) -> Iterator[dict]:
    """Yield the rows of a CSV table."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = header
        if len(header) == 1 and (separators := re.findall("[;\t]", header[0])):
            raise Refused(f"{name}: columns are separated by {separators[0]!r}; save it with commas")
        if twice := [column for column, count in Counter(header).items() if column and count > 1]:
            raise Refused(f"{name} has the column {twice[0]} twice; leave one out")
        require_columns(name, header, columns)
        for row in reader:
            if None in row and not extra_cells:
                raise Refused(
                    f"{name}, line {reader.line_num}: more cells than columns; put text with commas in quotes"
                )
            if None in row.values():
                raise Refused(f"{name}, line {reader.line_num}: fewer cells than columns")
            yield {column: cell.strip() for column, cell in row.items() if column}
    except csv.Error as error:
        raise Refused(f"{name}, line {reader.line_num}: {error}") from None


def json_rows(name: str, text: str, columns: Collection[str]) -> Iterator[dict]:
    """Yield the rows of a JSON lines table."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            canonical_json(row).encode()  # NaN and half characters could not be written again
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise Refused(f"{name}, line {number}: not a JSON object; expected one a line")
        require_columns(f"{name}, line {number}:", row, columns)
        for column, cell in row.items():
            if isinstance(cell, str) and len(cell) > csv.field_size_limit():  # as in a CSV table
                raise Refused(
                    f"{name}, line {number}: {column} has {len(cell)} characters; a cell may have {csv.field_size_limit()}"
                )
        yield row


def require_columns(where: str, found: Collection[str], columns: Collection[str]) -> None:
    """Refuse a table or row that lacks columns, naming them."""
    missing = [column for column in columns if column not in found]
    if missing:
        listed = ", ".join(str(column) for column in found) or "none"
        raise Refused(f"{where} lacks {', '.join(missing)}; it has {listed}")


def renamed(row: dict, ours: dict[str, str]) -> dict:
    """Return a row with columns under our names; one that has such a name already, unasked, is left out.

    Args:
        ours: our name of a column by the table's own, such as {"report": "text"}.
    """
    return {ours.get(name, name): cell for name, cell in row.items() if name in ours or name not in ours.values()}


def path_fault(name: object) -> str | None:
    """Return what is wrong with a path that should stay below its folder, None if nothing is."""
    if not isinstance(name, str) or not name.strip():
        return "is no name"
    if "\\" in name or not name.isprintable():
        return "has characters that file names cannot have everywhere"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/")):
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if name.startswith("/") or name[1:2] == ":":
        return "is an absolute path"
    if ".." in name.split("/"):
        return "climbs out of its folder"
    if str(PurePosixPath(name)) != name:
        return "is not written plainly"
    return None


def read_metadata(directory: Path, image_column: str = "file_name", caption_column: str = "text") -> list[dict]:
    """Read and check the table of an imagefolder.

    Args:
        directory: holds `metadata.jsonl` or `metadata.csv`.
        image_column: has the path of the image below `directory`; "image", the name that datasets gives the decoded
            column, means `file_name`.
        caption_column: has the caption.

    Returns:
        Rows sorted by file name. Each has file_name and text; patient_id (string), fold (integer), findings (list)
        or None where the table has none; and sha256 of the image file, computed where the table has none. Further
        columns are kept as they are.

    Raises:
        Refused: for anything that would spoil a training run; the message names the row.
    """
    rows = load_rows(directory, image_column, caption_column)
    for fault in row_faults(rows, directory):
        raise Refused(f"{directory}: {fault}")
    for row in rows:
        if not row.get("sha256"):
            row["sha256"] = sha256_file(directory / row["file_name"])
    return rows


def load_rows(directory: Path, image_column: str, caption_column: str) -> list[dict]:
    """Return the rows of the table with their columns under our names, sorted by file name."""
    if not directory.is_dir():
        raise Refused(f"there is no folder {directory}; make one with download.py or name another")
    tables = [name for name in TABLES if (directory / name).is_file()]
    if len(tables) != 1:
        found = "both" if tables else "neither"
        raise Refused(f"{directory} holds {found} of {' and '.join(TABLES)}; expected one, as download.py writes it")
    image_column = "file_name" if image_column == "image" else image_column
    content = (directory / tables[0]).read_bytes()
    rows = []
    for number, raw in enumerate(parse_table(tables[0], content, (image_column, caption_column)), start=1):
        row = renamed(raw, {image_column: "file_name", caption_column: "text"})
        fault = path_fault(row["file_name"])
        if fault:
            raise Refused(f"{directory / tables[0]}, row {number}: {image_column} {row['file_name']!r} {fault}")
        for column in ("patient_id", "group"):
            if column == "patient_id" or column in row:
                row[column] = None if row.get(column) is None else str(row[column]).strip() or None
        row["fold"] = fold_number(row.get("fold"), f"{directory / tables[0]}, row {number}")
        row["findings"] = findings_list(row.get("findings"))
        rows.append(row)
    return sorted(rows, key=lambda row: row["file_name"])


def fold_number(value: object, where: str) -> int | None:
    """Return a fold as an integer, None where there is none."""
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise Refused(f"{where}: fold {value!r} is no fold; expected 0, 1, 2, ...")
    return int(value)


def findings_list(value: object) -> list[str] | None:
    """Return findings as a list: a list in its order, a text as `finding_names` reads it, None where the cell is empty."""
    if isinstance(value, list):
        return [str(name) for name in value if str(name).strip().casefold() not in NO_FINDING]
    return finding_names(value)


def finding_names(value: object) -> list[str] | None:
    """Return findings given as a list, a JSON list or a text, by name; None where the cell is empty.

    In a text they are separated by | or ;, where it has neither by commas.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if isinstance(value, str) and value.strip():
        value = re.split("[|;]" if re.search("[|;]", value) else ",", value)
    if not isinstance(value, list):
        return None
    names = {str(name).strip() for name in value}
    return sorted(name for name in names if name.casefold() not in NO_FINDING)


def holds_labels(value: object) -> bool:
    """Return whether a cell called `findings` holds labels, as ours does, not the section of a report of that name."""
    if isinstance(value, list):
        return not any(str(name).rstrip().endswith(".") for name in value)  # else a list of sentences
    return isinstance(value, str) and ("|" in value or value.lstrip().startswith("["))


def row_faults(rows: Iterable[dict], directory: Path) -> Iterator[str]:
    """Yield what is wrong with rows that `load_rows` gave, a sentence each."""
    seen, folds, groups = set(), {}, {}
    for row in rows:
        name = row["file_name"]
        if name in seen:
            yield f"{name} is in the table twice"
        seen.add(name)
        if not isinstance(row["text"], str) or not row["text"].strip():
            yield f"{name} has no text"
        if not (directory / name).is_file():
            yield f"{name} is in the table but there is no such file"
        patient, group = row["patient_id"], row.get("group")
        for kind, value in (("patient", patient), ("group", group)):
            if value is not None and folds.setdefault((kind, value), row["fold"]) != row["fold"]:
                yield f"{kind} {value} is in folds {folds[kind, value]} and {row['fold']} ({name})"
        if None not in (patient, group) and groups.setdefault(patient, group) != group:
            yield f"patient {patient} is in groups {groups[patient]} and {group} ({name}); a group joins whole patients"


def dataset_hash(rows: Iterable[dict]) -> str:
    """Return a SHA-256 that changes with any image, text, patient, fold or box, but not with the order of rows."""
    keys = ("file_name", "text", "patient_id", "fold", "sha256")
    listed = sorted(
        ([*map(row.get, keys), *([row["boxes"]] if row.get("boxes") else [])] for row in rows),
        key=lambda values: values[0],
    )
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()
