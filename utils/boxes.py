"""Where the findings of a film lie, from a table's column `boxes`, as weights of the training loss."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.refusal import Refused

MARGIN = 0.5  # latent pixels around a box that count as inside: a latent pixel sees beyond its own square


def box_loss_weights(boxes: Sequence[Sequence[float]], height: int, width: int, weight: float) -> Tensor:
    """Return weights w by which mean(w * e) = mean(e) + weight * (sum over the boxes of the mean of e in the box).

    A finding counts by itself, not by its area: without it a nodule, which covers two of a film's 256 latent pixels,
    is drowned in the error of everything that no caption mentions.

    Args:
        boxes: left, top, right and bottom edge of each as fractions of the film's sides.
        height, width: of the latents.
        weight: what a box adds, in whole films.

    Returns:
        float32, [height, width].
    """
    weights = torch.ones(height, width)
    rows, columns = torch.arange(height), torch.arange(width)
    for left, top, right, bottom in boxes:
        inside_rows = (rows + 1 > top * height - MARGIN) & (rows < bottom * height + MARGIN)
        inside_columns = (columns + 1 > left * width - MARGIN) & (columns < right * width + MARGIN)
        inside = inside_rows[:, None] & inside_columns
        weights += weight * height * width * inside / inside.sum()
    return weights


def read_boxes(directory: Path, rows: Sequence[dict]) -> list[list[list[float]]]:
    """Return the boxes of each film of a table, as fractions of its sides; none where the table knows none.

    Args:
        directory: that the rows' `file_name` is relative to.
        rows: whose `boxes`, where they have it, is a list of {"box": [left, top, right, bottom], ...}.

    Raises:
        Refused: where no row has boxes, a box is something else, or the film of one is not square: padded or cropped to
            a square it would show the finding elsewhere.
    """
    if not any(row.get("boxes") for row in rows):
        raise Refused(
            f"--box_loss_weight: no film of {directory} has a box; expected a column boxes, a list of "
            '{"box": [left, top, right, bottom]} in fractions of the sides'
        )
    for row in rows:
        if row.get("boxes"):
            try:
                with Image.open(directory / row["file_name"]) as film:
                    width, height = film.size
            except (OSError, Image.DecompressionBombError) as error:  # damaged since its latents were cached
                raise Refused(f"{row['file_name']} cannot be read ({error}); put the film back") from error
            if width != height:
                raise Refused(f"{row['file_name']}: boxes need square films, this one has {width} x {height}")
    return [edges_of(row) for row in rows]


def edges_of(row: dict) -> list[list[float]]:
    """Return left, top, right and bottom edge of a film's boxes, checked."""
    boxes = row.get("boxes") or []
    if not isinstance(boxes, list):
        raise Refused(f"{row['file_name']}: boxes {boxes!r}; expected a list")
    edges = [box.get("box") if isinstance(box, dict) else None for box in boxes]
    for box in edges:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise Refused(
                f"{row['file_name']}: box {box!r}; expected left, top, right and bottom edge as fractions of the sides"
            )
    return edges
