"""Fetch chest radiographs, check them, bring them to one size, and deal their patients out to folds.

    python download.py                                    the bundled demo set of synthetic films
    python download.py --source nih --mirror /data/ChestX-ray14
    python download.py --source folder --mirror https://example.org/films --resolution 256
    python download.py --check data

Writes to --output_dir a Hugging Face imagefolder, which diffusers' own training script reads as it is:
    images/*.png        8-bit grey squares
    metadata.jsonl      one row a film: caption, patient, fold, findings, view, age, sex, source, hash
    rejected.jsonl      the films left out, each with its reason
    dataset.json        source, terms, settings, counts
A run that was interrupted goes on where it was; the result is the same to the byte.
"""

import argparse
import hashlib
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.archives import Archive, Unpacker
from utils.check import check_dataset
from utils.fetch import (
    Arriving,
    NotFetched,
    address_of,
    check_mirror,
    fetch_file,
    is_address,
    open_client,
    read_file,
)
from utils.files import append_jsonl, canonical_json, hold_lock, write_bytes, write_json, write_jsonl
from utils.films import PREPROCESSING, UNKNOWN_VIEW, Film, UnusableFilm, is_upsampled, prepare_film, thumbnail
from utils.folds import find_duplicates, merge_groups, with_folds
from utils.journal import claim_folder, is_finished, journal_path, lock_journal, remove_others
from utils.metadata import dataset_hash
from utils.refusal import ArgumentParser, Refused, run
from utils.sources import demo, folder, nih, openi

