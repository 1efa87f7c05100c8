"""What an interrupted run has finished, so that the same command goes on from there.

The journal lies in the cache folder, not among the data. Its first line says what set the data folder is to hold,
every other what one finished film was made from.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import IO

from utils.files import hold_lock, read_jsonl, sha256_file, write_jsonl
from utils.films import Film
from utils.refusal import Refused

SAID = {"table_sha256": "its table is another", "key": "its pseudonyms are of another key"}


def journal_path(cache_dir: Path, output_dir: Path) -> Path:
    """Return where the finished films of a data folder are noted."""
    key = hashlib.sha256(os.fsencode(output_dir.resolve())).hexdigest()[:16]
    return cache_dir / "journal" / f"{key}.jsonl"


def lock_journal(journal: Path) -> IO:
    """Return an open file that keeps other runs off this data folder until it is closed or the process ends."""
    lock = hold_lock(journal.with_suffix(".lock"))
    if lock is None:
        raise Refused("another download.py is filling this --output_dir; wait for it, or name another")
    return lock


def claim_folder(output_dir: Path, journal: Path, asked: dict, overwrite: bool, add: bool) -> dict[str, dict]:
    """Make the data folder ours, and return what earlier runs have finished in it, by file name.

    Args:
        asked: the set that is wanted: sources, tables, settings. It is compared with what the folder holds.
        add: whether the folder may also hold all but the last of the sources.

    Raises:
        Refused: where the folder holds files of somebody else, or another set and `overwrite` is not given.
    """
    try:
        header, *finished = read_jsonl(journal)
    except (OSError, ValueError):
        header, finished = None, []
    if is_occupied(output_dir):
        held = read_record(output_dir) or header
        if held is None:
            raise Refused(f"--output_dir {output_dir} holds files that download.py did not write; name another folder")
        differences = differences_between(held, asked)
        if add and not differences_between(held, {**asked, "sources": asked["sources"][:-1]}):
            differences = []
        if differences and not overwrite:
            raise Refused(
                f"{output_dir} holds another set ({'; '.join(differences)}); name another --output_dir, or add "
                "--overwrite to replace it"
            )
        if differences:
            noted = {row["file_name"] for row in finished}
            # Also films of a run with another cache folder, or one that is gone
            for row in rows_of(output_dir / "metadata.jsonl"):
                if row["file_name"] not in noted:
                    (output_dir / row["file_name"]).unlink(missing_ok=True)
            for name in ("dataset.json", "metadata.jsonl", "rejected.jsonl", "report.html"):
                (output_dir / name).unlink(missing_ok=True)
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    done = {row["file_name"]: row for row in finished}
    write_jsonl(journal, [asked, *done.values()])  # also mends a last line that a kill tore
    return done


def rows_of(table: Path) -> list[dict]:
    """Return the rows of a table that name a film in `images/`, none of a table that cannot be read."""
    try:
        rows = read_jsonl(table)
    except (OSError, ValueError):
        return []
    return [row for row in rows if re.fullmatch(r"images/[^/\0]+\.png", str(row.get("file_name")))]


def is_occupied(output_dir: Path) -> bool:
    """Return whether a folder holds anything; hidden files and an empty `images/` are nothing."""
    if not output_dir.is_dir():
        return False
    images = output_dir / "images"
    names = [path.name for path in output_dir.iterdir() if path != images or not images.is_dir()]
    names += [path.name for path in images.iterdir()] if images.is_dir() else []
    return any(not name.startswith(".") for name in names)


def read_record(output_dir: Path) -> dict | None:
    """Return `dataset.json`, None where there is none that download.py wrote."""
    try:
        record = json.loads((output_dir / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not ({"sources", "settings"} <= set(record) or "table_sha256" in record):
        return None
    sources = record.get("sources", [])
    named = isinstance(sources, list) and all(isinstance(part, dict) and "name" in part for part in sources)
    return record if named and isinstance(record.get("settings", {}), dict) else None


def differences_between(held: dict, asked: dict) -> list[str]:
    """Return in what a set that is there differs from the one asked for, in words."""
    old = {"preprocessing": held.get("preprocessing"), **(held.get("settings") or {})}
    new = {"preprocessing": asked["preprocessing"], **asked["settings"]}
    differences = [f"{key} {old.get(key)}, not {value}" for key, value in new.items() if old.get(key) != value]
    there = held.get("sources") or [{}]
    if len(there) != len(asked["sources"]):
        names = (" and ".join(part["name"] for part in parts) for parts in (there, asked["sources"]))
        return [*differences, "source {}, not {}".format(*names)]
    for part, other in zip(there, asked["sources"], strict=True):
        differences += [
            SAID.get(key) or f"{key} {part.get(key)}, not {other[key]}"
            for key in ("source", "key", "table_sha256", "limit")
            if part.get(key) != other.get(key)
        ]
    return differences


def is_finished(output_dir: Path, film: Film, origin: dict, done: dict[str, dict]) -> bool:
    """Return whether the film's PNG is there, whole, and made from the same file in the same way."""
    noted = done.get(film.file_name)
    path = output_dir / film.file_name
    return noted is not None and noted["origin"] == origin and path.is_file() and sha256_file(path) == noted["sha256"]


def remove_others(output_dir: Path, journal: Path, rows: list[dict]) -> None:
    """Remove from the data folder what earlier runs of ours have left there and this set does not have."""
    named = {row["file_name"] for row in rows}
    for noted in read_jsonl(journal)[1:]:
        if noted["file_name"] not in named:
            (output_dir / noted["file_name"]).unlink(missing_ok=True)
    for partial in (output_dir / "images").glob("*.png.tmp"):
        partial.unlink()
