"""Films out of tar archives, from the disk and while they arrive from a server that breaks off."""

import gzip
import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.test_fetch import leftovers, server  # noqa: F401
from utils.archives import MAX_MEMBER_BYTES, MAX_WAITING, Archive, Unpacker
from utils.fetch import LITTLE_BYTES, Arriving, NotFetched, Stopped, open_client
from utils.refusal import Refused

FILMS = {f"film{i}.png": np.random.default_rng(i).bytes(200_000) for i in range(6)}


def pack(members: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for member in more:
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def take_out(content: bytes, folder: Path, *names: str) -> dict[str, NotFetched | None]:
    """Return by name of a film what came of taking it out."""
    stop = threading.Event()
    unpacker = Unpacker([Archive("films.tgz", lambda: io.BytesIO(content), paths(folder, names))], stop)
    try:
        return {path.name: failure for path, failure in (unpacker.take() for _ in names)}
    finally:
        stop.set()


def paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names}


def test_only_the_films_asked_for_come_out(tmp_path: Path) -> None:
    content = pack({f"NLMCXR_png/{name}": film for name, film in FILMS.items()})
    assert take_out(content, tmp_path, "film1.png", "film4.png") == {"film1.png": None, "film4.png": None}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: FILMS[name] for name in ("film1.png", "film4.png")
    }


def test_a_film_that_is_not_in_the_archive_is_not_fetched(tmp_path: Path) -> None:
    came = take_out(pack(FILMS), tmp_path, "film1.png", "film9.png")
    assert came["film1.png"] is None and str(came["film9.png"]) == "not in its archive"


def test_films_that_are_there_already_need_no_archive(tmp_path: Path) -> None:
    (tmp_path / "film1.png").write_bytes(b"here")
    assert take_out(b"no archive", tmp_path, "film1.png") == {"film1.png": None}
    assert (tmp_path / "film1.png").read_bytes() == b"here"


def test_an_archive_that_is_not_there_costs_its_films_alone(tmp_path: Path) -> None:
    def nowhere() -> io.BytesIO:
        raise NotFetched("not found")

    archives = [
        Archive("gone.tgz", nowhere, paths(tmp_path, ["film8.png"])),
        Archive("films.tgz", lambda: io.BytesIO(pack(FILMS)), paths(tmp_path, ["film3.png"])),
    ]
    unpacker = Unpacker(archives, threading.Event())
    came = [(path.name, failure and str(failure)) for path, failure in (unpacker.take(), unpacker.take())]
    assert came == [("film8.png", "not found"), ("film3.png", None)]


def test_unpacking_rests_while_nobody_takes_films(tmp_path: Path) -> None:
    many = {f"{i}.png": b"film" for i in range(3 * MAX_WAITING)}
    unpacker = Unpacker([Archive("a.tgz", lambda: io.BytesIO(pack(many)), paths(tmp_path, many))], threading.Event())
    first = unpacker.take()
    time.sleep(0.5)
    assert MAX_WAITING <= len(list(tmp_path.iterdir())) <= MAX_WAITING + 3
    came = {first[0].name} | {unpacker.take()[0].name for _ in range(len(many) - 1)}
    assert came == set(many)


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_nothing_in_an_archive_decides_where_a_file_goes(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    outside = {"../escaped.png": b"1", "/tmp/../absolute.png": b"2", "../../film1.png": FILMS["film1.png"]}
    content = pack(outside, link("film1.png", "/etc/passwd"), link("raw", str(tmp_path)))
    assert take_out(content, folder, "film1.png") == {"film1.png": None}
    assert (folder / "film1.png").read_bytes() == FILMS["film1.png"]
    assert not (folder / "film1.png").is_symlink()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["film1.png"]


def bomb() -> bytes:
    member = tarfile.TarInfo("bomb.png")
    member.size = MAX_MEMBER_BYTES + 1
    return gzip.compress(member.tobuf() + bytes(1 << 20))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an archive at all" * 99, "cannot be unpacked"),
        (b"", "cannot be unpacked"),
        (pack(FILMS)[:500_000], "cannot be unpacked"),
        (bomb(), "no film is that large"),
    ],
)
def test_archives_that_cannot_be_used_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason):
        take_out(content, tmp_path, "film5.png")
    assert not (tmp_path / "film5.png").exists()


def take_from(server, folder: Path, *names: str, **more) -> dict[str, NotFetched | None]:  # noqa: F811
    """Unpack from the server's archive, and wait until all is decided."""
    stop = threading.Event()
    with open_client(2) as client:
        opener = partial(Arriving, client, f"{server.address}/films.tgz", folder / "films.tgz", stop, **more)
        unpacker = Unpacker([Archive("films.tgz", opener, paths(folder, names))], stop)
        came = {path.name: failure for path, failure in (unpacker.take() for _ in names)}
        unpacker.finish()
        return came


@pytest.mark.parametrize("script", [[], ["breaks off", "breaks off"], [503, "breaks off", "ignores range"]])
def test_films_come_out_while_the_archive_arrives(script: list, server, tmp_path: Path) -> None:  # noqa: F811
    server.content, server.script = pack(FILMS), script
    assert take_from(server, tmp_path, *FILMS) == dict.fromkeys(FILMS)
    assert {name: (tmp_path / name).read_bytes() for name in FILMS} == FILMS


def test_no_more_of_an_archive_is_fetched_than_its_films_need(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS | {"rest": np.random.default_rng(9).bytes(2 * LITTLE_BYTES)})
    assert take_from(server, tmp_path, "film0.png") == {"film0.png": None}
    (part,) = leftovers(tmp_path / "films.tgz")
    assert 200_000 < part.stat().st_size < 2_000_000
    had = part.stat().st_size
    assert take_from(server, tmp_path, "film5.png") == {"film5.png": None}
    assert server.ranges == [None, f"bytes={had}-"]  # what had come was read from the disk
    assert (tmp_path / "film5.png").read_bytes() == FILMS["film5.png"]


def test_an_archive_that_is_nearly_there_is_made_whole(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS)
    take_from(server, tmp_path, "film0.png")
    assert (tmp_path / "films.tgz").read_bytes() == server.content and not leftovers(tmp_path / "films.tgz")


def test_a_whole_archive_is_compared_with_what_is_published(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS)
    with open_client(2) as client:
        for md5, kept in (("0" * 32, False), (hashlib.md5(server.content).hexdigest(), True)):
            file = Arriving(client, f"{server.address}/a.tgz", tmp_path / "a.tgz", threading.Event(), md5)
            with nullcontext() if kept else pytest.raises(Refused, match="published as 000"):
                while file.read(1 << 20):
                    pass
            file.close()
            assert (tmp_path / "a.tgz").exists() == kept and not leftovers(tmp_path / "a.tgz")


def test_who_waits_for_a_film_is_told_to_stop(tmp_path: Path) -> None:
    stop = threading.Event()
    unpacker = Unpacker([], stop)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        unpacker.take()


def test_an_archive_that_changes_on_the_way_is_not_stitched_together(server, tmp_path: Path) -> None:  # noqa: F811
    server.content, server.script = pack(FILMS), ["breaks off"]
    with open_client(2) as client:
        file = Arriving(client, f"{server.address}/films.tgz", tmp_path / "films.tgz", threading.Event())
        file.read(1000)
        server.content, server.etag = server.content[::-1], '"two"'
        with pytest.raises(NotFetched, match="changed on the server"):
            while file.read(1 << 20):
                pass
        file.close()
