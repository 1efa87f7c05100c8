"""Single films out of large tar archives, as the archive arrives: no more of it is read than the films asked for need.

Nothing in an archive decides where a file goes: members are known by their plain file name, and each goes where the
caller said. Links, devices and members that nobody asked for stay in the archive.
"""

import gzip
import io
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import Empty, Full, Queue
from typing import Protocol

from utils.fetch import Arriving, NotFetched, Stopped
from utils.files import write_bytes
from utils.refusal import Refused

MAX_MEMBER_BYTES = 1 << 28  # four times the largest film in use; what is larger is a mistake or a bomb
MAX_TABLE_BYTES = 1 << 28
MAX_WAITING = 64  # films on the disk that nobody has taken yet
PATIENCE_S = 0.1  # between looks at `stop`


class Readable(Protocol):
    """What an archive is read from: a file, or `fetch.Arriving`."""

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Archive:
    """A tar archive, and which of its films are wanted.

    Attributes:
        name: for messages.
        open: gives its bytes, in order; they are read until the last wanted film has been found.
        wanted: by plain file name of a member, where it goes. What is there already is not taken out again.
    """

    name: str
    open: Callable[[], Readable]
    wanted: Mapping[str, Path]


class Unpacker:
    """Takes films out of archives, one archive after another, in a thread of its own, and hands them over as they come.

    It rests while MAX_WAITING films are not taken, so that neither the disk nor the network runs ahead of the decoder.
    """

    def __init__(self, archives: Sequence[Archive], stop: threading.Event):
        """Start to unpack; `stop`, set from another thread, ends it, and whoever waits, with Stopped."""
        self._archives, self._stop = archives, stop
        self._taken_out: Queue[tuple[Path, NotFetched | None]] = Queue(MAX_WAITING)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="unpacking", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Path, NotFetched | None]:
        """Return the next film, and why it is not there, None where it is; to be called once a wanted film.

        Raises:
            Refused: for an archive that cannot be used.
            Stopped: when told to stop.
        """
        while True:
            try:
                return self._taken_out.get(timeout=PATIENCE_S)
            except Empty:
                if self._failure is not None:
                    raise self._failure from None
                if self._stop.is_set():
                    raise Stopped from None

    def finish(self) -> None:
        """Wait for the end, when all films have been taken, and raise what went wrong after the last of them."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            for archive in self._archives:
                missing = dict(archive.wanted)
                failure = NotFetched("not in its archive")
                try:
                    for member in films_of(archive):
                        self._hand_over(missing.pop(member), None)
                except NotFetched as error:
                    failure = error
                for path in missing.values():
                    self._hand_over(path, failure)
        except BaseException as error:  # for whoever takes the next film
            self._failure = error

    def _hand_over(self, path: Path, failure: NotFetched | None) -> None:
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                return self._taken_out.put((path, failure), timeout=PATIENCE_S)
            except Full:
                pass


def films_of(archive: Archive) -> Iterator[str]:
    """Put the wanted films of an archive where they go, and yield the plain name of each when it is there.

    Raises:
        NotFetched: where the archive does not come.
        Refused: where it is none, is damaged, or has a member that is too large for a film.
    """
    missing = {member for member, path in archive.wanted.items() if not path.exists()}
    yield from archive.wanted.keys() - missing
    if not missing:
        return
    try:
        with closing(archive.open()) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            while missing and (member := tar.next()) is not None:
                if member.size > MAX_MEMBER_BYTES:
                    raise Refused(
                        f"{archive.name}: {member.name[:100]} has {member.size} bytes; no film is that large"
                    )
                film = PurePosixPath(member.name).name
                if film in missing and member.isreg():
                    write_bytes(archive.wanted[film], tar.extractfile(member).read())
                    missing.remove(film)
                    yield film
            if isinstance(file, Arriving):
                file.finish()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise Refused(
            f"{archive.name} cannot be unpacked ({error}); delete it, or check --mirror, and run this again"
        ) from error


def gunzip(name: str, content: bytes) -> bytes:
    """Return what a gzipped table holds.

    Raises:
        Refused: where it is damaged, or larger than any table of films.
    """
    try:
        with gzip.open(io.BytesIO(content)) as file:
            table = file.read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{name} cannot be unpacked ({error}); fetch it again") from None
    if len(table) > MAX_TABLE_BYTES:
        raise Refused(f"{name} unpacks to more than {MAX_TABLE_BYTES} bytes; fetch it again")
    return table
