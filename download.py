"""Fetch chest radiographs, check them, bring them to one size, and deal their patients out to folds.

    python download.py                                    the bundled demo set of synthetic films
    python download.py --source nih --mirror /data/ChestX-ray14
    python download.py --source folder --mirror https://example.org/films --resolution 256
    python download.py --source dicom --mirror /data/films --add        a second source, folded together with the first
    python download.py --check data

Writes to --output_dir a Hugging Face imagefolder, which diffusers' own training script reads as it is:
    images/*.png        8-bit grey squares
    metadata.jsonl      one row a film: caption, patient, fold, findings, view, age, sex, source, hash
    rejected.jsonl      the films left out, each with its reason
    dataset.json        sources, terms, settings, counts
    report.html         the set at a glance: films to look at, and who is in which fold
A run that was interrupted goes on where it was; the result is the same to the byte.
"""

import argparse
import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count as count_from
from pathlib import Path
from types import ModuleType

import utils.quiet  # noqa: F401

import httpx
import numpy as np
from PIL import Image

from utils.check import check_dataset
from utils.fetch import check_mirror, is_address, open_client
from utils.files import (
    append_jsonl,
    canonical_json,
    nearest_existing,
    read_jsonl,
    sha256_file,
    write_bytes,
    write_json,
    write_jsonl,
)
from utils.films import FRONTAL_VIEWS, PREPROCESSING, UNKNOWN_VIEW, Film, difference_hash, thumbnail
from utils.folds import find_duplicates, merge_groups, with_folds
from utils.journal import claim_folder, journal_path, lock_journal, read_record, remove_others
from utils.metadata import dataset_hash, load_rows
from utils.mirror import Mirror
from utils.overview import count, overview_page, summary_lines
from utils.pseudonyms import keep_private, load_salt, pseudonym, pseudonymised
from utils.refusal import ArgumentParser, Refused, run
from utils.sources import (
    chexpert,
    covid,
    demo,
    dicom,
    folder,
    hf,
    mimic,
    montgomery,
    nih,
    openi,
    padchest,
    shenzhen,
    vindr,
)
from utils.transfer import make_films

