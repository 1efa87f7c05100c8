"""Files that are either whole or absent: atomic writes, JSON lines, hashes."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.refusal import Refused


def canonical_json(value: Any) -> str:
    """Return JSON that is equal for equal values: sorted keys, no spaces, NaN refused with ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Have what goes wrong meanwhile name a file: a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that its name only ever shows the old or the whole new content, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with name_in_errors(path), open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk: a renamed file may else have its old name after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Raise OSError where no file can be written into a folder, existing or not, and leave nothing behind."""
    with name_in_errors(folder), tempfile.TemporaryFile(dir=nearest_existing(folder)) as file:
        file.write(bytes(4096))


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it will be written, existing or not.
        num_bytes: how much.
        what: that is written, such as "the latent cache".
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if num_bytes > free:
        raise Refused(
            f"{what} needs {num_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; make room, or choose "
            "a folder on another disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Key order is kept, so that a reader finds what matters first."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode())


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Append one JSON object a line and force them to the disk; a kill can tear the last line only."""
    with name_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict]:
    """Read one JSON object a line; a last line that a kill tore is left out.

    Raises:
        ValueError: for any other line that is not a JSON object, naming the line.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(), which also cuts at U+2028 inside a string
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object")
    return rows


def hold_lock(path: Path) -> IO | None:
    """Return an open file that nobody else can hold until it is closed or the process ends, None if somebody does.

    Where the file system has no locks, as some that clusters share, that is said, and nobody is kept off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        warnings.warn(
            f"{path.parent} has no locks ({error.strerror}): see to it that one command at a time writes there",
            stacklevel=2,
        )
    return lock
