"""From a mirror to finished films: fetched, taken out of archives, prepared, many at once, and nothing done twice."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from utils.archives import Archive, Unpacker, films_of_tar, films_of_zip
from utils.fetch import Arriving, Damaged, NotFetched, fetch_file
from utils.files import hold_lock, sha256_file, write_bytes
from utils.films import PREPROCESSING, Film, UnusableFilm, prepare_film
from utils.journal import is_finished
from utils.mirror import Mirror
from utils.refusal import Refused

DAMAGED = ("cannot be decoded", "no film in it")  # of a film that may have been cut short on its way without a word
MAX_AHEAD_BYTES, MAX_AHEAD_FILMS = 1 << 29, 4096  # fetched and not yet prepared
TARS = (".tgz", ".tar.gz")


@dataclass(frozen=True)
class Raw:
    """Where a film's file is or will be.

    Attributes:
        origin: what the finished film depends on: a film whose file was changed since is prepared again.
        is_packed: whether it comes out of an archive.
        is_kept: whether it stays when the film is finished: not where its archive does.
    """

    path: Path
    origin: dict
    is_packed: bool = False
    is_kept: bool = True


def locate(film: Film, mirror: Mirror, resolution: int) -> Raw:
    """Return where a film's raw file is or will be; one that is nowhere depends on no file."""
    made = {"resolution": resolution, "preprocessing": PREPROCESSING}
    downloaded = mirror.raw_dir / film.path
    if mirror.is_remote:
        sha256 = {"sha256": film.sha256} if film.sha256 else {}  # of a film that was published anew under its name
        origin = {"address": mirror.address(film.archive or film.path), **sha256, **made}
        if film.archive is None:
            return Raw(downloaded, origin)
        is_kept = not film.archive.endswith(TARS)  # a tar is kept itself; others are read in part
        return Raw(downloaded, {**origin, "member": film.path}, not (is_kept and downloaded.is_file()), is_kept)
    unpacked, archive = mirror.path(film.path), mirror.path(film.archive or "")
    is_packed = film.archive is not None and not unpacked.is_file() and archive.is_file()
    file = archive if is_packed else unpacked
    if file.is_file():
        status = file.stat()
        made = {"file": str(file.absolute()), "size": status.st_size, "mtime_ns": status.st_mtime_ns, **made}
    return Raw(downloaded, {**made, "member": film.path}, True, False) if is_packed else Raw(unpacked, made)


def archives_of(films: Iterable[Film], mirror: Mirror, md5s: dict[str, str], stop: threading.Event) -> list[Archive]:
    """Return the archives that hold some films, by name."""
    films, archives = list(films), []
    for name in sorted({film.archive for film in films}):
        wanted = {film.path: mirror.raw_dir / film.path for film in films if film.archive == name}
        called = mirror.called(name)
        if name.endswith(".zip"):
            archives.append(Archive(called, partial(mirror.open, name, stop), wanted, films_of_zip))
        elif mirror.is_remote:
            opener = partial(Arriving, mirror.client, called, mirror.raw_dir / name, stop, md5s.get(name))
            archives.append(Archive(called, opener, wanted, films_of_tar))
        else:
            archives.append(Archive(called, partial(open, called, "rb"), wanted, films_of_tar))
    return archives


