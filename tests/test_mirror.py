"""Mirrors: a folder and an address are read alike, and of an archive at an address no more than is asked for."""

import io
import threading
import zipfile
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.test_fetch import CONTENT, server  # noqa: F401
from utils.archives import Archive, films_of_zip
from utils.fetch import NotFetched, open_client, with_retries
from utils.mirror import Mirror, Ranged
from utils.refusal import Refused


def pack(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as plain:
        for name, content in members.items():
            plain.writestr(name, content)
    return archive.getvalue()


class Host:
    """Answers requests for one file, by ranges unless told otherwise, and notes what was asked for."""

    def __init__(self, content: bytes, gives_ranges: bool = True):
        self.content, self.gives_ranges, self.sent = content, gives_ranges, 0
        self.client = httpx.Client(transport=httpx.MockTransport(self.answer))

    def answer(self, request: httpx.Request) -> httpx.Response:
        span = request.headers.get("Range")
        if span is None or not self.gives_ranges:
            return httpx.Response(200, stream=httpx.ByteStream(self.content))
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        self.sent += len(body)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(self.content)}"}
        return httpx.Response(206, content=body, headers=headers)


def test_names_are_quoted_in_addresses() -> None:
    assert (
        Mirror("http://host/set", is_remote=True).address("a b/ü#1?.csv") == "http://host/set/a%20b/%C3%BC%231%3F.csv"
    )


def test_other_hosts_hold_what_the_table_of_addresses_says() -> None:
    mirror = Mirror("http://host/set", addresses={"table.csv": "http://other/t.csv"}, is_remote=True)
    assert mirror.address("table.csv") == "http://other/t.csv"
    assert mirror.address("film.png") == "http://host/set/film.png"


def test_tables_are_read_from_folder_and_address_alike(server, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "table.csv").write_bytes(CONTENT)
    folder = Mirror(str(tmp_path))
    with open_client(1) as client:
        address = Mirror(server.address, client, is_remote=True)
        assert folder.read("table.csv") == address.read("table.csv")
        server.script = [404]
        assert folder.read("absent.csv") is address.read("absent.csv") is None
        server.script = [403]
        with pytest.raises(Refused, match="403"):
            address.read("table.csv")


def test_a_file_at_an_address_is_read_anywhere() -> None:
    content = np.random.default_rng(0).bytes(100_000)
    host = Host(content)
    file = io.BufferedReader(Ranged(host.client, "http://host/a.zip", threading.Event()), 1000)
    for start, length in ((99_990, 50), (0, 10), (5, 3000), (50_000, 1), (50_001, 900)):
        file.seek(start)
        assert file.read(length) == content[start : start + length]
    assert file.seek(0, io.SEEK_END) == len(content) and file.read() == b""


@pytest.mark.parametrize("gives_ranges", [True, False])
def test_films_come_out_of_a_zip_at_an_address(
    gives_ranges: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    films = {f"set/CXR_png/{i}.png": np.random.default_rng(i).bytes(3_000_000) for i in range(12)}
    host = Host(pack(films | {"set/mask/3.png": b"mask"}), gives_ranges)
    mirror = Mirror("http://host", host.client, tmp_path / "raw", is_remote=True)
    wanted = {name: tmp_path / Path(name).name for name in ("set/CXR_png/7.png", "set/CXR_png/3.png")}
    archive = Archive("a.zip", lambda: mirror.open("a.zip", threading.Event()), wanted, films_of_zip)
    assert list(films_of_zip(archive)) == ["set/CXR_png/3.png", "set/CXR_png/7.png"]
    assert all(path.read_bytes() == films[name] for name, path in wanted.items())
    assert (tmp_path / "raw" / "a.zip").exists() is not gives_ranges
    assert host.sent < (5 * 4 << 20 if gives_ranges else 2)
    assert ("the whole is downloaded first" in capsys.readouterr().out) is not gives_ranges


def test_films_of_a_zip_are_known_by_path_or_else_by_name(tmp_path: Path) -> None:
    content = pack({"masks/a.png": b"mask", "films/a.png": b"film", "b.png": b"other"})
    wanted = {path: tmp_path / path for path in ("films/a.png", "12/b.png", "12/c.png")}
    archive = Archive("a.zip", lambda: io.BytesIO(content), wanted, films_of_zip)
    assert list(films_of_zip(archive)) == ["films/a.png", "12/b.png"]
    assert wanted["films/a.png"].read_bytes() == b"film" and wanted["12/b.png"].read_bytes() == b"other"


def test_a_zip_that_is_none_or_not_there_is_told_apart(tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path))
    assert mirror.open_zip("a.zip") is None
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(Refused, match="a.zip .* cannot be unpacked"):
        mirror.open_zip("a.zip")


