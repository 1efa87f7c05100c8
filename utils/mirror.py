"""Where the files of a source lie: a local folder, read in place, or an address, read as far as is needed."""

import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO
from urllib.parse import quote

import httpx

from utils.archives import Zip, gunzip
from utils.fetch import (
    MAX_TABLE_BYTES,
    NotFetched,
    TryAgain,
    check_status,
    fetch_file,
    whole_number,
    with_retries,
)
from utils.refusal import Refused

FILM_BYTES = 1 << 22  # read at once of an archive at an address, where films are wanted of it
LINE_BYTES = 1 << 16  # and where small members are


class Mirror:
    """A folder or an address that holds a source's files under the names their owner gave them.

    Attributes:
        place: the folder, or the address without a slash at its end.
        is_remote: whether files must come from it before they can be read.
        raw_dir: where what is downloaded lies.
        columns: names that the table has for what the source knows under other names; None where nothing was said.
    """

    def __init__(
        self,
        place: str,
        client: httpx.Client | None = None,
        raw_dir: Path | None = None,
        addresses: Mapping[str, str] | None = None,
        columns: Mapping[str, str | None] | None = None,
        is_remote: bool = False,
    ):
        """Name a mirror; `addresses` has those of files that lie on other hosts. A folder needs `place` only."""
        self.place, self.client, self.raw_dir = place, client, raw_dir
        self.addresses, self.columns = addresses or {}, columns or {}
        self.is_remote = is_remote

    def theirs(self, **ours: str) -> dict[str, str]:
        """Return our name of each column by the table's own: `theirs(text="caption_column")` is {"report": "text"}."""
        return {self.columns.get(flag) or name: name for name, flag in ours.items()}

    def path(self, name: str) -> Path:
        """Return where a file of a local mirror lies."""
        return Path(self.place) / name

    def address(self, name: str) -> str:
        """Return the address of a file."""
        return self.addresses.get(name) or f"{self.place}/{quote(name)}"

    def called(self, name: str) -> str:
        """Return what a file is called in messages: where it lies."""
        return self.address(name) if self.is_remote else str(self.path(name))

    def read(self, name: str) -> bytes | None:
        """Return a small file as bytes, None where there is no such file.

        Raises:
            Refused: where the mirror does not answer or does not let us read.
        """
        if not self.is_remote and name not in self.addresses:
            path = self.path(name)
            try:
                return path.read_bytes() if path.is_file() else None
            except OSError as error:
                raise Refused(f"cannot read {path}: {error.strerror}") from None
        address = self.address(name)

        def get() -> bytes:
            content = bytearray()
            with self.client.stream("GET", address) as response:
                check_status(response)
                for block in response.iter_bytes():
                    content += block
                    if len(content) > MAX_TABLE_BYTES:
                        raise Refused(f"{address} has more than {MAX_TABLE_BYTES} bytes, which no table has")
            return bytes(content)

        try:
            return with_retries(get, address, threading.Event(), attempts=3)
        except NotFetched as failure:
            if str(failure) == "not found":
                return None
            raise Refused(f"cannot read {address}: {failure}; is --mirror right?") from None

    def read_packed(self, name: str) -> bytes | None:
        """Return a small file that may lie there as it is or with gzip, as `name.gz`; None where there is neither."""
        content = self.read(name)
        packed = self.read(f"{name}.gz") if content is None else None
        return content if packed is None else gunzip(name, packed)

    def open(self, name: str, stop: threading.Event, read_ahead: int = FILM_BYTES) -> IO[bytes] | None:
        """Return a file that can be read anywhere, None where there is no such file.

        One at an address is read by ranges; where the host gives none, it is downloaded whole first.

        Raises:
            Refused, NotFetched: where the mirror does not answer or does not let us read.
        """
        if not self.is_remote:
            return open(self.path(name), "rb") if self.path(name).is_file() else None
        downloaded = self.raw_dir / name
        try:
            if not downloaded.is_file():
                ranged = Ranged(self.client, self.address(name), stop)
                if ranged.size is not None:
                    return io.BufferedReader(ranged, read_ahead)
                print(f"{self.address(name)} gives no part of a file: the whole is downloaded first", flush=True)
                fetch_file(self.client, self.address(name), downloaded, stop, is_film=False)
        except NotFetched as failure:
            if str(failure) == "not found":
                return None
            raise
        return open(downloaded, "rb")

    def open_zip(self, name: str) -> Zip | None:
        """Return a zip archive to list and to read small members of, None where there is no such file."""
        try:
            file = self.open(name, threading.Event(), LINE_BYTES)
        except NotFetched as failure:
            raise Refused(f"cannot read {self.address(name)}: {failure}; is --mirror right?") from None
        return None if file is None else Zip(file, f"{name} of {self.place}")


class Ranged(io.RawIOBase):
    """A file at an address, read by ranges: of a zip archive, whose table of contents is at its end, just what is wanted.

    Attributes:
        size: in bytes, None where the host gives no ranges.
    """

    def __init__(self, client: httpx.Client, address: str, stop: threading.Event):
        self.client, self.address, self.stop = client, address, stop
        self.place, self.size = 0, None
        self.size = self._range(0, 0)[1]

    def _range(self, first: int, last: int) -> tuple[bytes, int | None]:
        """Return some bytes of the file, the last one included, and its size."""
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{last}"}

        def get() -> tuple[bytes, int | None]:
            with self.client.stream("GET", self.address, headers=headers) as response:
                check_status(response)
                span, _, total = response.headers.get("Content-Range", "").partition("/")
                size = whole_number(total)
                if response.status_code != 206 or span != f"bytes {first}-{last}" or size is None:
                    return b"", None
                data = bytearray()
                for block in response.iter_bytes():
                    data += block
                    if len(data) > last - first + 1:
                        break
            if len(data) != last - first + 1 and self.size in (None, size):
                raise TryAgain("wrong size")
            return bytes(data), size

        data, size = with_retries(get, self.address, self.stop)
        if self.size is not None and size != self.size:
            raise NotFetched("changed on the server")
        return data, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        length = min(len(buffer), self.size - self.place)
        if length <= 0:
            return 0
        data, _ = self._range(self.place, self.place + length - 1)
        buffer[:length] = data
        self.place += length
        return length