# A source is a module with NAME, COUNT, SIZE, TEXT, LICENSE (of the table of --list_sources), RESTRICTED (whether its terms
# need --accept_license), TERMS, EXAMPLE and list_films(mirror). It may have MIRROR or ADDRESSES (where its files are), MD5S
# of them, RESOLUTION (of the squares), open_archives (films within archives), and IDENTIFYING: names and patients are then
# replaced by pseudonyms
SOURCES = {
    source.NAME: source
    for source in (
        demo, openi, nih, covid, montgomery, shenzhen, folder, dicom, hf, mimic, chexpert, padchest, vindr
    )
}  # fmt: skip
BUNDLED_BASE = "assets/cxr-tiny"
RESOLUTION = 512  # pixels: that of Stable Diffusion 1.5
COLUMN_FLAGS = ("image_column", "caption_column", "patient_column", "split")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "python download.py [FLAG ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to fetch").add_argument
    add("--source", metavar="NAME", default=demo.NAME, help=f"of the set, see --list_sources [{demo.NAME}]")
    add("--mirror", metavar="PLACE", help="http(s) address or local folder that holds the set; of hf OWNER/NAME")
    add("--limit", type=int, metavar="N", help="look at the first N films of the table only")
    add("--view", choices=("frontal", "all"), help="frontal leaves out lateral films [frontal]")
    add("--max_films_per_patient", type=int, metavar="N", help="take the first N films of each patient only")
    add("--accept_license", action="store_true", help="agree to terms that restrict what you may do")
    add = parser.add_argument_group("where the table of --source folder, dicom or hf has other names").add_argument
    add("--image_column", metavar="NAME", help="has the film, or its file name")
    add("--caption_column", metavar="NAME", help="has the caption, or the report")
    add("--patient_column", metavar="NAME", help="has what tells patients apart")
    add("--split", metavar="NAME", help="part of a Hugging Face data set [train]")
    add = parser.add_argument_group("what to make of it").add_argument
    add("--resolution", type=int, metavar="PX", help="side of the squares, a multiple of 8 [512; demo: 128]")
    add("--num_folds", type=int, help="parts that patients are dealt out to [5]")
    add("--seed", type=int, help="decides which patient is in which fold [0]")
    add = parser.add_argument_group("where and how").add_argument
    add("--output_dir", type=Path, metavar="DIR", default=Path("data"), help="folder of the finished set [data]")
    add(
        "--cache_dir", type=Path, metavar="DIR", default=Path("cache"), help="folder of raw downloads, journal [cache]"
    )
    add("--num_workers", type=int, default=16, help="films fetched at the same time [16]")
    add("--overwrite", action="store_true", help="replace a set made in another way; reuses its films")
    add("--add", action="store_true", help="add the source to the set that is there, and fold both anew")
    add = parser.add_argument_group("instead").add_argument
    add("--list_sources", action="store_true", help="list the sources and their terms, then end")
    add("--check", type=Path, metavar="DIR", help="check a set, or your own imagefolder: 1 if it has faults")
    add(
        "--pretrained_model_name_or_path",
        metavar="BASE",
        default=BUNDLED_BASE,
        help=f"that --check counts the captions' tokens for [{BUNDLED_BASE}]",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # a film that may be a bomb is rejected
    if args.list_sources:
        print(list_sources())
        return 0
    if args.check is not None:
        return check(args.check, args.pretrained_model_name_or_path)

    # Terms before the first byte
    check_settings(args)
    source = SOURCES[args.source]
    held = read_record(args.output_dir)
    settings = settle(args, source, held)
    print(source.TERMS, flush=True)
    if source.RESTRICTED and not args.accept_license:
        raise Refused(f"the terms of --source {source.NAME} restrict what you may do; read them, add --accept_license")

    with open_client(args.num_workers) as client, ExitStack() as held_open:
        # What there is: the table of the source, before any film
        mirror = open_mirror(args, source, client)
        films = source.list_films(mirror)
        salt = load_salt(args.cache_dir) if getattr(source, "IDENTIFYING", False) else None
        if salt is not None:
            films = pseudonymised(films, salt, mirror.raw_dir)
        this = part_of(source, films, args.limit, salt)
        earlier = earlier_sources(held, this) if args.add else []
        name = unused_name(source.NAME, {part["name"] for part in earlier})
        if earlier:
            films = [in_company(film, name) for film in films]
        films = films[: args.limit]
        wanted, rejected = select_films(films, settings["view"], settings["max_films_per_patient"])
        others, others_rejected = (
            held_rows(args.output_dir / table, earlier) for table in ("metadata.jsonl", "rejected.jsonl")
        )
        check_films(wanted, rejected, others, settings["num_folds"])
        check_others(others, args.output_dir)

        # What there is already: films that an earlier run has finished in the same way
        asked = {"preprocessing": PREPROCESSING, "settings": settings, "sources": [*earlier, {"name": name, **this}]}
        journal = journal_path(args.cache_dir, args.output_dir)
        held_open.enter_context(lock_journal(journal))
        keep_private(journal)  # it notes which file a film was made of
        done = claim_folder(args.output_dir, journal, asked, args.overwrite, args.add)

        # Fetch and prepare the others
        results = {}
        md5s, open_archives = getattr(source, "MD5S", {}), getattr(source, "open_archives", None)
        made = make_films(
            wanted, mirror, args.output_dir, settings["resolution"], done, args.num_workers, md5s, open_archives
        )
        for film, result in held_open.enter_context(closing(made)):
            if isinstance(result, str):
                rejected.append({"source_id": film.source_id, "reason": result})
            else:
                results[film.file_name] = result
                if done.get(film.file_name) != result:
                    append_jsonl(journal, [result])

        # Rows, folds, and what there is to say about the set
        place = {film.source_id: number for number, film in enumerate(films)}
        rejected.sort(key=lambda row: place[row["source_id"]])
        rejected = [*others_rejected, *({"source": name, **row} for row in rejected)]
        kept = [film for film in wanted if film.file_name in results]
        if not kept:
            first = f", the first at {mirror.place}/{wanted[0].path}" if wanted and not wanted[0].archive else ""
            raise Refused(
                f"none of {len(films)} films of {mirror.place} can be used: {reasons_of(rejected)}{first}; is --mirror right?"
            )
        rows = [*others, *(row_of(film, results[film.file_name], name, source.LICENSE) for film in kept)]
        rows, copies = without_copies(rows)
        rejected += copies
        hashes = {noted["file_name"]: noted["dhash"] for noted in (*done.values(), *results.values())}
        rows, num_duplicates = deal_out(rows, hashes, args.output_dir, settings["num_folds"], settings["seed"])
        terms = {"license": source.LICENSE, "terms": source.TERMS, "terms_accepted": args.accept_license}
        record = {
            **asked,
            "sources": [*earlier, {"name": name, **this, **terms}],
            "data_hash": dataset_hash(rows),
            "counts": count(rows, rejected, num_duplicates, settings["resolution"]),
        }

        # Write dataset.json last: where it lies, the set is whole
        report = overview_page(args.output_dir, record, rows)
        remove_others(args.output_dir, journal, rows)
        write_jsonl(args.output_dir / "rejected.jsonl", rejected)
        write_jsonl(args.output_dir / "metadata.jsonl", rows)
        write_bytes(args.output_dir / "report.html", report.encode())
        write_json(args.output_dir / "dataset.json", record)
        print(
            f"{args.output_dir}:",
            *(f"    {line:<24}{value}" for line, value in summary_lines(record["counts"])),
            sep="\n",
        )
    return 0


def check(directory: Path, base: str) -> int:
    """Print what is wrong with a data folder, and how many captions lose sentences; return the exit status."""
    from transformers import CLIPTokenizer  # imports torch, which nothing else here needs

    where = Path(__file__).parent / BUNDLED_BASE if base == BUNDLED_BASE else base
    try:
        tokenizer = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise Refused(
            f"--pretrained_model_name_or_path {base} gives no tokenizer ({error}); try {BUNDLED_BASE}"
        ) from None

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    faults = check_dataset(directory, count_tokens, tokenizer.model_max_length)
    texts = [str(row["text"]) for row in load_rows(directory, "file_name", "text")]
    longer = sum(count_tokens(text) > tokenizer.model_max_length for text in texts)
    print("\n".join(faults) or f"{directory}: no faults")
    print(
        f"{longer} of {len(texts)} captions ({longer / len(texts):.0%}) are longer than the {tokenizer.model_max_length} "
        f"tokens of {base}: they lose sentences from their end"
    )
    return 1 if faults else 0


def list_sources() -> str:
    """Return the sources as a table, and below it the terms of each."""
    heads = [("source", "films", "size", "text", "terms")]
    rows = [(name, s.COUNT, s.SIZE, s.TEXT, s.LICENSE) for name, s in SOURCES.items()]
    widths = [max(len(row[column]) for row in heads + rows) for column in range(4)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]])
        for row in heads + rows
    ]
    terms = [f"{name}: {s.__doc__.partition(chr(10))[0]}\n{s.TERMS}\n    {s.EXAMPLE}" for name, s in SOURCES.items()]
    return "\n".join(table) + "\n\n" + "\n\n".join(terms)


