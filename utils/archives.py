"""Single films out of large archives: of a tar as it arrives, of a zip by ranges, no more than the films asked for need.

Nothing in an archive decides where a file goes: each film goes where the caller said. Links, devices and members that
nobody asked for stay in the archive.
"""

import errno
import gzip
import io
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import Empty, Full, Queue
from typing import IO, Protocol

from utils.fetch import MAX_FILM_BYTES, MAX_TABLE_BYTES, Arriving, Damaged, NotFetched, Stopped
from utils.files import write_bytes
from utils.refusal import Refused

LITTLE_BYTES = 1 << 22  # of what is packed: so much is read beyond the last wanted film, for the checksum at the end
BLOCK_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 20  # of a long name or of attributes
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
MAX_WAITING = 64  # films on the disk that nobody has taken yet
PATIENCE_S = 0.1  # between looks at `stop`


class Readable(Protocol):
    """What an archive is read from: a file, or `fetch.Arriving`."""

    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Archive:
    """An archive, and which of its films are wanted.

    Attributes:
        name: for messages.
        open: gives its bytes: of a gzipped tar in order, read until the last wanted film has been found; of a zip
            anywhere.
        wanted: by path of a member, where it goes; in a tar the plain file name decides.
        take_out: puts the wanted films where they go and yields the path of each when it is there.
    """

    name: str
    open: Callable[[], Readable]
    wanted: Mapping[str, Path]
    take_out: Callable[["Archive"], Iterator[str]]


class Unpacker:
    """Takes films out of archives, one archive after another, in a thread of its own, and hands them over as they come.

    It rests while MAX_WAITING films are not taken, so that neither the disk nor the network runs ahead of the decoder.

    Attributes:
        damaged: name of an archive that turned out not to be what was published, None where none did.
    """

    def __init__(self, archives: Sequence[Archive], stop: threading.Event):
        """Start to unpack; `stop`, set from another thread, ends it, and whoever waits, with Stopped."""
        self._archives, self._stop = archives, stop
        self._taken_out: Queue[tuple[Path, bool]] = Queue(MAX_WAITING)
        self._failure: BaseException | None = None
        self.damaged: str | None = None
        self._thread = threading.Thread(target=self._work, name="unpacking", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Path, bool]:
        """Return the place of the next film, and whether its archive had it; to be called once a wanted film.

        Raises:
            Refused: for an archive that does not come or cannot be used.
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
        name = None
        try:
            for archive in self._archives:
                name, missing = archive.name, dict(archive.wanted)
                for member in archive.take_out(archive):
                    self._hand_over(missing.pop(member), True)
                for path in missing.values():
                    self._hand_over(path, False)
        except BaseException as error:  # for whoever takes the next film
            self.damaged = name if isinstance(error, Damaged) else None
            self._failure = error

    def _hand_over(self, path: Path, found: bool) -> None:
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                return self._taken_out.put((path, found), timeout=PATIENCE_S)
            except Full:
                pass


class Header(tarfile.TarInfo):
    """A member's header, read strictly: tarfile takes a damaged one for the end, and one of any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise  # the block of zeros that ends an archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged: {error}") from error
        if header.type in LONG_HEADERS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            cls._proc_gnusparse_10()
        return header

    @staticmethod
    def _proc_gnusparse_10(*_) -> None:
        """Refuse a file with holes: tarfile takes the list of them into memory, however long. No film has any."""
        raise tarfile.ReadError("a file with holes")


def films_of_tar(archive: Archive) -> Iterator[str]:
    """Put the wanted films of a gzipped tar where they go, and yield the path of each when it is there.

    Raises:
        Refused: where the archive does not come, is none, is damaged, or has a member that is too large for a film.
    """
    missing = {PurePosixPath(path).name: path for path in archive.wanted}
    with closing(archive.open()) as file:
        try:
            with gzip.GzipFile(fileobj=file) as plain, tarfile.open(fileobj=plain, mode="r|", tarinfo=Header) as tar:
                while missing and (member := tar.next()) is not None:
                    if member.size > MAX_FILM_BYTES:
                        raise Refused(
                            f"{archive.name}: {member.name[:100]} has {member.size} bytes; no film is that large"
                        )
                    film = PurePosixPath(member.name).name
                    if film in missing and member.isreg():
                        path = missing.pop(film)
                        write_bytes(archive.wanted[path], tar.extractfile(member).read())
                        yield path
                # Where little is left, to the end: only there does a checksum tell whether the films are what was packed
                for _ in range(LITTLE_BYTES // BLOCK_BYTES):
                    if not plain.read(BLOCK_BYTES):
                        break
        except NotFetched as failure:
            raise Refused(f"{archive.name}: {failure}; the same command goes on from here") from failure
        except Refused:
            raise
        # The last two: of attributes that are no numbers, and of headers that announce one another without end
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
            if isinstance(file, Arriving):
                file.discard()
                remedy = "what had come of it was deleted, run this again"
            else:
                remedy = "put a whole one in its place"
            raise Damaged(f"{archive.name} cannot be unpacked ({error}); {remedy}") from error


class Zip(zipfile.ZipFile):
    """A zip archive whose faults are all `Refused`, and of which no member fills the memory, whatever it says of itself."""

    def __init__(self, file: IO[bytes], name: str):
        """Read the table of contents; `name` is for messages."""
        self.called = name
        with refusing(name):
            super().__init__(file)

    def read(self, member: str | zipfile.ZipInfo) -> bytes:
        """Return a member's content, which its checksum fits."""
        with refusing(self.called):
            info = member if isinstance(member, zipfile.ZipInfo) else self.getinfo(member)
            if info.file_size > MAX_FILM_BYTES:
                raise Refused(
                    f"{self.called}: {info.filename[:100]} has {info.file_size} bytes; no film is that large"
                )
            if info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):  # the others unpack without a limit
                raise zipfile.BadZipFile(f"compression {info.compress_type}")
            with self.open(info) as file:
                return file.read(info.file_size)  # no more, where the size is a lie


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn what goes wrong in reading a zip archive into `Refused`."""
    try:
        yield
    except Refused:
        raise
    except NotFetched as failure:
        raise Refused(f"{name}: {failure}; the same command goes on from here") from failure
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which says that a place lies before the file
            raise
        raise Damaged(f"{name} cannot be unpacked ({error}); fetch it again") from error


def films_of_zip(archive: Archive) -> Iterator[str]:
    """Put the wanted films of a zip where they go, in the order they lie in it, and yield the path of each.

    A member is known by its path, or where there is none of that path by its plain file name.

    Raises:
        Refused: where the archive does not come, is none, is damaged, or has a member that is too large for a film.
    """
    with refusing(archive.name), closing(archive.open()) as file, Zip(file, archive.name) as plain:
        by_path = {member.filename: member for member in plain.infolist()}
        by_name = {PurePosixPath(path).name: member for path, member in by_path.items()}
        found = {path: by_path.get(path) or by_name.get(PurePosixPath(path).name) for path in archive.wanted}
        films = [(member.header_offset, path, member) for path, member in found.items() if member is not None]
        for _, path, member in sorted(films, key=lambda film: film[:2]):
            write_bytes(archive.wanted[path], plain.read(member))
            yield path


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
