"""The children's films of Kermany et al. 2018 (Cell 172(5), CC BY 4.0): all that the bundled models ever learn from."""

import csv
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from utils.refusal import Refused

HELD_OUT_SEED = 0  # fixed: every bundled model has to leave the same patients unseen


def read_labels(folder: Path) -> tuple[list[dict], np.ndarray]:
    """Return the films of the set and which of them no model is trained on.

    Args:
        folder: holds `labels.csv` with the columns file_name, patient_id and label, and the films that it names.

    Returns:
        The rows of the table, and bool [N]: whether a film is of the held-out fifth of the patients.

    Raises:
        Refused: without the table.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise Refused(f"{table} not found; expected the folder of Kermany et al. 2018 with images/ and labels.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({row["patient_id"] for row in rows})
    random.Random(HELD_OUT_SEED).shuffle(patients)
    held_out = set(patients[: len(patients) // 5])
    return rows, np.array([row["patient_id"] in held_out for row in rows])


def decode(folder: Path, rows: Sequence[dict], sides: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the films squashed to squares, as most of them were before they were published.

    Args:
        folder: as in `read_labels`.
        rows: from `read_labels`.
        sides: pixels.

    Returns:
        For each side the films, uint8 [N, side, side].
    """

    def squash(row: dict) -> list[np.ndarray]:
        grey = Image.open(folder / row["file_name"]).convert("L")
        return [np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS)) for side in sides]

    with ThreadPoolExecutor(4) as pool:
        squashed = list(tqdm(pool.map(squash, rows), "films", len(rows)))
    return {side: np.stack(films) for side, films in zip(sides, zip(*squashed, strict=True), strict=True)}
