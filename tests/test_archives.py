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

import httpx
import numpy as np
import pytest

from tests.test_fetch import leftovers, server  # noqa: F401
from utils.archives import LITTLE_BYTES, MAX_FILM_BYTES, MAX_WAITING, Archive, Unpacker, films_of_tar
from utils.fetch import Arriving, NotFetched, Stopped, open_client, version_of
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


def take_out(content: bytes, folder: Path, *names: str) -> dict[str, bool]:
    """Return by name of a film whether it came out."""
    stop = threading.Event()
    unpacker = Unpacker([Archive("films.tgz", lambda: io.BytesIO(content), paths(folder, names), films_of_tar)], stop)
    try:
        came = {path.name: found for path, found in (unpacker.take() for _ in names)}
        unpacker.finish()
        return came
    finally:
        stop.set()


def paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / name for name in names}


def test_only_the_films_asked_for_come_out(tmp_path: Path) -> None:
    content = pack({f"NLMCXR_png/{name}": film for name, film in FILMS.items()})
    assert take_out(content, tmp_path, "film1.png", "film4.png") == {"film1.png": True, "film4.png": True}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: FILMS[name] for name in ("film1.png", "film4.png")
    }


def test_a_film_that_is_not_in_the_archive_is_said_not_to_be(tmp_path: Path) -> None:
    assert take_out(pack(FILMS), tmp_path, "film1.png", "film9.png") == {"film1.png": True, "film9.png": False}


def test_an_archive_of_several_gzip_members_is_one(tmp_path: Path) -> None:
    content = gzip.decompress(pack(FILMS))
    halves = gzip.compress(content[:700_000]) + gzip.compress(content[700_000:])
    assert take_out(halves, tmp_path, *FILMS) == dict.fromkeys(FILMS, True)


def test_an_archive_that_does_not_come_is_refused(tmp_path: Path) -> None:
    """Not its films rejected one by one: the set would look whole."""

    class Nowhere(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise NotFetched("server error 503")

    archive = Archive("gone.tgz", Nowhere, paths(tmp_path, ["film8.png"]), films_of_tar)
    with pytest.raises(Refused, match="gone.tgz: server error 503; the same command goes on"):
        Unpacker([archive], threading.Event()).take()


def test_unpacking_rests_while_nobody_takes_films(tmp_path: Path) -> None:
    many = {f"{i}.png": b"film" for i in range(3 * MAX_WAITING)}
    unpacker = Unpacker(
        [Archive("a.tgz", lambda: io.BytesIO(pack(many)), paths(tmp_path, many), films_of_tar)], threading.Event()
    )
    first = unpacker.take()
    while len(list(tmp_path.iterdir())) < MAX_WAITING + 2:  # one taken, so many waiting, one at the door
        time.sleep(0.01)
    time.sleep(0.3)  # for more, if it did not rest
    assert len(list(tmp_path.iterdir())) == MAX_WAITING + 2
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
    assert take_out(content, folder, "film1.png") == {"film1.png": True}
    assert (folder / "film1.png").read_bytes() == FILMS["film1.png"]
    assert not (folder / "film1.png").is_symlink()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["film1.png"]


def bomb() -> bytes:
    member = tarfile.TarInfo("bomb.png")
    member.size = MAX_FILM_BYTES + 1
    return gzip.compress(member.tobuf() + bytes(1 << 20))


def damaged(place: int, stop: int | None = None) -> bytes:
    """Return a sound gzip of a tar with one byte changed, and cut short at `stop`."""
    content = bytearray(gzip.decompress(pack(FILMS)))
    content[place] ^= 1
    return gzip.compress(bytes(content[:stop]))


HEADER = 512 + 200_192  # of the second film


def long_name(size: int) -> bytes:
    member = tarfile.TarInfo("name")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return gzip.compress(member.tobuf() + bytes(1 << 20))


def attributes(times: int = 1, **sparse: str) -> bytes:
    """Return the head of a tar: a film after `times` headers of attributes."""
    film = tarfile.TarInfo("film5.png")
    film.pax_headers = {f"GNU.sparse.{name}": value for name, value in sparse.items()} or {"comment": "none"}
    header = film.tobuf(tarfile.PAX_FORMAT)
    return header[:-512] * times + header[-512:]


def holes() -> bytes:
    """Return the tar of a film with more holes than there is memory for, in GNU's old format."""
    member = tarfile.TarInfo("film5.png")
    member.type = tarfile.GNUTYPE_SPARSE
    return member.tobuf()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"not an archive at all" * 99, "cannot be unpacked", id="no archive"),
        pytest.param(b"", "cannot be unpacked", id="empty"),
        pytest.param(pack(FILMS)[:500_000], "cannot be unpacked", id="cut short"),
        pytest.param(bomb(), "no film is that large", id="bomb"),
        pytest.param(damaged(HEADER + 5), "damaged: bad checksum", id="checksum"),
        pytest.param(damaged(600, HEADER + 100), "damaged: truncated header", id="half a header"),
        pytest.param(damaged(600, HEADER), "damaged: empty header", id="no header"),
        pytest.param(long_name(1 << 30), "a header of 1073741824 bytes", id="long name"),
        pytest.param(gzip.compress(attributes(2000)), "recursion", id="many headers"),
        pytest.param(gzip.compress(attributes(map="a,b")), "invalid literal", id="sparse map"),
        pytest.param(
            gzip.compress(attributes(major="1", minor="0") + b"9999999999\n" + b"1\n" * 4000),
            "a file with holes",
            id="sparse, posix",
        ),
        pytest.param(gzip.compress(holes()), "a file with holes", id="sparse, gnu"),
    ],
)
def test_archives_that_cannot_be_used_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason):
        take_out(content, tmp_path, "film5.png")
    assert not (tmp_path / "film5.png").exists()