def settle(args: argparse.Namespace, source: ModuleType, held: dict | None) -> dict:
    """Return the settings of the set: those asked for, else those of the set that is added to, else the defaults."""
    defaults = {
        "view": "frontal",
        "max_films_per_patient": None,
        "resolution": getattr(source, "RESOLUTION", RESOLUTION),
        "num_folds": 5,
        "seed": 0,
    }
    if not args.add:
        return {
            key: default if getattr(args, key) is None else getattr(args, key) for key, default in defaults.items()
        }
    if held is None or "sources" not in held:
        raise Refused(f"--add: {args.output_dir} holds no finished set to add to; leave --add out")
    for key, value in held["settings"].items():
        if getattr(args, key) not in (None, value):
            raise Refused(
                f"--add: the set in {args.output_dir} was made with --{key} {value}, not {getattr(args, key)}; "
                f"leave --{key} out, or make both anew"
            )
    return held["settings"]


def part_of(source: ModuleType, films: list[Film], limit: int | None, salt: bytes | None) -> dict:
    """Return what `dataset.json` says of a source before its films are there; the same films give the same.

    Of films whose names are pseudonyms the hash needs their key, too: without it, names could be tried until they fit.
    """
    table = canonical_json([film.described() for film in films]).encode()
    if salt is None:
        return {"source": source.NAME, "table_sha256": hashlib.sha256(table).hexdigest(), "limit": limit}
    part = {"source": source.NAME, "table_sha256": hashlib.sha256(salt + table).hexdigest(), "limit": limit}
    return {**part, "key": pseudonym(salt, "key", "")}


def earlier_sources(held: dict, this: dict) -> list[dict]:
    """Return the sources of a set before another one was, or is now to be, added."""
    keys = {part["key"] for part in [*held["sources"], this] if "key" in part}
    if len(keys) > 1:
        raise Refused(
            "--add: the patients of this set have pseudonyms of another key, so that one who is in both could not be known "
            "again; use the --cache_dir that it was made with"
        )
    for place, part in enumerate(held["sources"]):
        if all(part.get(key) == value for key, value in this.items()):
            if place == 0 or place + 1 < len(held["sources"]):
                raise Refused(f"--add: the set holds this {part['source']} table already; leave --add out")
            return held["sources"][:place]
    return held["sources"]


