"""Generated films on disk: how each was made, inside the file and beside it, in a folder that can be trained on."""

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files import append_jsonl, canonical_json, hold_lock, read_jsonl, sha256_file, write_bytes, write_jsonl
from utils.folds import NOISE
from utils.prompts import LABELS
from utils.refusal import Refused

DISCLAIMER = "Synthetic: made by a diffusion model from text. Not for diagnosis."
OF_A_FILM = "Begun at a film and changed by a diffusion model: it shows that patient. Not for diagnosis."
RECORD, TABLE = "images.jsonl", "metadata.jsonl"
NEEDED = {"file_name", "sha256"}  # in a row of either
NOTED = {"prompt", "resolution", "init_image_sha256", "noise_seed", "attempts", "flags", "labels"}
CHUNK = "provenance"  # of a PNG, with all of it as JSON
LONGEST_WAIT_S = 60.0  # for another process that is writing the record


def file_name(request: dict) -> str:
    """Return a name that says what an image shows and differs for images that differ in anything."""
    words = re.sub(r"[^a-z0-9]+", "-", request["prompt"].lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(canonical_json(request).encode()).hexdigest()[:12]
    return f"{words or 'image'}_{request['seed']}_{digest}.png"


def encode_png(film: np.ndarray, made: dict) -> bytes:
    """Return a film as PNG that says how it was made; equal films give equal bytes.

    Args:
        film: grey, uint8 or uint16 [H, W].
        made: what was asked for and what came of it. A text chunk each, and all of it as JSON in one called `provenance`.
    """
    chunks = PngInfo()
    chunks.add_text("Synthetic", "YES")
    chunks.add_text("Disclaimer", OF_A_FILM if made["init_image_sha256"] else DISCLAIMER)
    for name, value in made.items():
        text = value if isinstance(value, str) else canonical_json(value)
        chunks.add_itxt(name, text)
    chunks.add_itxt(CHUNK, json.dumps(made, ensure_ascii=False, allow_nan=False))
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_made(path: Path) -> dict:
    """Return how a generated film was made, from the PNG itself.

    Raises:
        Refused: for a file that `encode_png` has not written, or that is damaged.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.text[CHUNK])
    except (OSError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        raise Refused(f"{path} is no whole PNG of ours; move it away, and the same command draws it again") from error


@contextlib.contextmanager
def hold_record(folder: Path) -> Iterator[Path]:
    """Keep others off a folder's records meanwhile, waiting for those that are writing them; yields the record's path."""
    give_up = time.monotonic() + LONGEST_WAIT_S
    while (lock := hold_lock(folder / ".lock")) is None:
        if time.monotonic() > give_up:
            raise Refused(
                f"another generate.py has been writing {folder / RECORD} for a minute; end it, or wait for it"
            )
        time.sleep(0.05)
    with lock:
        yield folder / RECORD


def keep(folder: Path, name: str, png: bytes, made: dict) -> None:
    """Write an image into a folder and append it to the record, other commands kept off: an equal one draws it, too.

    Args:
        png: the file, as `encode_png` gives it.
        made: how the image was made, what its text chunk says.
    """
    with hold_record(folder) as record:
        write_bytes(folder / name, png)
        append_jsonl(record, [row_of(folder, name, made)])


def row_of(folder: Path, name: str, made: dict) -> dict:
    return {"file_name": name, **made, "synthetic": True, "sha256": sha256_file(folder / name)}


def claim_folder(folder: Path) -> None:
    """Refuse a folder whose tables are of a data set, not of generated films: they would be written over."""
    foreign = [name for name in ("dataset.json", "rejected.jsonl", "metadata.csv") if (folder / name).exists()]
    try:
        rows = [*rows_in(folder / TABLE), *rows_in(folder / RECORD)]
        earlier = [row for row in rows_in(folder / RECORD) if not row.keys() >= NOTED]
    except ValueError as error:
        raise Refused(f"{error}; move that file away: the images say themselves how they were made") from error
    if foreign or not all(row.get("synthetic") is True and row.keys() >= NEEDED for row in rows):
        raise Refused(f"--output_dir {folder} holds a data set that generate.py did not write; name another folder")
    if earlier:
        raise Refused(f"--output_dir {folder} holds images of an earlier version of generate.py; name another folder")


def rows_in(path: Path) -> list[dict]:
    return read_jsonl(path) if path.is_file() else []


def settle_records(folder: Path, names: Sequence[str], labels: Mapping[str, dict] | None = None) -> list[dict]:
    """Bring a folder's records in order: each image once, those of `names` last and in their order.

    What a kill has torn is mended, and images that it left unnamed get their row from their own text chunks. Beside
    `images.jsonl`, which says how each image was made, `metadata.jsonl` makes the folder an imagefolder to train on: it has the
    images that quality control let pass.

    Args:
        folder: of the images.
        names: of images that lie there.
        labels: what their prompts assert, added to what was known when they were drawn.

    Returns:
        The rows of `names`.
    """
    with hold_record(folder) as record:
        claim_folder(folder)
        rows = {row["file_name"]: row for row in rows_in(record) if (folder / row["file_name"]).is_file()}
        settled = []
        for name in names:
            row = rows.pop(name, None)
            is_current = row is not None and row["sha256"] == sha256_file(folder / name)
            settled.append(row if is_current else row_of(folder, name, read_made(folder / name)))
        settled = [row | {"labels": row["labels"] | (labels or {}).get(row["file_name"], {})} for row in settled]
        everything = [*rows.values(), *settled]
        write_jsonl(record, everything)
        write_jsonl(folder / TABLE, [table_row(row) for row in everything if is_to_train_on(row)])
    return settled


def is_to_train_on(row: dict) -> bool:
    """Return whether an image passed quality control, and was not drawn from the caption of a film that was held out."""
    return not row["flags"] and not row["labels"].get("held_out")


def table_row(row: dict) -> dict:
    """Return the row of a data set for an image. Images from the same noise, or the same film, are of one patient.

    They are alike whatever their prompts, and must not be on both sides of a split.
    """
    source = row["init_image_sha256"]
    labels = {name: row["labels"].get(name) for name in LABELS}
    return {
        "file_name": row["file_name"], "text": row["prompt"],
        "patient_id": f"film-{source[:12]}" if source else f"{NOISE}{row['noise_seed']}", **labels,
        "source": "synthetic", "source_id": row["file_name"], "license": "that of the base model and of the adapters",
        "sha256": row["sha256"], "width": row["resolution"], "height": row["resolution"], "synthetic": True,
    }  # fmt: skip


def read_png(path: Path) -> np.ndarray:
    """Return the pixels of a generated film, uint8 or uint16 [H, W]; a damaged file is refused by name."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise Refused(f"{path} is damaged; move it away, and the same command draws it again") from error


def eight_bits(film: np.ndarray) -> np.ndarray:
    """Return a film, uint8 or uint16 [H, W], at 8 bits."""
    return film if film.dtype == np.uint8 else (film / 257).round().astype(np.uint8)
