"""Generated films on disk: how each was made, inside the file and beside it, in a folder that can be trained on."""

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files import (
    append_jsonl,
    canonical_json,
    hold_lock,
    read_jsonl,
    sha256_file,
    write_jsonl,
)
from utils.prompts import LABELS
from utils.refusal import Refused

DISCLAIMER = "Synthetic: made by a diffusion model from text. Not for diagnosis."
RECORD, TABLE = "images.jsonl", "metadata.jsonl"
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
    chunks.add_text("Disclaimer", DISCLAIMER)
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


def note(folder: Path, name: str, made: dict) -> None:
    """Append an image that lies in a folder to its record."""
    with hold_record(folder) as record:
        append_jsonl(record, [row_of(folder, name, made)])


def row_of(folder: Path, name: str, made: dict) -> dict:
    return {"file_name": name, **made, "synthetic": True, "sha256": sha256_file(folder / name)}


def settle_records(folder: Path, names: Sequence[str]) -> list[dict]:
    """Bring a folder's records in order: each image once, those of `names` last and in their order.

    What a kill has torn is mended, and images that it left unnamed get their row from their own text chunks. Beside
    `images.jsonl`, which says how each image was made, `metadata.jsonl` makes the folder an imagefolder to train on: it has the
    images that quality control let pass.

    Args:
        folder: of the images.
        names: of images that lie there.

    Returns:
        The rows of `names`.
    """
    with hold_record(folder) as record:
        try:
            rows = {row["file_name"]: row for row in read_jsonl(record)} if record.exists() else {}
        except (ValueError, KeyError) as error:
            raise Refused(
                f"{record} is damaged ({error}); move it away: the images say themselves how they were made"
            ) from error
        rows = {name: row for name, row in rows.items() if (folder / name).is_file()}
        settled = [rows.pop(name, None) or row_of(folder, name, read_made(folder / name)) for name in names]
        write_jsonl(record, [*rows.values(), *settled])
        write_jsonl(folder / TABLE, [table_row(row) for row in (*rows.values(), *settled) if not row.get("flags")])
    return settled


def table_row(row: dict) -> dict:
    """Return the row of a data set for an image. Images from the same noise, or the same film, are of one patient.

    They are alike whatever their prompts, and must not be on both sides of a split.
    """
    source = row.get("init_image_sha256")
    labels = {name: row.get("labels", {}).get(name) for name in LABELS}
    return {
        "file_name": row["file_name"], "text": row["prompt"],
        "patient_id": f"film-{source[:12]}" if source else f"noise-{row.get('noise_seed', row['seed'])}", **labels,
        "source": "synthetic", "source_id": row["file_name"], "license": "that of the base model and of the adapters",
        "sha256": row["sha256"], "width": row["resolution"], "height": row["resolution"], "synthetic": True,
    }  # fmt: skip


def read_png(path: Path) -> np.ndarray:
    """Return the pixels of a generated film, uint8 or uint16 [H, W]."""
    with Image.open(path) as image:
        return np.asarray(image)


def eight_bits(film: np.ndarray) -> np.ndarray:
    """Return a film, uint8 or uint16 [H, W], at 8 bits."""
    return film if film.dtype == np.uint8 else (film / 257).round().astype(np.uint8)
