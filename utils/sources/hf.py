"""Any data set of the Hugging Face hub that has a column of films and one of text; rows are streamed, not all downloaded."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.archives import Archive
from utils.captions import caption
from utils.files import write_bytes
from utils.films import Film
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import caption_sentences, sections_of
from utils.sources.folder import age_in_years, finding_names

if TYPE_CHECKING:
    from datasets import IterableDataset

NAME = "hf"
COUNT, SIZE, TEXT = "of the set", "", "a text column"
LICENSE = "as its card on the hub says"
RESTRICTED = True
TERMS = """\
A data set of the Hugging Face hub has the terms that its card there states, whoever put it there; many sets of films were put
there by others than their owners. Read the card, see that you may use the films in this way, then add --accept_license."""
EXAMPLE = (
    "python download.py --source hf --accept_license --mirror OWNER/NAME (--patient_column keeps patients in one fold)"
)

SPLIT = "train"
CAPTION_COLUMNS = ("text", "caption", "report", "impression", "findings", "prompt", "description")
PATIENT_COLUMNS = ("patient_id", "subject_id", "patient", "PatientID", "uid")
NUM_DIGITS = 8  # of a film's number


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of a split, in its order, without a byte of their pixels.

    A text column named `report` or whose text has headings is read as a report, `findings` beside `impression` as its
    sections, any other as the caption it is.

    Args:
        mirror: OWNER/NAME on the hub, or a folder that `datasets.load_dataset` reads; its `columns` say which columns hold
            film, caption and patient where they cannot be guessed.

    Raises:
        Refused: without the package `datasets`, for a set that is not there, not open or has no such columns.
    """
    split = mirror.columns.get("split") or SPLIT
    rows = open_split(mirror.place, split)
    names = list(rows.features or next(iter(rows)))
    image = image_column(mirror, rows, names)
    text = chosen(mirror, "caption_column", CAPTION_COLUMNS, names)
    patient = chosen(mirror, "patient_column", PATIENT_COLUMNS, names)
    if text is None:
        raise Refused(
            f"--mirror {mirror.place} has columns {', '.join(names)}; say with --caption_column which has the text"
        )
    license = license_of(mirror.place)
    films = []
    others = [name for name in names if name != image]
    for number, row in enumerate(open_split(mirror.place, split, others).select_columns(others)):
        if patient is not None and row[patient] in (None, ""):
            raise Refused(
                f"--mirror {mirror.place}, row {number}: no {patient}; without it no patient can be kept in one fold"
            )
        member = f"{split}/{number:0{NUM_DIGITS}}"
        films.append(
            Film(
                source_id=member,
                path=member,
                file_name=f"images/{member.replace('/', '_')}.png",
                text=text_of(row, text),
                patient_id=None if patient is None else str(row[patient]),
                findings=finding_names(row.get("labels")),
                view=str(row.get("view") or "").strip().upper() or None,
                age=age_in_years(row.get("age")),
                sex={"M": "M", "F": "F"}.get(str(row.get("sex") or "")[:1].upper()),
                archive=split,
                license=license,
            )
        )
    return films


def open_split(place: str, split: str, columns: list[str] | None = None) -> "IterableDataset":
    """Return the rows of a split, to be streamed; of Parquet files with no more than some columns."""
    try:
        import datasets
    except ImportError:
        raise Refused("--source hf needs the package datasets: pip install -r requirements-hf.txt") from None
    try:
        if columns is not None:  # only the reader of Parquet knows how to leave out what is not asked for
            with suppress(TypeError, ValueError):
                return datasets.load_dataset(place, split=split, streaming=True, columns=columns)
        return datasets.load_dataset(place, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(f"--mirror {place} cannot be read: {error}") from None


def image_column(mirror: Mirror, rows: "IterableDataset", names: list[str]) -> str:
    """Return the column of films: the one asked for, or the only one that holds pictures."""
    pictures = [name for name in names if type((rows.features or {}).get(name)).__name__ == "Image"]
    name = mirror.columns.get("image_column") or (pictures[0] if len(pictures) == 1 else None)
    if name not in names:
        raise Refused(
            f"--mirror {mirror.place} has columns {', '.join(names)}, of them {len(pictures)} with pictures; say with "
            "--image_column which has the films"
        )
    return name


def chosen(mirror: Mirror, flag: str, usual: Iterable[str], names: list[str]) -> str | None:
    """Return the column asked for, else the first of the usual ones that is there, None where none is."""
    asked = mirror.columns.get(flag)
    if asked is not None and asked not in names:
        raise Refused(f"--{flag} {asked}: {mirror.place} has columns {', '.join(names)}")
    return asked or next((name for name in usual if name in names), None)


def text_of(row: dict, column: str) -> str:
    """Return a row's caption."""
    text = str(row[column] or "")
    if column in ("findings", "impression"):
        sections = {name: str(row.get(name) or "") for name in ("findings", "impression")}
    elif column == "report" or any(sections_of(text).values()) and "\n" in text.strip():
        sections = sections_of(text)
    else:
        return " ".join(text.split())
    sentences = caption_sentences(sections["findings"], sections["impression"])
    return " ".join([caption(None, None, None, None), *sentences]) if sentences else ""


def license_of(place: str) -> str | None:
    """Return the licence that the set's card names, None where it names none."""
    if os.path.isdir(place):
        return None
    from huggingface_hub import dataset_info

    card = dataset_info(place).card_data
    named = card.get("license") if card is not None else None
    return ", ".join(named) if isinstance(named, list) else named


def open_archives(films: Iterable[Film], mirror: Mirror) -> list[Archive]:
    """Return the splits that hold some films: each is read in order, as an archive is."""
    films = list(films)
    return [
        Archive(
            f"{mirror.place}, split {split}",
            partial(open_split, mirror.place, split),
            {film.path: mirror.raw_dir / film.path for film in films if film.archive == split},
            partial(films_of_split, column=mirror.columns.get("image_column")),
        )
        for split in sorted({film.archive for film in films})
    ]


def films_of_split(archive: Archive, column: str | None) -> Iterator[str]:
    """Put the wanted films of a split where they go, as they were encoded, and yield the path of each when it is there."""
    import datasets
    import fsspec

    rows = archive.open()
    column = column or next(name for name, kind in rows.features.items() if isinstance(kind, datasets.Image))
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    wanted = {int(Path(path).name): path for path in archive.wanted}
    first = min(wanted)
    for number, row in enumerate(rows.skip(first), start=first):
        path = wanted.pop(number, None)
        picture = row[column]
        if path is not None and picture is not None:
            content = picture["bytes"]
            if content is None:
                with fsspec.open(picture["path"], "rb") as file:
                    content = file.read()
            write_bytes(archive.wanted[path], content)
            yield path
        if not wanted:
            return