SOURCES = {source.NAME: source for source in (demo, openi, nih, folder)}
RESOLUTION = 512  # pixels: that of Stable Diffusion 1.5
FRONTAL_VIEWS = ("PA", "AP", "FRONTAL")
DAMAGED = ("cannot be decoded", "no film in it")  # of a film that may have been cut short on its way without a word


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Says the defaults and keeps the lines of the description."""

    parser = ArgumentParser(description=__doc__, formatter_class=Formatter)
    group = parser.add_argument_group("what to fetch")
    group.add_argument("--source", default=demo.NAME, help="name of the set, see --list_sources")
    group.add_argument("--mirror", help="http(s) address or local folder that holds the set")
    group.add_argument("--limit", type=int, help="look at the first N films of the table only")
    group.add_argument(
        "--view", choices=("frontal", "all"), default="frontal", help="frontal leaves out lateral films"
    )
    group.add_argument("--accept_license", action="store_true", help="agree to terms that restrict what you may do")
    group = parser.add_argument_group("what to make of it")
    group.add_argument(
        "--resolution", type=int, help="side of the squares in pixels, a multiple of 8 (default: 512; demo: 128)"
    )
    group.add_argument("--num_folds", type=int, default=5, help="parts that patients are dealt out to")
    group.add_argument("--seed", type=int, default=0, help="decides which patient is in which fold")
    group = parser.add_argument_group("where and how")
    group.add_argument("--output_dir", type=Path, default=Path("data"), help="folder of the finished set")
    group.add_argument("--cache_dir", type=Path, default=Path("cache"), help="folder of raw downloads and the journal")
    group.add_argument("--num_workers", type=int, default=16, help="films fetched at the same time")
    group.add_argument("--overwrite", action="store_true", help="replace a set made in another way; reuses its films")
    group = parser.add_argument_group("instead")
    group.add_argument("--list_sources", action="store_true", help="list the sources and their terms, then end")
    group.add_argument("--check", type=Path, metavar="DIR", help="check a finished set, then end: 1 if it has faults")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # a film that may be a bomb is rejected
    if args.list_sources:
        for name, source in SOURCES.items():
            print(f"{name}: {source.__doc__.partition(chr(10))[0]}\n{source.TERMS}\n    {source.EXAMPLE}\n")
        return 0
    if args.check is not None:
        faults = check_dataset(args.check)
        print("\n".join(faults) or f"{args.check}: no faults")
        return 1 if faults else 0

    # Terms before the first byte
    check_settings(args)
    source = SOURCES[args.source]
    args.resolution = args.resolution or getattr(source, "RESOLUTION", RESOLUTION)
    addresses = {} if args.mirror else getattr(source, "ADDRESSES", {})  # --mirror replaces every host
    args.mirror = args.mirror or getattr(source, "MIRROR", None)
    print(source.TERMS, flush=True)
    if source.RESTRICTED and not args.accept_license:
        raise Refused(f"the terms of --source {source.NAME} restrict what you may do; read them, add --accept_license")

    with open_client(args.num_workers) as client:
        # What there is: the table of the source, before any film
        mirror = check_mirror(args.mirror) if args.mirror is not None else None
        films = source.list_films(mirror, lambda name: read_file(client, *place_of(name, mirror, addresses)))
        table_hash = hashlib.sha256(canonical_json([film.described() for film in films]).encode()).hexdigest()
        films = films[: args.limit]
        wanted, rejected = select_films(films, args.view)
        check_films(wanted, args.num_folds)

        # What there is already: films that an earlier run has finished in the same way
        asked = {
            "source": source.NAME,
            "preprocessing": PREPROCESSING,
            "table_sha256": table_hash,
            "settings": {key: getattr(args, key) for key in ("view", "limit", "resolution", "num_folds", "seed")},
        }
        journal = journal_path(args.cache_dir, args.output_dir)
        lock = lock_journal(journal)
        done = claim_folder(args.output_dir, journal, asked, args.overwrite)

        # Fetch and prepare the others, many at once; an archive is read while it arrives, as far as its last wanted film
        stop = threading.Event()
        raw_dir = args.cache_dir / "raw" / source.NAME / hashlib.sha256(mirror.encode()).hexdigest()[:16]
        located = {film.file_name: locate(film, mirror, raw_dir, args.resolution) for film in wanted}
        in_archives = [film for film in wanted if "member" in located[film.file_name][1]]
        raw_lock = hold_lock(raw_dir / ".lock") if in_archives or is_address(mirror) else lock
        if raw_lock is None:
            raise Refused(
                f"another download.py is fetching from {mirror} into {args.cache_dir}; wait, or name another --cache_dir"
            )

        def is_there(film: Film) -> bool:
            return is_finished(args.output_dir, film, located[film.file_name][1], done)

        with ThreadPoolExecutor(args.num_workers) as pool:
            there = list(pool.map(is_there, in_archives))
        packed = {
            located[film.file_name][0]: film for film, finished in zip(in_archives, there, strict=True) if not finished
        }
        for path in packed:
            path.unlink(missing_ok=True)  # of a run that was killed, from an archive that may have changed since
        md5s = getattr(source, "MD5S", {})
        unpacker = Unpacker(archives_of(packed, client, mirror, addresses, md5s, raw_dir, stop), stop)

        def fetch(film: Film) -> tuple[Film, Path | NotFetched | None]:
            path, origin = located[film.file_name]
            if "member" in origin or is_there(film):
                return film, None
            if not is_address(mirror):
                return film, path if path.is_file() else NotFetched("not found")
            try:
                fetch_file(client, address_of(mirror, film.path), path, stop, sha256=film.sha256)
            except NotFetched as failure:
                return film, failure
            return film, path

        def unpack() -> tuple[Film, Path | NotFetched]:
            path, found = unpacker.take()
            return packed[path], path if found else NotFetched("not in its archive")

        again = set()

        def prepare(film: Film, path: Path | None) -> dict | Callable:
            if path is None:
                return done[film.file_name]
            try:
                png, noted = prepare_film(path, args.resolution)
            except UnusableFilm as fault:
                if is_address(mirror) and path not in packed and film.sha256 is None and str(fault) in DAMAGED:
                    path.unlink()
                    if film.file_name not in again:
                        again.add(film.file_name)
                        return partial(fetch, film)
                raise
            finally:
                if path in packed:
                    path.unlink(missing_ok=True)  # the archive is kept
            write_bytes(args.output_dir / film.file_name, png)
            sha256 = hashlib.sha256(png).hexdigest()
            return {"file_name": film.file_name, "origin": located[film.file_name][1], "sha256": sha256, **noted}

        single = [film for film in wanted if located[film.file_name][0] not in packed]
        tasks = [*(partial(fetch, film) for film in single), *[unpack] * len(packed)]
        results = {}
        with closing(fetch_and_prepare(tasks, prepare, args.num_workers, stop)) as finished:
            for film, result in finished:
                if isinstance(result, str):
                    rejected.append({"source_id": film.source_id, "reason": result})
                else:
                    results[film.file_name] = result
                    if done.get(film.file_name) != result:
                        append_jsonl(journal, [result])
        unpacker.finish()
        if raw_lock is not lock:
            raw_lock.close()

    # Rows, folds, and what there is to say about the set
    kept = [film for film in wanted if film.file_name in results]
    place = {film.source_id: number for number, film in enumerate(films)}
    rejected.sort(key=lambda row: place[row["source_id"]])
    if not kept:
        reasons = ", ".join(
            f"{reason} ({n})" for reason, n in Counter(row["reason"] for row in rejected).most_common()
        )
        raise Refused(f"none of {len(films)} films of {args.mirror} can be used: {reasons}; is --mirror right?")
    rows = [row_of(film, results[film.file_name], source) for film in kept]
    rows, num_duplicates = deal_out(rows, results, args.output_dir, args.num_folds, args.seed)
    record = {
        **asked,
        "license": source.LICENSE,
        "terms": source.TERMS,
        "terms_accepted": args.accept_license,
        "data_hash": dataset_hash(rows),
        "counts": count(rows, rejected, num_duplicates, args.resolution),
    }

    # Write dataset.json last: where it lies, the set is whole
    remove_others(args.output_dir, journal, rows)
    write_jsonl(args.output_dir / "rejected.jsonl", rejected)
    write_jsonl(args.output_dir / "metadata.jsonl", rows)
    write_json(args.output_dir / "dataset.json", record)
    lock.close()
    print(summary(args.output_dir, record["counts"]))
    return 0


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that no set can be made with."""
    if args.source not in SOURCES:
        commands = ", or ".join(source.EXAMPLE for source in SOURCES.values())
        raise Refused(f"--source {args.source} is not known; the sources are {', '.join(SOURCES)}: {commands}")
    if args.resolution is not None and (args.resolution < 64 or args.resolution % 8):
        raise Refused(f"--resolution {args.resolution}; expected a multiple of 8, 64 at least, such as 512")
    for name, least in (("limit", 1), ("num_folds", 2), ("num_workers", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise Refused(f"--{name} {value}; expected {least} or more")
    if args.seed >= 2**32:
        raise Refused(f"--seed {args.seed}; expected less than 2^32")
    for name in ("output_dir", "cache_dir"):
        directory = getattr(args, name)
        there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        if not there.is_dir():
            raise Refused(f"--{name} {directory}: {there} is a file; expected a folder")
    output_dir = args.output_dir.resolve()
    if args.mirror is not None and not is_address(args.mirror):
        mirror = Path(args.mirror).expanduser().resolve()
        if mirror == output_dir or output_dir in mirror.parents:
            raise Refused(f"--mirror {args.mirror} lies in --output_dir {args.output_dir}; name another --output_dir")


def select_films(films: list[Film], view: str) -> tuple[list[Film], list[dict]]:
    """Return the films of the wanted view that have a caption, and a row of `rejected.jsonl` for each other one.

    A film of a table that says nothing of views counts as frontal: tables of frontal films often do not. One whose view
    its table does not know (UNKNOWN_VIEW) may be lateral, and does not.
    """
    wanted, rejected = [], []
    for film in films:
        if not film.text:
            rejected.append({"source_id": film.source_id, "reason": "no text"})
        elif view == "all" or film.view is None or film.view in FRONTAL_VIEWS:
            wanted.append(film)
        else:
            reason = "view not known" if film.view == UNKNOWN_VIEW else "not frontal"
            rejected.append({"source_id": film.source_id, "reason": reason})
    return wanted, rejected


def check_films(films: list[Film], num_folds: int) -> None:
    """Refuse a table whose films collide in the data folder or cannot be dealt out to folds."""
    if not films:
        raise Refused("the table has no frontal film with a caption; add --view all to use the others")
    seen = {}
    for film in films:
        other = seen.setdefault(film.file_name.casefold(), film)  # casefold: some disks do not tell A from a
        if other.source_id == film.source_id and other is not film:
            raise Refused(f"{film.source_id} is in the table twice; leave one out")
        if other is not film:
            raise Refused(f"{other.source_id} and {film.source_id} would both become {film.file_name}; rename one")
    patients = {film.patient_id for film in films}
    if patients == {None}:
        return
    if None in patients:
        nameless = next(film.source_id for film in films if film.patient_id is None)
        raise Refused(f"{nameless} has no patient_id but others have; give one to every film or to none")
    if len(patients) < num_folds:
        raise Refused(
            f"{len(patients)} patients cannot fill {num_folds} folds; use more films or a smaller --num_folds"
        )


def locate(film: Film, mirror: str, raw_dir: Path, resolution: int) -> tuple[Path, dict]:
    """Return where a film's raw file is or will be, and what the finished film depends on.

    A film of a local mirror that was changed since, or whose archive was, is prepared again. One that is nowhere depends
    on no file.
    """
    path = raw_dir / film.path
    if is_address(mirror):
        origin = {"address": address_of(mirror, film.archive or film.path)}
    else:
        origin, unpacked, archive = {}, Path(mirror) / film.path, Path(mirror) / (film.archive or "")
        if film.archive is None or unpacked.is_file() or not archive.is_file():
            path = unpacked
        source = path if path == unpacked else archive
        if source.is_file():
            status = source.stat()
            origin = {"file": str(source.absolute()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if film.archive is not None and path == raw_dir / film.path:
        origin["member"] = film.path
    return path, {**origin, "resolution": resolution, "preprocessing": PREPROCESSING}


def place_of(name: str, mirror: str, addresses: dict[str, str]) -> tuple[str, str]:
    """Return the mirror that holds a file, and its name there; `addresses` has those that lie elsewhere."""
    if name not in addresses:
        return mirror, name
    base, _, there = addresses[name].rpartition("/")
    return base, there


def archives_of(
    packed: dict[Path, Film],
    client: httpx.Client,
    mirror: str,
    addresses: dict[str, str],
    md5s: dict[str, str],
    raw_dir: Path,
    stop: threading.Event,
) -> list[Archive]:
    """Return the archives that hold some films, by name; `packed` says where each film goes."""
    archives = []
    for name in sorted({film.archive for film in packed.values()}):
        wanted = {PurePosixPath(film.path).name: path for path, film in packed.items() if film.archive == name}
        if is_address(mirror):
            address = address_of(*place_of(name, mirror, addresses))
            opener = partial(Arriving, client, address, raw_dir / name, stop, md5s.get(name))
            archives.append(Archive(address, opener, wanted))
        else:
            local = Path(mirror) / name
            archives.append(Archive(str(local), partial(open, local, "rb"), wanted))
    return archives


def fetch_and_prepare(
    tasks: Sequence[Callable[[], tuple[Film, Path | NotFetched | None]]],
    prepare: Callable[[Film, Path | None], dict | Callable],
    num_workers: int,
    stop: threading.Event,
) -> Iterator[tuple[Film, dict | str]]:
    """Yield each film with what `prepare` returned, or with the reason why it is left out, as they get ready.

    Threads wait for the network in one pool and decode in another, as many as there are cores (Pillow computes
    without the interpreter's lock). A bounded number of films is under way at any time. Any other error, or the end
    of the caller, stops both pools.

    Args:
        tasks: one a film; each returns a film with its raw file, with None where it is finished already, or with the
            reason why there is none.
        prepare: makes the finished film of the raw one, or returns a task that fetches it again.
    """
    fetchers, preparers = ThreadPoolExecutor(num_workers), ThreadPoolExecutor(os.cpu_count() or 1)
    waiting, under_way = iter(tasks), {}
    num_fetched, ended = 0, False
    bar = tqdm(total=len(tasks), unit="film", disable=None)
    try:
        while True:
            while len(under_way) < 4 * num_workers and (task := next(waiting, None)) is not None:
                under_way[fetchers.submit(task)] = None
            if not under_way:
                ended = True
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                film = under_way.pop(future)
                if film is None:
                    film, path = future.result()
                    if not isinstance(path, NotFetched):
                        num_fetched += 1
                        bar.set_postfix(fetched=num_fetched, refresh=False)
                        under_way[preparers.submit(prepare, film, path)] = film
                        continue
                    result = str(path)
                else:
                    try:
                        result = future.result()
                    except UnusableFilm as fault:
                        result = str(fault)
                    if callable(result):
                        under_way[fetchers.submit(result)] = None
                        continue
                bar.update()
                yield film, result
    finally:
        if not ended:
            stop.set()
        fetchers.shutdown(cancel_futures=True)
        preparers.shutdown(cancel_futures=True)
        bar.close()


def row_of(film: Film, noted: dict, source: ModuleType) -> dict:
    """Return the row of `metadata.jsonl` for a film, without its fold."""
    return {
        "file_name": film.file_name,
        "text": film.text,
        "patient_id": film.patient_id,
        "group": film.patient_id or film.file_name,
        "fold": None,
        "findings": film.findings,
        "view": film.view,
        "age": film.age,
        "sex": film.sex,
        **({} if film.boxes is None else {"boxes": film.boxes}),
        "source": source.NAME,
        "source_id": film.source_id,
        "license": source.LICENSE,
        "sha256": noted["sha256"],
        "width": noted["width"],
        "height": noted["height"],
        "geometry": noted["geometry"],
    }


def deal_out(
    rows: list[dict], results: dict[str, dict], output_dir: Path, num_folds: int, seed: int
) -> tuple[list[dict], int]:
    """Tie patients together who share a film, and give every row its fold.

    Rows without patients get no fold: whether every image is its own patient is for the one who trains to say.

    Returns:
        The rows sorted by file name, and the number of pairs of films of two patients that are one film.
    """
    rows = sorted(rows, key=lambda row: row["file_name"])
    patients = [row["group"] for row in rows]

    def load_thumbnail(index: int) -> np.ndarray:
        return thumbnail(np.asarray(Image.open(output_dir / rows[index]["file_name"])))

    hashes = [int(results[row["file_name"]]["dhash"], 16) for row in rows]
    duplicates = find_duplicates(hashes, load_thumbnail, patients)
    for row, group in zip(rows, merge_groups(patients, duplicates), strict=True):
        row["group"] = group
    if rows[0]["patient_id"] is None:
        return rows, len(duplicates)
    return with_folds(rows, num_folds, seed), len(duplicates)


def count(rows: list[dict], rejected: list[dict], num_duplicates: int, resolution: int) -> dict:
    """Return the figures of `dataset.json`."""
    folds = sorted({row["fold"] for row in rows} - {None})
    findings = sorted({name for row in rows for name in row["findings"] or []})
    patients = {row["patient_id"] for row in rows} - {None}
    return {
        "seen": len(rows) + len(rejected),
        "kept": len(rows),
        "rejected": tally(row["reason"] for row in rejected),
        "upsampled": sum(is_upsampled(row["width"], row["height"], row["geometry"], resolution) for row in rows),
        "geometry": tally(row["geometry"] for row in rows),
        "duplicates_across_patients": num_duplicates,
        "patients": len(patients) or None,
        "patients_per_fold": [len({row["patient_id"] for row in rows if row["fold"] == fold}) for fold in folds],
        "films_per_fold": [sum(row["fold"] == fold for row in rows) for fold in folds],
        "findings_per_fold": {
            name: [sum(row["fold"] == fold and name in (row["findings"] or []) for row in rows) for fold in folds]
            for name in findings
        },
        "views": tally(row["view"] or "unknown" for row in rows),
        "sexes": tally(row["sex"] or "unknown" for row in rows),
    }


def tally(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, by name."""
    return dict(sorted(Counter(values).items()))


def summary(output_dir: Path, counts: dict) -> str:
    """Return the figures that a person wants to see at the end, as a small table."""
    rejected = ", ".join(f"{reason} {number}" for reason, number in counts["rejected"].items())
    lines = [
        ("films seen", counts["seen"]),
        ("kept", counts["kept"]),
        ("rejected", f"{counts['seen'] - counts['kept']}{f' ({rejected})' if rejected else ''}"),
        ("upsampled", counts["upsampled"]),
        (
            "patients",
            counts["patients"] or "not known: no folds; train with --group_by image if each image is its own",
        ),
        ("films per fold", " ".join(map(str, counts["films_per_fold"])) or "none"),
        ("views", ", ".join(f"{view} {number}" for view, number in counts["views"].items())),
        ("copies across patients", counts["duplicates_across_patients"]),
    ]
    return "\n".join([f"{output_dir}:", *(f"    {name:<24}{value}" for name, value in lines)])


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
