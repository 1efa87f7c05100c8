"""Single films out of large tar archives, as the archive arrives: no more of it is read than the films asked for need.

Nothing in an archive decides where a file goes: members are known by their plain file name, and each goes where the
caller said. Links, devices and members that nobody asked for stay in the archive.
"""

import tarfile
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Protocol

from utils.fetch import NotFetched, Stopped
from utils.files import write_bytes
from utils.refusal import Refused

MAX_MEMBER_BYTES = 1 << 28  # four times the largest film in use; what is larger is a mistake or a bomb


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...

    def close(self) -> None: ...


def unpack(
    name: str, open_archive: Callable[[], Readable], wanted: Mapping[str, Path], stop: threading.Event
) -> dict[str, Future]:
    """Start to take films out of an archive, in a thread of its own, and return a future for each of them.

    Args:
        name: of the archive, for messages.
        open_archive: gives the archive's bytes, in order; it is read until the last film has been found.
        wanted: by plain file name of a member, where it goes. What is there already is not taken out again.
        stop: set it from another thread to end at the next member.

    Returns:
        By plain file name. A result is None: the film is there. NotFetched: it is not in the archive. Refused: the
        archive cannot be used. Stopped: it was told to.
    """
    futures = {member: Future() for member in wanted}
    missing = {member for member, path in wanted.items() if not path.exists()}
    for member in wanted.keys() - missing:
        futures[member].set_result(None)

    def work() -> None:
        try:
            with closing(open_archive()) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                while missing and (member := tar.next()) is not None:
                    if stop.is_set():
                        raise Stopped
                    if member.size > MAX_MEMBER_BYTES:
                        raise Refused(f"{name}: {member.name[:100]} has {member.size} bytes; no film is that large")
                    film = PurePosixPath(member.name).name
                    if film in missing and member.isreg():
                        write_bytes(wanted[film], tar.extractfile(member).read())
                        missing.remove(film)
                        futures[film].set_result(None)
            failure = NotFetched("not in its archive")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            failure = Refused(f"{name} cannot be unpacked ({error}); delete it, or check --mirror, and run this again")
        except BaseException as error:  # whoever waits for a film gets it
            failure = error
        for film in missing:
            futures[film].set_exception(failure)

    if missing:
        threading.Thread(target=work, name=f"unpacking {name}", daemon=True).start()
    return futures
