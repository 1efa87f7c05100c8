"""Any data set of the Hugging Face hub that has a column of films and one of text; rows are streamed, not all downloaded."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from utils.archives import Archive
from utils.captions import caption
from utils.files import write_bytes
from utils.films import Film, view_named
from utils.hub import HUB_ERRORS
from utils.metadata import SEXES, finding_names, holds_labels
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import text_of
from utils.sources.folder import age_in_years

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
PATIENT_COLUMNS = ("patient_id", "subject_id", "patient", "PatientID")
NUM_DIGITS = 8  # of a film's number


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of a split, in its order, without a byte of their pixels.

    The caption column is read as `reports.text_of` does; one of classes gives their names, and so does `labels`,
    or `findings` where it holds labels.

    Args:
        mirror: OWNER/NAME on the hub, or a folder that `datasets.load_dataset` reads; its `columns` say which columns hold
            film, caption and patient where they cannot be guessed.

    Raises:
        Refused: without the package `datasets`, for a set that is not there, not open or has no such columns.
    """
    split = mirror.columns.get("split") or SPLIT
    features = open_split(mirror.place, split).features or {}
    image = image_column(mirror, features)
    text = chosen(mirror, "caption_column", CAPTION_COLUMNS, features)
    patient = chosen(mirror, "patient_column", PATIENT_COLUMNS, features)
    if text == image:
        raise Refused(f"--caption_column {text} of {mirror.place} has the films; expected text")
    if text is None:
        raise Refused(
            f"--mirror {mirror.place} has columns {listed(features)}; say with --caption_column which has the text"
        )
    print(f"films are in column {image}, captions in {text}, patients in {patient or 'none'}", flush=True)
    license, films = license_of(mirror.place), []
    others = [name for name in features if name != image]
    for number, encoded in enumerate(
        refusing(mirror.place, open_split(mirror.place, split, others).select_columns(others))
    ):
        row = {name: plain(features[name], value) for name, value in encoded.items()}
        if not isinstance(row[text], (str, NoneType)):
            raise Refused(f"--caption_column {text} of {mirror.place} holds {row[text]!r:.100}; expected text")
        patient_id = None if patient is None or row[patient] is None else str(row[patient]).strip()
        if patient is not None and not patient_id:
            raise Refused(
                f"--mirror {mirror.place}, row {number}: no {patient}; without it no patient can be kept in one fold"
            )
        member = f"{split}/{number:0{NUM_DIGITS}}"
        cell, labels, words = encoded.get("findings"), row.get("labels"), None
        if labels is None and holds_labels(cell):
            labels = cell if not isinstance(row["findings"], list) else row["findings"]  # by name
            words = caption(None, None, None, finding_names(labels), member) if text == "findings" else None
        films.append(
            Film(
                source_id=member,
                path=member,
                file_name=f"images/{member.replace('/', '_')}.png",
                text=words or text_of(row, text, caption(None, None, None, None)),
                patient_id=patient_id,
                findings=finding_names(labels),
                view=view_named(row.get("view")),
                age=age_in_years(row.get("age")),
                sex=SEXES.get(str(row.get("sex") or "").strip().upper()),
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
    except (*HUB_ERRORS, RuntimeError) as error:
        raise Refused(f"--mirror {place} cannot be read: {error}") from None


def refusing(place: str, rows: Iterable[dict]) -> Iterator[dict]:
    """Yield rows; what goes wrong in reading them, in whatever way, is a set that cannot be read."""
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise Refused(f"--mirror {place} cannot be read: {error}") from error
        if row is None:
            return
        yield row


def image_column(mirror: Mirror, features: Mapping) -> str:
    """Return the column of films: the one asked for, or the only one that holds pictures.

    One that holds names of files is refused: those could be any file of this machine.
    """
    pictures = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    name = mirror.columns.get("image_column") or (pictures[0] if len(pictures) == 1 else None)
    if name not in pictures:
        raise Refused(
            f"--mirror {mirror.place} has columns {listed(features)}, of them with pictures: {listed(pictures)}; say with "
            "--image_column which has the films"
        )
    return name


def chosen(mirror: Mirror, flag: str, usual: Iterable[str], features: Mapping) -> str | None:
    """Return the column asked for, else the first of the usual ones that is there, None where none is."""
    asked = mirror.columns.get(flag)
    if asked is not None and asked not in features:
        raise Refused(f"--{flag} {asked}: {mirror.place} has columns {listed(features)}")
    return asked or next((name for name in usual if name in features), None)


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def plain(kind: object, value: object) -> object:
    """Return a cell as a table would have it: names of classes for their numbers, one text for a list of sentences."""
    inner = getattr(kind, "feature", kind[0] if isinstance(kind, list) else None)
    if isinstance(value, list) and inner is not None:
        values = [plain(inner, each) for each in value]
        are_classes = hasattr(inner, "int2str")
        return values if are_classes or not all(isinstance(each, str) for each in values) else " ".join(values)
    if not hasattr(kind, "int2str"):
        return value
    return None if value is None or value < 0 else kind.int2str(value)  # -1 where it is not known


def license_of(place: str) -> str | None:
    """Return the licence that the set's card names, None where it names none."""
    if os.path.isdir(place):
        return None
    from huggingface_hub import dataset_info

    try:
        card = dataset_info(place).card_data
    except HUB_ERRORS:  # the set itself may be at hand all the same
        return None
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
            partial(films_of_split, place=mirror.place, column=mirror.columns.get("image_column")),
        )
        for split in sorted({film.archive for film in films})
    ]


def belongs(place: str, path: str) -> bool:
    """Return whether a film's path lies in the set that names it: else it could be any file of this machine, or any address.

    Args:
        place: OWNER/NAME on the hub, or a folder.
        path: as `datasets` gives it, such as "hf://datasets/OWNER/NAME@COMMIT/a.png" or "zip://a.png::/folder/films.zip".
    """
    outermost = path.rpartition("::")[2]
    if os.path.isdir(place):
        return Path(os.path.abspath(outermost)).is_relative_to(os.path.abspath(place))  # the hub's cache is of links
    return outermost.startswith(
        (f"hf://datasets/{place}@", f"hf://datasets/{place}/")
    ) and ".." not in outermost.split("/")


def films_of_split(archive: Archive, place: str, column: str | None) -> Iterator[str]:
    """Put the wanted films of a split where they go, as they were encoded, and yield the path of each when it is there."""
    import datasets
    import fsspec

    rows = archive.open()
    column = column or next(name for name, kind in rows.features.items() if isinstance(kind, datasets.Image))
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    wanted = {int(Path(path).name): path for path in archive.wanted}
    first = min(wanted)
    for number, row in enumerate(refusing(archive.name, rows.skip(first)), start=first):
        path = wanted.pop(number, None)
        picture = row[column]
        if path is not None and picture is not None:
            content = picture["bytes"]
            if content is None:
                if not belongs(place, picture["path"]):
                    continue  # nor is one that names another place
                try:
                    with fsspec.open(picture["path"], "rb") as file:
                        content = file.read()
                except OSError:
                    continue  # it is listed as one that is not there
            write_bytes(archive.wanted[path], content)
            yield path
        if not wanted:
            return
