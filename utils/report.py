"""Pictures of a run: contact sheets of films, curves of training. No torch."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import write_bytes

GAP = 4  # pixels between films
LINE = 16  # height of a line of text in pixels
SMOOTHING = 25  # steps of the running mean in the loss curve


def contact_sheet(
    films: Sequence[Sequence[np.ndarray]], row_titles: Sequence[str], column_titles: Sequence[str], footer: str
) -> Image.Image:
    """Lay films out in rows, each under its title, with a heading over each column.

    Args:
        films: rows of grey films, uint8 [H, W] each, all of one size; rows may differ in length.
        row_titles: a text above each row, wrapped to the sheet's width.
        column_titles: a short text above each column.
        footer: the last line: what the picture shows and what it is not for.

    Returns:
        A grey image.
    """
    side = films[0][0].shape[0]
    columns = max(len(row) for row in films)
    width = max(columns * (side + GAP) + GAP, 360)
    font = ImageFont.load_default(size=12)
    letters = max(20, int(width / font.getlength("n")))
    titles = [textwrap.wrap(title, letters) for title in row_titles]
    foot = textwrap.wrap(footer, letters)
    height = LINE * (1 + sum(map(len, titles)) + len(foot)) + len(films) * (side + 2 * GAP) + GAP
    sheet = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        draw.text((GAP + column * (side + GAP), 1), title, fill=0, font=font)
    top = LINE
    for row, lines in zip(films, titles, strict=True):
        for line in lines:
            draw.text((GAP, top), line, fill=0, font=font)
            top += LINE
        for column, film in enumerate(row):
            sheet.paste(Image.fromarray(film), (GAP + column * (side + GAP), top + GAP))
        top += side + 2 * GAP
    for line in foot:
        draw.text((GAP, top), line, fill=0, font=font)
        top += LINE
    return sheet


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def draw_curves(path: Path, steps: Sequence[dict], validations: Sequence[dict]) -> None:
    """Draw a run as four curves: loss, SSIM between its bounds, error by noise level, gradient norm and rate.

    Args:
        path: of the PNG.
        steps: rows of `log.jsonl`, possibly none yet.
        validations: rows of `validation.jsonl`; the first holds the bounds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, ssim, error, gradient = figure.subplots(2, 2).ravel()

    numbers = [row["step"] for row in steps]
    losses = np.array([row["loss"] for row in steps], dtype=float)
    loss.plot(numbers, losses, color="0.8", linewidth=0.8)
    if len(losses) >= SMOOTHING:
        smooth = np.convolve(losses, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
        loss.plot(numbers[SMOOTHING - 1 :], smooth, color="C0", label=f"mean of {SMOOTHING} steps")
        loss.legend()
    loss.set(title="Training loss (weighted by timestep)", xlabel="step")

    bounds, baseline = validations[0]["bounds"]["ssim"], validations[0]["ssim"]
    at = [row["step"] for row in validations]
    ssim.plot(at, [row["ssim"] for row in validations], "o-", label="rebuilt from half the noise")
    for name, value, style in (
        ("autoencoder's round trip (ceiling)", bounds["ceiling"], "g--"),
        ("base without LoRA", baseline, "k:"),
        ("mean training film (floor)", bounds["mean_film"], "r--"),
    ):
        ssim.plot([0, max(at[-1], 1)], [value, value], style, linewidth=1, label=name)
    ssim.set(title="SSIM of validation films", xlabel="step")
    ssim.legend(fontsize=8)

    for level in validations[0]["mse_by_timestep"]:
        error.plot(at, [row["mse_by_timestep"][level] for row in validations], label=f"t = {level}")
    error.set(title="Error of the predicted noise by timestep", xlabel="step", yscale="log")
    error.legend(fontsize=7, ncols=2)

    norms = [np.nan if row["grad_norm"] is None else row["grad_norm"] for row in steps]
    gradient.plot(numbers, norms, color="C1", linewidth=0.8, label="gradient norm before clipping")
    rate = gradient.twinx()
    rate.plot(numbers, [row["lr"] for row in steps], color="C2", label="learning rate")
    gradient.set(title="Gradient norm (left) and learning rate (right)", xlabel="step")
    figure.legend(*_handles(gradient, rate), loc="lower right", fontsize=8)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    write_bytes(path, buffer.getvalue())


def _handles(*axes) -> tuple[list, list]:
    pairs = [axis.get_legend_handles_labels() for axis in axes]
    return [handle for handles, _ in pairs for handle in handles], [label for _, labels in pairs for label in labels]