def test_a_wrong_checksum_is_found_after_the_last_film(tmp_path: Path) -> None:
    content = bytearray(pack(FILMS))
    content[-8] ^= 1
    with pytest.raises(Refused, match="CRC check failed"):
        take_out(bytes(content), tmp_path, "film5.png")


def take_from(server, folder: Path, *names: str, **more) -> dict[str, bool]:  # noqa: F811
    """Unpack from the server's archive, and wait until all is decided."""
    stop = threading.Event()
    with open_client(2) as client:
        opener = partial(Arriving, client, f"{server.address}/films.tgz", folder / "films.tgz", stop, **more)
        unpacker = Unpacker([Archive("films.tgz", opener, paths(folder, names), films_of_tar)], stop)
        came = {path.name: found for path, found in (unpacker.take() for _ in names)}
        unpacker.finish()
        return came


@pytest.mark.parametrize("script", [[], ["breaks off", "breaks off"], [503, "breaks off", "ignores range"]])
def test_films_come_out_while_the_archive_arrives(script: list, server, tmp_path: Path) -> None:  # noqa: F811
    server.content, server.script = pack(FILMS), script
    assert take_from(server, tmp_path, *FILMS) == dict.fromkeys(FILMS, True)
    assert {name: (tmp_path / name).read_bytes() for name in FILMS} == FILMS


def test_no_more_of_an_archive_is_fetched_than_its_films_need(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS | {"rest": np.random.default_rng(9).bytes(2 * LITTLE_BYTES)})
    assert take_from(server, tmp_path, "film0.png") == {"film0.png": True}
    (part,) = leftovers(tmp_path / "films.tgz")
    assert 200_000 < part.stat().st_size < LITTLE_BYTES + 2_000_000
    had = part.stat().st_size
    assert take_from(server, tmp_path, "film5.png") == {"film5.png": True}
    assert server.ranges == [None, f"bytes={had}-"]  # what had come was read from the disk
    assert (tmp_path / "film5.png").read_bytes() == FILMS["film5.png"]


def test_an_archive_that_is_nearly_there_is_made_whole(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS)
    take_from(server, tmp_path, "film0.png")
    assert (tmp_path / "films.tgz").read_bytes() == server.content and not leftovers(tmp_path / "films.tgz")


def test_a_kill_before_the_checks_does_not_fetch_an_archive_again(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS)
    take_from(server, tmp_path, "film0.png")
    part = tmp_path / ".part" / f"films.tgz.{version(server)}"
    (tmp_path / "films.tgz").rename(part)
    server.ranges.clear()
    assert take_from(server, tmp_path, "film0.png") == {"film0.png": True}
    assert server.ranges == [f"bytes={len(server.content)}-"] and (tmp_path / "films.tgz").exists()


def version(server) -> str:  # noqa: F811
    response = httpx.Response(200, headers={"ETag": server.etag})
    return version_of(response, len(server.content))


def test_a_damaged_part_is_deleted_so_that_the_next_run_has_it_anew(server, tmp_path: Path) -> None:  # noqa: F811
    server.content = pack(FILMS)
    take_from(server, tmp_path, "film0.png")
    whole = tmp_path / "films.tgz"
    whole.write_bytes(whole.read_bytes()[:300_000] + bytes(900_000))
    with pytest.raises(Refused, match="what had come of it was deleted"):
        take_from(server, tmp_path, "film5.png")
    assert take_from(server, tmp_path, "film5.png") == {"film5.png": True}


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
