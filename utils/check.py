"""What is wrong with a finished data folder, for `download.py --check`."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.captions import fit
from utils.files import read_jsonl, sha256_file
from utils.films import UnusableFilm, decode_film, difference_hash, load_image, thumbnail
from utils.folds import find_duplicates
from utils.metadata import dataset_hash, load_rows, row_faults


def check_dataset(directory: Path, count_tokens: Callable[[str], int] | None = None, limit: int = 0) -> list[str]:
    """Return all faults of a data folder, a sentence each; none means that it can be trained on as it is.

    A folder that download.py made must be as it was written. In an imagefolder from elsewhere films may be of any kind that
    download.py could have read.

    Args:
        count_tokens: of a text, in the base's tokenizer, those that begin and end it included; None leaves captions unread.
        limit: most tokens that the base's text encoder takes.

    Raises:
        Refused: where there is no table that could be checked.
    """
    rows = load_rows(directory, "file_name", "text")
    is_ours = any((directory / name).is_file() for name in ("dataset.json", "rejected.jsonl"))
    faults = list(row_faults(rows, directory))
    films = [row for row in rows if (directory / row["file_name"]).is_file()]
    hashes, thumbnails, readable = [], [], []
    for row in tqdm(films, "films", unit="film", disable=None):
        if row.get("sha256") and sha256_file(directory / row["file_name"]) != row["sha256"]:
            faults.append(f"{row['file_name']} is not the file whose SHA-256 the table has")
        try:
            grey = (read_square if is_ours else decode_film)(directory / row["file_name"])
        except UnusableFilm as fault:
            faults.append(f"{row['file_name']}: {fault}")
            continue
        readable.append(row)
        hashes.append(difference_hash(grey))
        thumbnails.append(thumbnail(grey))
    groups = [row.get("group") or row["patient_id"] or row["file_name"] for row in readable]
    for first, second in find_duplicates(hashes, thumbnails.__getitem__, groups):
        one, other = readable[first], readable[second]
        if one["fold"] != other["fold"]:
            faults.append(
                f"{one['file_name']} (fold {one['fold']}) and {other['file_name']} (fold {other['fold']}) are one film"
            )
        elif one["fold"] is None:
            faults.append(
                f"{one['file_name']} and {other['file_name']} are one film; they could be on both sides of a split"
            )
    if count_tokens is not None:
        faults += caption_faults(rows, count_tokens, limit)
    return faults + (record_faults(directory, rows) if is_ours else [])


def caption_faults(rows: list[dict], count_tokens: Callable[[str], int], limit: int) -> list[str]:
    """Return which captions would be cut within a sentence; that later sentences are left out is as it should be."""
    faults = []
    for row in rows:
        if isinstance(row["text"], str) and (tokens := count_tokens(fit(row["text"], count_tokens, limit))) > limit:
            faults.append(
                f"{row['file_name']}: its caption begins with {tokens} tokens, of which {limit} are read; shorten it"
            )
    return faults


def read_square(path: Path) -> np.ndarray:
    """Return a film of a data folder, uint8 [H, W].

    Raises:
        UnusableFilm: where it is not an 8-bit grey square.
    """
    image = load_image(path)
    if image.mode != "L":
        raise UnusableFilm(f"mode is {image.mode}, expected 8-bit grey")
    if image.width != image.height:
        raise UnusableFilm(f"{image.width} x {image.height} is not square")
    return np.asarray(image)


def record_faults(directory: Path, rows: list[dict]) -> list[str]:
    """Return in what `dataset.json`, `rejected.jsonl` and the folder of images disagree with the table."""
    try:
        record = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
        rejected = read_jsonl(directory / "rejected.jsonl")
        counts, resolution = record["counts"], record["settings"]["resolution"]
        said = {"kept": counts["kept"], "rejected": dict(counts["rejected"]), "data_hash": record["data_hash"]}
        seen = counts["seen"]
    except (OSError, ValueError, KeyError, TypeError):
        return [
            f"{directory} has no readable dataset.json and rejected.jsonl: not made, or not finished, by download.py"
        ]
    found = {
        "kept": len(rows),
        "rejected": dict(Counter(row.get("reason") for row in rejected)),
        "data_hash": dataset_hash(rows),
    }
    faults = [f"dataset.json says {key} {said[key]}, found {found[key]}" for key in said if said[key] != found[key]]
    if len(rows) + len(rejected) != seen:
        faults.append(f"{len(rows)} kept and {len(rejected)} rejected are not the {seen} seen")
    named = {row["file_name"] for row in rows}
    for path in sorted((directory / "images").glob("*")):
        if f"images/{path.name}" not in named:
            faults.append(f"images/{path.name} is not in the table")
        elif size_of(path) not in (None, (resolution, resolution)):
            faults.append(f"images/{path.name} is not {resolution} x {resolution}")
    return faults


def size_of(path: Path) -> tuple[int, int] | None:
    """Return width and height of an image file in pixels, None for what is no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
