"""Films from a server that misbehaves in a fifth of its answers, kills in between, and inputs that are none."""

import io
import random
import signal
import time
import zlib
from functools import partial
from pathlib import Path

import pytest

import download
from tests.faulty_server import FINAL, SEEN, STATUSES, UNSEEN, FaultyServer, start_download
from tests.test_download import arguments, assert_same_folder, film, folder_mirror, run_here, write_table
from utils import transfer
from utils.files import read_jsonl, sha256_file
from utils.refusal import run

NUM_FILMS = 120
BAD = {"0.jpg": "cannot be decoded", "1.png": "cannot be decoded", "2.png": "too large"}  # on the server itself
OF_THE_SERVER = {
    "cannot be decoded", "wrong SHA-256", "transfer broken off", "changed on the server",
    *(f"server error {status}" for status in STATUSES), *(f"refused by the server ({status})" for status in FINAL),
}  # fmt: skip


def half_a_jpeg() -> bytes:
    whole = io.BytesIO()
    film(0, 200).save(whole, "JPEG")
    return whole.getvalue()[: whole.tell() // 2]


def huge_png() -> bytes:
    """Return a whole PNG of 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    side, packer = 60_000, zlib.compressobj(1)
    rows = bytes(1000 * (1 + side // 8))  # of one bit a pixel
    pixels = b"".join([*(packer.compress(rows) for _ in range(side // 1000)), packer.flush()])
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """Return a folder of films, every third a JPEG, which has no checksum of its own: the table has its hash."""
    directory = tmp_path_factory.mktemp("mirror")
    rows = []
    for number in range(NUM_FILMS):
        path = directory / f"{number}.{'png' if number % 3 else 'jpg'}"
        film(number, 200).save(path)
        rows.append({"file_name": path.name, "text": f"Film {number}.", "patient_id": f"p{number // 2}"})
        rows[-1]["sha256"] = None if number % 3 or path.name in BAD else sha256_file(path)
    for name, content in zip(BAD, (half_a_jpeg(), b"no film", huge_png()), strict=True):
        (directory / name).write_bytes(content)
    write_table(directory, rows)
    return directory


@pytest.fixture(scope="module")
def unbroken(mirror, tmp_path_factory) -> Path:
    """Return the data folder of a run from a server that behaves."""
    directory = tmp_path_factory.mktemp("unbroken")
    with FaultyServer(mirror) as server:
        finish(arguments(directory, server.address))
    data = directory / "data"
    assert {row["source_id"]: row["reason"] for row in read_jsonl(data / "rejected.jsonl")} == BAD
    return data


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def finish(argv: list[str]) -> None:
    process = start_download(argv)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr


def rejected_by_the_server(data: Path) -> dict[str, str]:
    """Return the reasons of films that are whole on the server."""
    rows = read_jsonl(data / "rejected.jsonl")
    return {row["source_id"]: row["reason"] for row in rows if row["source_id"] not in BAD}


def test_films_arrive_whole_or_are_listed_as_refused(mirror, unbroken, tmp_path):
    whole = {row["file_name"]: row["sha256"] for row in read_jsonl(unbroken / "metadata.jsonl")}
    with FaultyServer(mirror, share=0.2, seed=2, faults=(*SEEN, *UNSEEN), rare=FINAL) as server:
        argv = arguments(tmp_path, server.address)
        finish(argv)
        data = tmp_path / "data"
        kept = read_jsonl(data / "metadata.jsonl")
        assert len(kept) + len(read_jsonl(data / "rejected.jsonl")) == NUM_FILMS
        assert len(kept) > 100
        assert [whole[row["file_name"]] for row in kept] == [sha256_file(data / row["file_name"]) for row in kept]
        assert set(rejected_by_the_server(data).values()) <= OF_THE_SERVER
        assert set(server.behaved) == {"well", *SEEN, *UNSEEN, *FINAL}

        # What the server did not give, the same command asks for again
        server.share = 0
        finish(argv)
        assert_same_folder(unbroken, data)


def test_killed_at_random_among_faults_the_folder_ends_the_same(mirror, unbroken, tmp_path):
    with FaultyServer(mirror, share=0.2, seed=3, faults=(*SEEN, *UNSEEN)) as server:
        argv = arguments(tmp_path, server.address, "--num_workers", "8")
        for least, most in ((10, 40), (50, 80), (90, 110)):
            num_asked, process = random.randint(least, most), start_download(argv)
            while server.asked.total() < num_asked and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, num_asked
        finish(argv)
        for _ in range(3):  # a film may be unlucky six times
            if rejected_by_the_server(tmp_path / "data"):
                finish(argv)
    assert_same_folder(unbroken, tmp_path / "data")


def misbehave(server: FaultyServer, faults: dict[str, list[str]]) -> None:
    """Make the server's answers bad as listed by path, and good when the list is used up."""
    waiting = {path: list(listed) for path, listed in faults.items()}

    def next_fault(path: str) -> tuple[str | None, random.Random]:
        server.asked[path] += 1
        return (waiting[path].pop(0) if waiting.get(path) else None), random.Random(0)

    server.next_fault = next_fault


def test_a_film_damaged_on_its_way_is_fetched_once_more(tmp_path):
    mirror = folder_mirror(tmp_path / "films", 12)
    film(6).save(mirror / "6.png", "JPEG")  # swapped bytes in it can be decoded: the table has its hash
    rows = read_jsonl(mirror / "metadata.jsonl")
    for number in (6, 7):
        rows[number]["sha256"] = sha256_file(mirror / f"{number}.png")
    (mirror / "8.png").write_text("no film")
    rows[8]["sha256"] = sha256_file(mirror / "8.png")
    write_table(mirror, rows)
    short, swaps = "says too short a length", "swaps two bytes"
    faults = {3: [short], 4: [short] * 9, 5: [swaps], 6: [swaps], 7: [short], 9: [short, "403"]}
    with FaultyServer(mirror) as server:
        misbehave(server, {f"/{number}.png": listed for number, listed in faults.items()})
        data = run_here(tmp_path, server.address)
        asked = {int(path[1:-4]): times for path, times in server.asked.items() if path.endswith(".png")}
        assert asked == dict.fromkeys(range(12), 1) | {3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 9: 2}
        assert read_jsonl(data / "rejected.jsonl") == [
            {"source": "folder", "source_id": "4.png", "reason": "cannot be decoded"},
            {"source": "folder", "source_id": "8.png", "reason": "cannot be decoded"},
            {"source": "folder", "source_id": "9.png", "reason": "refused by the server (403)"},
        ]
        misbehave(server, {})
        run_here(tmp_path, server.address)
        assert_same_folder(run_here(tmp_path / "local", mirror), data)


def test_a_host_that_goes_away_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "fetch_file", partial(transfer.fetch_file, first_wait_s=0.01))
    mirror = folder_mirror(tmp_path / "films", 30)
    with FaultyServer(mirror) as server:

        def next_fault(path: str) -> tuple[str | None, random.Random]:
            server.asked[path] += 1
            if server.asked.total() > 10:
                server.server_close()
                return "drops before the answer", random.Random(0)
            return None, random.Random(0)

        server.next_fault = next_fault
        argv = arguments(tmp_path, server.address)
        assert run(download.main, lambda: download.parse_args(argv)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "cannot connect" in message and "goes on from here" in message


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("metadata.csv", "file_name,caption\n0.png,A film.\n", "lacks text; it has file_name, caption"),
        ("metadata.csv", f"file_name,{'x' * 100_000}\n0.png,A film.\n", "lacks text; it has file_name, xxx"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "A."}\n' * 2, "0.png is in the table twice"),
        (
            "metadata.jsonl",
            f'{{"file_name": "0.png", "text": "{"x" * 10_000_000}"}}\n',
            "text has 10000000 characters",
        ),
        ("metadata.csv", f"file_name,text\n0.png,{'x' * 10_000_000}\n", "field larger than field limit"),
        ("metadata.jsonl", f'{{"file_name": "{"x" * 100_000}", "text": "A."}}\n', "longer than 200 bytes"),
        ("metadata.csv", "file_name,text\n../0.png,A film.\n", "climbs out of its folder"),
        ("metadata.csv", "file_name,text\n/0.png,A film.\n", "is an absolute path"),
    ],
)
def test_tables_that_cannot_be_used_are_one_line(table, content, message, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / table).write_text(content)
    argv = arguments(tmp_path, tmp_path / "films")
    assert run(download.main, lambda: download.parse_args(argv)) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and len(line) < 1100