def test_damaged_and_absurd_members_of_a_zip_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(pack({"a.png": CONTENT}))
    content[5000] ^= 1
    archive = Archive("a.zip", lambda: io.BytesIO(content), {"a.png": tmp_path / "a.png"}, films_of_zip)
    with pytest.raises(Refused, match="CRC"):
        list(films_of_zip(archive))
    assert not (tmp_path / "a.png").exists()
    monkeypatch.setattr("utils.archives.MAX_FILM_BYTES", 1000)
    with pytest.raises(Refused, match="no film is that large"):
        list(films_of_zip(archive))


def damaged(place: int, change: bytes, name: str = "a.png", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of one film, with a few bytes changed in its entry of the table of contents."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as plain:
        plain.writestr(name, CONTENT)
    content, begins = bytearray(packed.getvalue()), packed.getvalue().rindex(b"PK\1\2") + place
    content[begins : begins + len(change)] = change
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (damaged(8, b"\1"), "password required"),
        (damaged(24, (1000).to_bytes(4, "little")), "CRC"),  # a size that is a lie: no more is unpacked
        (damaged(46, b"\xff\xff", name="ä.png"), "'utf-8' codec"),
        (damaged(0, b"", compression=zipfile.ZIP_LZMA), "compression 14"),
        (damaged(46 + 5 + 16, b"\xff\xff"), "Invalid argument"),  # where the table of contents begins
    ],
    ids=("encrypted", "size", "name", "compression", "contents"),
)
def test_whatever_is_wrong_with_a_zip_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(Refused, match=f"a.zip .*{reason}"):
        Mirror(str(tmp_path)).open_zip("a.zip").read("a.png")


@pytest.mark.parametrize("body", [CONTENT[:50], iter([CONTENT] * 3)], ids=["short", "long"])
def test_a_range_that_is_not_what_it_says_is_asked_for_again(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.mirror.with_retries", partial(with_retries, first_wait_s=0.001))
    host = Host(CONTENT)
    file = Ranged(host.client, "http://host/a.zip", threading.Event())
    good, bad = host.answer, [body]

    def answer(request: httpx.Request) -> httpx.Response:
        response = good(request)
        headers = {"Content-Range": response.headers["Content-Range"]}
        return httpx.Response(206, content=bad.pop(), headers=headers) if bad else response

    file.client = httpx.Client(transport=httpx.MockTransport(answer))
    assert file.read(100) == CONTENT[:100] and not bad


def test_a_file_that_changes_meanwhile_is_not_stitched_together() -> None:
    host = Host(CONTENT)
    file = Ranged(host.client, "http://host/a.zip", threading.Event())
    host.content = CONTENT[:-5]
    with pytest.raises(NotFetched, match="changed"):
        file.readinto(memoryview(bytearray(100)))


def test_a_table_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.mirror.MAX_TABLE_BYTES", 1 << 20)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=iter([CONTENT] * 3)))
    with httpx.Client(transport=transport) as client, pytest.raises(Refused, match="more than 1048576 bytes"):
        Mirror("http://host", client, is_remote=True).read("table.csv")