def unused_name(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number behind it where a source of that name is in the set already."""
    return next(candidate for n in count_from(1) if (candidate := name if n == 1 else f"{name}{n}") not in taken)


def in_company(film: Film, name: str) -> Film:
    """Return the film of a source that is added, under a file name that no film of another source has."""
    return replace(film, file_name=f"images/{name}_{film.file_name.removeprefix('images/')}")


def held_rows(table: Path, sources: Iterable[dict]) -> list[dict]:
    """Return the rows of some sources in a table of the set that is there."""
    names = {part["name"] for part in sources}
    if not names:
        return []
    try:
        return [row for row in read_jsonl(table) if row["source"] in names]
    except (OSError, ValueError, LookupError, TypeError):
        raise Refused(f"--add: {table} is not as download.py wrote it; see --check, or make the set anew") from None


def open_mirror(args: argparse.Namespace, source: ModuleType, client: httpx.Client) -> Mirror:
    """Return the mirror that --mirror names, else the source's own."""
    named = args.mirror or getattr(source, "MIRROR", None)
    if named is None:
        raise Refused(f"--source {source.NAME} needs --mirror: {source.EXAMPLE}")
    place = named if source is hf else check_mirror(named)
    raw_dir = args.cache_dir / "raw" / source.NAME / hashlib.sha256(place.encode()).hexdigest()[:16]
    addresses = {} if args.mirror else getattr(source, "ADDRESSES", {})  # --mirror replaces every host
    columns = {key: getattr(args, key) for key in COLUMN_FLAGS}
    return Mirror(place, client, raw_dir, addresses, columns, is_remote=source is hf or is_address(place))


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that no set can be made with."""
    if args.source not in SOURCES:
        commands = ", or ".join(source.EXAMPLE for source in SOURCES.values())
        raise Refused(f"--source {args.source} is not known; the sources are {', '.join(SOURCES)}: {commands}")
    if args.resolution is not None and (args.resolution < 64 or args.resolution % 8):
        raise Refused(f"--resolution {args.resolution}; expected a multiple of 8, 64 at least, such as 512")
    for name, least in (("limit", 1), ("max_films_per_patient", 1), ("num_folds", 2), ("num_workers", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise Refused(f"--{name} {value}; expected {least} or more")
    if (args.seed or 0) >= 2**32:
        raise Refused(f"--seed {args.seed}; expected less than 2^32")
    for name in ("output_dir", "cache_dir"):
        directory = getattr(args, name)
        there = nearest_existing(directory)
        if not there.is_dir():
            raise Refused(f"--{name} {directory}: {there} is a file; expected a folder")
    output_dir = args.output_dir.resolve()
    if output_dir in (args.cache_dir.resolve(), *args.cache_dir.resolve().parents):
        raise Refused(f"--cache_dir {args.cache_dir} lies in --output_dir {args.output_dir}; name a folder outside it")
    if args.mirror is not None and not is_address(args.mirror):
        mirror = Path(args.mirror).expanduser().resolve()
        if mirror == output_dir or output_dir in mirror.parents:
            raise Refused(f"--mirror {args.mirror} lies in --output_dir {args.output_dir}; name another --output_dir")


def select_films(films: list[Film], view: str, most_each: int | None) -> tuple[list[Film], list[dict]]:
    """Return the films that are wanted and can be captioned, and a row of `rejected.jsonl` for each other one.

    A film of a table that says nothing of views counts as frontal: tables of frontal films often do not. One whose view
    its table does not know (UNKNOWN_VIEW) may be lateral, and does not.
    """
    wanted, rejected, of_patient = [], [], Counter()
    for film in films:
        reason = film.fault
        if reason is None and not film.text:
            reason = "no text"
        if reason is None and view == "frontal" and film.view is not None and film.view not in FRONTAL_VIEWS:
            reason = "view not known" if film.view == UNKNOWN_VIEW else f"not frontal but {film.view}"
        if reason is None and most_each is not None and film.patient_id is not None:
            of_patient[film.patient_id] += 1
            reason = "one more of its patient" if of_patient[film.patient_id] > most_each else None
        if reason is None:
            wanted.append(film)
        else:
            rejected.append({"source_id": film.source_id, "reason": reason})
    return wanted, rejected


def reasons_of(rejected: list[dict]) -> str:
    """Return why films were left out, the commonest reason first."""
    return ", ".join(f"{reason} ({n})" for reason, n in Counter(row["reason"] for row in rejected).most_common())


def check_films(films: list[Film], rejected: list[dict], others: list[dict], num_folds: int) -> None:
    """Refuse films that collide in the data folder, with each other or with rows of it, or cannot be dealt out to folds."""
    if not films:
        by_view = any(row["reason"].startswith(("not frontal", "view not known")) for row in rejected)
        advice = "; add --view all to take films of any view" if by_view else ""
        raise Refused(f"the table has no film that can be used: {reasons_of(rejected)}{advice}")
    seen = {row["file_name"].casefold(): row["source_id"] for row in others}
    for film in films:
        key = film.file_name.casefold()  # some disks do not tell A from a
        if seen.get(key) == film.source_id:
            raise Refused(f"{film.source_id} is in the table twice; leave one out")
        if key in seen:
            raise Refused(f"{seen[key]} and {film.source_id} would both become {film.file_name}; rename one")
        seen[key] = film.source_id
    patients = {film.patient_id for film in films} | {row["patient_id"] for row in others}
    if patients == {None}:
        return
    if None in patients:
        known = {film.source_id: film.patient_id for film in films}
        known |= {row["source_id"]: row["patient_id"] for row in others if row["patient_id"] is None}
        nameless = next(name for name, patient in known.items() if patient is None)
        raise Refused(f"{nameless} has no patient_id but others have; give one to every film or to none")
    if len(patients) < num_folds:
        raise Refused(
            f"{len(patients)} patients cannot fill {num_folds} folds; use more films or a smaller --num_folds"
        )


def check_others(others: list[dict], output_dir: Path) -> None:
    """Refuse to add to a set whose films are not as download.py wrote them."""
    for row in others:
        path = output_dir / row["file_name"]
        if not path.is_file() or sha256_file(path) != row["sha256"]:
            raise Refused(f"--add: {path} is not as download.py wrote it; see --check, or make the set anew")


def without_copies(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the rows without films that a patient has already, and a row of `rejected.jsonl` for each of those.

    Copies of a film under two patients are kept: they tie the patients together, see `deal_out`.
    """
    first, kept, copies = set(), [], []
    for row in rows:
        film = (row["patient_id"] or row["file_name"], row["sha256"])
        if film in first:
            copies.append(
                {"source": row["source"], "source_id": row["source_id"], "reason": "copy of a film of its patient"}
            )
        else:
            kept.append(row)
        first.add(film)
    return kept, copies


def row_of(film: Film, noted: dict, source: str, license: str) -> dict:
    """Return the row of `metadata.jsonl` for a film, without its fold."""
    return {
        "file_name": film.file_name,
        "text": film.text,
        "patient_id": film.patient_id,
        "group": None,
        "fold": None,
        "findings": film.findings,
        "view": film.view,
        "age": film.age,
        "sex": film.sex,
        **({} if film.boxes is None else {"boxes": film.boxes}),
        "source": source,
        "source_id": film.source_id,
        "license": film.license or license,
        "sha256": noted["sha256"],
        "width": noted["width"],
        "height": noted["height"],
        "borders": noted["borders"],
        "geometry": noted["geometry"],
        "burned_in_text": noted["burned_in_text"],
    }


def deal_out(
    rows: list[dict], hashes: dict[str, str], output_dir: Path, num_folds: int, seed: int
) -> tuple[list[dict], int]:
    """Tie patients together who share a film, and give every row its fold.

    Rows without patients get no fold: whether every image is its own patient is for the one who trains to say.

    Args:
        hashes: difference hash of each film in hexadecimal, by file name; others are computed from the films.

    Returns:
        The rows sorted by file name, and the number of pairs of films of two patients that are one film.
    """
    rows = sorted(rows, key=lambda row: row["file_name"])
    patients = [row["patient_id"] or row["file_name"] for row in rows]

    def load(row: dict) -> np.ndarray:
        return np.asarray(Image.open(output_dir / row["file_name"]))

    bits = [int(hashes.get(row["file_name"]) or f"{difference_hash(load(row)):x}", 16) for row in rows]
    duplicates = find_duplicates(bits, lambda index: thumbnail(load(rows[index])), patients)
    rows = [
        {**row, "group": group, "fold": None}
        for row, group in zip(rows, merge_groups(patients, duplicates), strict=True)
    ]
    if rows[0]["patient_id"] is None:
        return rows, len(duplicates)
    return with_folds(rows, num_folds, seed), len(duplicates)


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
