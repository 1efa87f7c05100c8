"""Files from a mirror: a local folder, read in place, or an address, downloaded so that a kill at any time costs nothing.

A file has its final name only when it is whole. What has come so far lies in `.part/` beside it, under a name that
holds the version the server gave (ETag, date, size), so that two versions are never stitched together.
"""

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from utils.files import sha256_file
from utils.refusal import Refused

TIMEOUT_S = 20.0  # without a single byte
MAX_WAIT_S = 30.0
SLOWEST_BYTES_S = 1000  # a film that trickles in would hold up a run for days
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
MAX_CONNECTIONS = 32  # a source lies on one host, as a rule
not_before: dict[str, float] = {}  # by host, on the clock of time.monotonic: it has asked all of us to wait
MAX_FILM_BYTES = 1 << 28  # four times the largest film in use; a server may also send without end
MAX_TABLE_BYTES = 1 << 28


class NotFetched(Exception):
    """A file the mirror does not give; the message is the reason, in words that can be counted."""


class Damaged(Refused):
    """A file that came, and is not what was published: what was taken out of it may be wrong as well."""


class Stopped(Exception):
    """The run is ending; nobody waits for this file any more."""


class TryAgain(Exception):
    """What may well succeed a moment later."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


def is_address(mirror: str) -> bool:
    """Return whether the mirror is an http(s) address rather than a folder."""
    return mirror.lower().startswith(("http://", "https://"))


def check_mirror(mirror: str) -> str:
    """Return the mirror without a slash at its end; refuse what is neither an http(s) address nor a folder."""
    if is_address(mirror):
        try:
            host = httpx.URL(mirror).host
        except httpx.InvalidURL:
            host = ""
        if not host:
            raise Refused(f"--mirror {mirror} is no address; expected something like https://host/folder")
        return mirror.rstrip("/")
    if "://" in mirror:
        raise Refused(f"--mirror {mirror}: only http:// and https:// addresses and local folders can be read")
    folder = Path(mirror).expanduser()
    if not mirror or not folder.is_dir():
        raise Refused(f"--mirror {mirror} is not a folder; expected an existing folder or an http(s) address")
    return str(folder)


def open_client(num_connections: int) -> httpx.Client:
    """Return the one client that all threads share: no more transfers at once than asked for, or than a host should bear."""
    most = min(num_connections, MAX_CONNECTIONS)
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    timeout = httpx.Timeout(TIMEOUT_S, pool=None)
    return httpx.Client(limits=limits, timeout=timeout, follow_redirects=True)


def fetch_file(
    client: httpx.Client,
    address: str,
    path: Path,
    stop: threading.Event,
    sha256: str | None = None,
    first_wait_s: float = FIRST_WAIT_S,
    is_film: bool = True,
) -> None:
    """Download a file, going on where an earlier attempt ended, unless it is there already.

    Args:
        path: its final name, which it gets when it is whole.
        stop: set it from another thread and the transfer ends with `Stopped` at the next block.
        sha256: 64 hexadecimal digits, where known; the server's Content-Length is checked in any case.
        is_film: whether it may have as many bytes as a film at most.

    Raises:
        NotFetched: not there, not allowed, too large, or still broken after several attempts.
        Refused: where the host cannot be reached.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with_retries(lambda: fetch_once(client, address, path, stop, sha256, is_film), address, stop, first_wait_s)


def with_retries(transfer, address: str, stop: threading.Event, first_wait_s=FIRST_WAIT_S, attempts=ATTEMPTS):
    """Call `transfer()` until it succeeds, waiting about twice as long each time, and return what it returned."""
    host = address.split("/")[2]
    for attempt in range(attempts):
        if (pause_s := not_before.get(host, 0.0) - time.monotonic()) > 0 and stop.wait(
            pause_s * random.uniform(1, 1.2)
        ):
            raise Stopped
        try:
            return transfer()
        except TryAgain as failure:
            reason, wait_s = str(failure), min(failure.wait_s, MAX_WAIT_S)
            if wait_s:
                not_before[host] = max(time.monotonic() + wait_s, not_before.get(host, 0.0))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason, wait_s = f"cannot connect ({error})", 0.0
        except httpx.TransportError:
            reason, wait_s = "transfer broken off", 0.0
        except (httpx.RequestError, httpx.InvalidURL):
            raise NotFetched("no proper answer from the server") from None
        if attempt + 1 < attempts:
            # Jitter, so that the threads do not all come back at the same moment
            wait_s = max(wait_s, first_wait_s * 2**attempt * random.uniform(0.5, 1.5))
            if stop.wait(min(wait_s, MAX_WAIT_S)):
                raise Stopped
    if reason.startswith("cannot connect"):
        raise Refused(f"{address}: {reason}; check --mirror and the network, the same command then goes on from here")
    raise NotFetched(reason)


def check_status(response: httpx.Response) -> None:
    """Sort the answers of a server into usable, to be tried again and hopeless."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(f"server error {status}", wait_s=seconds_until(response.headers.get("Retry-After", "")))
    if status in (404, 410):
        raise NotFetched("not found")
    if status not in (200, 206):
        raise NotFetched(f"refused by the server ({status})")


def seconds_until(retry_after: str) -> float:
    """Return the seconds that a server asks us to wait, which it says in seconds or as a date; 0 for anything else."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def fetch_once(
    client: httpx.Client,
    address: str,
    path: Path,
    stop: threading.Event,
    sha256: str | None,
    is_film: bool,
) -> None:
    """Ask for what is missing of a file, append it, and give the file its final name if that makes it whole."""
    since = None
    for part, total in receive(client, address, path, stop):
        length = part.stat().st_size
        if is_film and max(total or 0, length) > MAX_FILM_BYTES:
            part.unlink()
            raise NotFetched("too large")
        now = time.monotonic()
        if since is None:
            since, had = now, length
        elif now - since > TIMEOUT_S:
            if length - had < SLOWEST_BYTES_S * (now - since) and length != total:
                raise TryAgain("too slow")
            since, had = now, length
    check_whole(part, total, sha256)
    part.replace(path)