def make_films(
    wanted: list[Film],
    mirror: Mirror,
    output_dir: Path,
    resolution: int,
    done: dict[str, dict],
    num_workers: int,
    md5s: dict[str, str],
    open_archives: Callable[[Iterable[Film], Mirror], list[Archive]] | None = None,
) -> Iterator[tuple[Film, dict | str]]:
    """Fetch and prepare films, many at once, and yield each with what is noted of it, or with the reason it is left out.

    An archive is read while it arrives, as far as its last wanted film. Finished films are neither fetched nor made again.

    Args:
        output_dir: the data folder.
        done: what earlier runs have noted, by file name.
        num_workers: films fetched at the same time.
        md5s: of whole archives, by name, where they were published.
        open_archives: of a source whose archives are no files.

    Raises:
        Refused: where another run fetches from the mirror, or an archive does not come or is damaged.
    """
    stop = threading.Event()
    raws = {film.file_name: locate(film, mirror, resolution) for film in wanted}
    needs_raw_dir = mirror.is_remote or any(raw.is_packed for raw in raws.values())
    raw_lock = hold_lock(mirror.raw_dir / ".lock") if needs_raw_dir else nullcontext()
    if raw_lock is None:
        raise Refused(
            f"another download.py is fetching from {mirror.place} into {mirror.raw_dir}; wait, or name another --cache_dir"
        )

    def is_there(film: Film) -> bool:
        return is_finished(output_dir, film, raws[film.file_name].origin, done)

    in_archives = [film for film in wanted if raws[film.file_name].is_packed]
    with ThreadPoolExecutor(num_workers) as pool:
        there = list(pool.map(is_there, in_archives))
    packed = {
        raws[film.file_name].path: film for film, finished in zip(in_archives, there, strict=True) if not finished
    }
    for path in packed:
        path.unlink(missing_ok=True)  # of a run that was killed, from an archive that may have changed since
    open_archives = open_archives or partial(archives_of, md5s=md5s, stop=stop)
    unpacker = Unpacker(open_archives(packed.values(), mirror), stop)

    def fetch(film: Film) -> tuple[Film, Path | NotFetched | None]:
        raw = raws[film.file_name]
        if raw.is_packed or is_there(film):
            return film, None
        if not mirror.is_remote:
            return film, local(film, raw.path)
        if raw.path.is_file():
            if film.sha256 in (None, sha256_file(raw.path)):
                return film, raw.path
            raw.path.unlink()
        try:
            fetch_file(mirror.client, mirror.address(film.path), raw.path, stop, sha256=film.sha256)
        except NotFetched as failure:
            return film, failure
        return film, raw.path

    def unpack() -> tuple[Film, Path | NotFetched]:
        path, found = unpacker.take()
        return packed[path], path if found else NotFetched("not in its archive")

    again = set()

    def prepare(film: Film, path: Path | None) -> dict | Callable:
        if path is None:
            return done[film.file_name]
        raw = raws[film.file_name]
        try:
            png, noted = prepare_film(path, resolution, bool(film.is_prepared))
        except UnusableFilm as fault:
            if mirror.is_remote and film.sha256 is None and str(fault) in DAMAGED:
                path.unlink()
                if film.archive is None and film.file_name not in again:
                    again.add(film.file_name)
                    return partial(fetch, film)
            raise
        finally:
            if not raw.is_kept:
                path.unlink(missing_ok=True)
        write_bytes(output_dir / film.file_name, png)
        sha256 = hashlib.sha256(png).hexdigest()
        return {"file_name": film.file_name, "origin": raw.origin, "sha256": sha256, **noted}

    single = [film for film in wanted if raws[film.file_name].path not in packed]
    tasks = [*(partial(fetch, film) for film in single), *[unpack] * len(packed)]
    try:
        with raw_lock, closing(fetch_and_prepare(tasks, prepare, num_workers, stop)) as finished:
            yield from finished
            unpacker.finish()
    except Damaged:
        # The next run is to make all its films again, also those that came out well as far as anybody can tell
        for film in wanted:
            if film.archive is not None and mirror.called(film.archive) == unpacker.damaged:
                (output_dir / film.file_name).unlink(missing_ok=True)
        raise


def local(film: Film, path: Path) -> Path | NotFetched:
    """Return the file of a film of a local mirror, or why there is none."""
    if not path.is_file():
        return NotFetched("not found")
    return path if film.sha256 in (None, sha256_file(path)) else NotFetched("wrong SHA-256")


def fetch_and_prepare(
    tasks: Sequence[Callable[[], tuple[Film, Path | NotFetched | None]]],
    prepare: Callable[[Film, Path | None], dict | Callable],
    num_workers: int,
    stop: threading.Event,
) -> Iterator[tuple[Film, dict | str]]:
    """Yield each film with what `prepare` returned, or with the reason why it is left out, as they get ready.

    Threads wait for the network in one pool and decode in another, a little more of them than there are cores (Pillow
    computes without the interpreter's lock). The network may be ahead of the decoder by MAX_AHEAD_BYTES of films on the disk, and
    no more. Any other error, or the end of the caller, stops both pools.

    Args:
        tasks: one a film; each returns a film with its raw file, with None where it is finished already, or with the
            reason why there is none.
        prepare: makes the finished film of the raw one, or returns a task that fetches it again.
    """
    num_preparers = (os.cpu_count() or 1) + 2  # while some wait for the disk
    fetchers, preparers = ThreadPoolExecutor(num_workers), ThreadPoolExecutor(num_preparers)
    ended = SimpleQueue()  # of futures; to wait for a set of them takes time for each of the set
    waiting, fetching, ahead, ahead_bytes = iter(tasks), set(), {}, 0
    num_fetched, is_whole = 0, False
    bar = tqdm(total=len(tasks), unit="film", disable=None)

    def start(pool: ThreadPoolExecutor, task: Callable, *args) -> Future:
        future = pool.submit(task, *args)
        future.add_done_callback(ended.put)
        return future

    try:
        while True:
            while len(fetching) < 2 * num_workers and len(ahead) < MAX_AHEAD_FILMS and ahead_bytes < MAX_AHEAD_BYTES:
                task = next(waiting, None)
                if task is None:
                    break
                fetching.add(start(fetchers, task))
            if not fetching and not ahead:
                is_whole = True
                return
            future = ended.get()
            if future in fetching:
                fetching.remove(future)
                film, path = future.result()
                if not isinstance(path, NotFetched):
                    num_fetched += 1
                    bar.set_postfix(fetched=num_fetched, refresh=False)
                    size = 0 if path is None else path.stat().st_size
                    ahead_bytes += size
                    ahead[start(preparers, prepare, film, path)] = film, size
                    continue
                result = str(path)
            else:
                film, size = ahead.pop(future)
                ahead_bytes -= size
                try:
                    result = future.result()
                except UnusableFilm as fault:
                    result = str(fault)
                if callable(result):
                    fetching.add(start(fetchers, result))
                    continue
            bar.update()
            yield film, result
    finally:
        if not is_whole:
            stop.set()
        fetchers.shutdown(cancel_futures=True)
        preparers.shutdown(cancel_futures=True)
        bar.close()