def receive(
    client: httpx.Client, address: str, path: Path, stop: threading.Event
) -> Iterator[tuple[Path, int | None]]:
    """Ask for what is missing of a file and append it to its part.

    Yields:
        The part, and the size of the whole file where the server says it: when the server has answered, and again
        whenever more of the file is on the disk.
    """
    parts = path.parent / ".part"  # a folder of its own, so that looking for a part stays quick among many films
    parts.mkdir(exist_ok=True)
    known = sorted(candidate for candidate in parts.iterdir() if is_part_of(candidate, path))
    offset = known[0].stat().st_size if known else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges then count the file's own bytes
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with client.stream("GET", address, headers=headers) as response:
        if response.status_code == 416:
            if known and response.headers.get("Content-Range", "").rpartition("/")[2] == str(offset):
                yield known[0], offset  # it was whole already: a kill came before its checks
                return
            for stale in known:
                stale.unlink()
            raise TryAgain("range not understood")
        check_status(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise NotFetched("sent compressed")
        start, total = announced_range(response)
        part = parts / f"{path.name}.{version_of(response, total)}"
        if start and (start != offset or part not in known):
            for stale in known:
                stale.unlink()
            raise TryAgain("changed on the server")
        for stale in known:
            if stale != part:
                stale.unlink()
        with open(part, "ab" if start else "wb", buffering=0) as file:
            yield part, total
            for block in response.iter_raw():  # as it comes: what is gathered into larger blocks is lost in a break
                if stop.is_set():
                    raise Stopped
                file.write(block)
                yield part, total


class Arriving:
    """A file that can be read from its beginning while it is downloaded, as far as somebody reads.

    What has come is kept as `fetch_file` keeps it: the same file asked for again is read from the disk first.
    """

    def __init__(self, client: httpx.Client, address: str, path: Path, stop: threading.Event, md5: str | None = None):
        """Read the file at `address`; `path`, `stop` are those of `fetch_file`, `md5` is that of the whole file."""
        self.client, self.address, self.path, self.stop, self.md5 = client, address, path, stop, md5
        self.whole, self.part, self.total, self.blocks = path.exists(), None, None, None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "rb") if self.whole else None

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the end of the file.

        Raises:
            NotFetched: not there, not allowed, changed meanwhile, or still broken after several attempts.
            Refused: where the host cannot be reached, or the whole file has another MD5.
        """
        while True:
            data = self.file.read(size) if self.file else b""
            if data or self.whole:
                return data
            with_retries(self._grow, self.address, self.stop)

    def _grow(self) -> None:
        """Have one more block on the disk, or find that the file is whole."""
        try:
            self.blocks = self.blocks or receive(self.client, self.address, self.path, self.stop)
            part, self.total = next(self.blocks)
        except StopIteration:
            self.blocks = None
            check_whole(self.part, self.total, None)
            if self.md5 is not None and (found := md5_file(self.part)) != self.md5:
                self.part.unlink()
                raise Damaged(
                    f"{self.address}: MD5 {found}, published as {self.md5}; the file was deleted, run this again"
                ) from None
            self.part.replace(self.path)
            self.whole = True
        except BaseException:
            self.blocks = None  # the next attempt asks anew
            raise
        else:
            if self.part not in (None, part):
                raise NotFetched("changed on the server")
            self.part, self.file = part, self.file or open(part, "rb")

    def discard(self) -> None:
        """Delete what has come: it is not what it should be."""
        self.close()
        for path in (self.path, self.part):
            if path is not None:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.blocks is not None:
            self.blocks.close()
        if self.file is not None:
            self.file.close()


def md5_file(path: Path) -> str:
    """Return the MD5 of a file as 32 hexadecimal digits: what publishers of large archives give."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_part_of(candidate: Path, path: Path) -> bool:
    """Return whether a file is an unfinished download of `path`."""
    return candidate.name.rpartition(".")[0] == path.name


def announced_range(response: httpx.Response) -> tuple[int, int | None]:
    """Return where in the file the body begins and how long the whole file is, None where the server does not say."""
    if response.status_code == 200:
        return 0, whole_number(response.headers.get("Content-Length", ""))
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first, _, total = span.replace("-", "/").partition("/")
    start = whole_number(first)
    if unit != "bytes" or start is None:
        raise TryAgain("range not understood")
    return start, whole_number(total.rpartition("/")[2])


def whole_number(digits: str) -> int | None:
    """Return a number of bytes, None for what is none; Python itself refuses to read more than 4,300 digits."""
    return int(digits) if digits.isdecimal() and len(digits) < 20 else None


def version_of(response: httpx.Response, total: int | None) -> str:
    """Return eight digits that change when the file on the server does."""
    marks = [response.headers.get("ETag"), response.headers.get("Last-Modified"), total]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:8]


def check_whole(part: Path, total: int | None, sha256: str | None) -> None:
    """Compare an unfinished download with what is known of the file; keep a short one, remove a wrong one."""
    length = part.stat().st_size
    if total is not None and length < total:
        raise TryAgain("transfer broken off")
    if total is not None and length > total:
        part.unlink()
        raise TryAgain("wrong size")
    if sha256 is not None and sha256_file(part) != sha256:
        part.unlink()
        raise TryAgain("wrong SHA-256")
