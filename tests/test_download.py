"""The script as a person runs it, on films made up here: what it writes, resumes, rejects and refuses."""

import argparse
import filecmp
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import download
from tests.conftest import HANG_S, ROOT
from utils import transfer
from utils.files import read_jsonl
from utils.metadata import dataset_hash, read_metadata
from utils.refusal import Refused

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def film(seed: int, side: int = 80) -> Image.Image:
    """A film without fine detail and unlike any other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def nih_mirror(directory: Path, num_films: int = 24) -> Path:
    """Write a mirror of the NIH set: two films a patient, every third without finding."""
    (directory / "images").mkdir(parents=True)
    lines = [NIH_HEADER]
    for number in range(num_films):
        name = f"{number // 2:08d}_{number % 2:03d}.png"
        findings = "No Finding" if number % 3 == 0 else "Edema|Mass"
        lines.append(f"{name},{findings},{number % 2},{number // 2},{40 + number},F,PA,80,80,0.1,0.1")
        film(number).save(directory / "images" / name)
    (directory / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    return directory


def folder_mirror(directory: Path, num_films: int = 10, **columns) -> Path:
    """Write a folder of films with a table, one patient each."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_films):
        film(number).save(directory / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"Film {number}.", "patient_id": f"p{number}"} | columns)
    write_table(directory, rows)
    return directory


def write_table(directory: Path, rows: list[dict]) -> None:
    (directory / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(tmp_path: Path, mirror: Path | str, *more: str, source: str = "folder") -> list[str]:
    return [
        *("--source", source, "--mirror", str(mirror), "--resolution", "64"),
        *("--output_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"), *more),
    ]


def run_here(tmp_path: Path, mirror: Path | str, *more: str, source: str = "folder") -> Path:
    """Run the script in this process and return the data folder."""
    assert download.main(download.parse_args(arguments(tmp_path, mirror, *more, source=source))) == 0
    return tmp_path / "data"


def start(argv: list[str]) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, ROOT / "download.py", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells have background jobs ignore
    )


def assert_same_folder(one: Path, other: Path) -> None:
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (one, other)]
    assert names[0] == names[1]
    files = [name for name in names[0] if (one / name).is_file()]
    assert filecmp.cmpfiles(one, other, files, shallow=False)[0] == files


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.startswith("/images/"):
            self.server.asked.append(self.path)
            time.sleep(self.server.delay_s)
        super().do_GET()


@pytest.fixture
def serve(monkeypatch):
    """Give a function that serves a folder and returns the server."""
    servers = []
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def serve_folder(directory: Path, delay_s: float = 0.0) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        server.daemon_threads = True
        server.asked, server.delay_s, server.address = [], delay_s, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield serve_folder
    for server in servers:
        server.shutdown()
        server.server_close()


def test_data_folder_is_as_described(tmp_path):
    data = run_here(tmp_path, nih_mirror(tmp_path / "nih"), source="nih")
    rows = read_jsonl(data / "metadata.jsonl")
    assert list(rows[1]) == [
        *("file_name", "text", "patient_id", "group", "fold", "findings", "view", "age", "sex"),
        *("source", "source_id", "license", "sha256", "width", "height", "borders", "geometry", "burned_in_text"),
    ]
    assert rows[1]["file_name"] == "images/00000000_001.png"
    assert rows[1]["text"] == "PA chest radiograph of a 41-year-old woman. Edema and mass."
    assert (rows[1]["width"], rows[1]["height"], rows[1]["geometry"]) == (80, 80, "none")
    assert len({(row["patient_id"], row["fold"]) for row in rows}) == 12
    assert {row["fold"] for row in rows} == {0, 1, 2, 3, 4}
    image = Image.open(data / rows[1]["file_name"])
    assert (image.mode, image.size) == ("L", (64, 64))
    record = json.loads((data / "dataset.json").read_text())
    assert record["data_hash"] == dataset_hash(rows) == dataset_hash(read_metadata(data))
    assert record["counts"]["seen"] == record["counts"]["kept"] == 24
    assert record["counts"]["findings_per_fold"]["Edema"] == [
        sum(row["fold"] == fold and "Edema" in row["findings"] for row in rows) for fold in range(5)
    ]
    assert (data / "rejected.jsonl").read_text() == ""
    assert str(tmp_path) not in "".join(path.read_text() for path in data.glob("*.json*"))
    assert download.check_dataset(data) == []


def test_address_and_folder_give_the_same_bytes(tmp_path, serve):
    mirror = nih_mirror(tmp_path / "nih")
    (mirror / "images" / "00000003_000.png").unlink()
    local = run_here(tmp_path / "local", mirror, source="nih")
    remote = run_here(tmp_path / "remote", serve(mirror).address, source="nih")
    assert_same_folder(local, remote)
    assert read_jsonl(remote / "rejected.jsonl") == [
        {"source": "nih", "source_id": "00000003_000.png", "reason": "not found"}
    ]


def test_killed_at_any_instant_the_same_command_ends_in_the_same_bytes(tmp_path, serve):
    mirror = nih_mirror(tmp_path / "nih", 40)
    reference = run_here(tmp_path / "unbroken", mirror, source="nih")
    server = serve(mirror, delay_s=0.05)
    argv = arguments(tmp_path / "killed", server.address, "--num_workers", "2", source="nih")
    for num_asked in (4, 20):
        process = start(argv)
        while len(server.asked) < num_asked and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "data" / "metadata.jsonl").exists()
    process = start(argv)
    assert process.wait() == 0, process.stderr.read()
    assert_same_folder(reference, tmp_path / "killed" / "data")
    assert len(server.asked) < 40 + 2 * 4  # what had arrived was not asked for again


def test_interrupt_ends_with_130_and_loses_nothing(tmp_path, serve):
    mirror = nih_mirror(tmp_path / "nih", 40)
    server = serve(mirror, delay_s=0.1)
    process = start(arguments(tmp_path, server.address, "--num_workers", "2", source="nih"))
    while len(server.asked) < 6:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    status, said = process.wait(), process.stderr.read()
    assert status == 130 and "interrupted" in said, (status, len(server.asked), said)
    assert len(server.asked) < 40
    server.delay_s = 0
    run_here(tmp_path, server.address, source="nih")
    assert len(set(server.asked)) == 40 and len(server.asked) < 50


def test_finished_films_are_not_prepared_again(tmp_path, monkeypatch):
    mirror = folder_mirror(tmp_path / "films")
    data = run_here(tmp_path, mirror)
    before = {path.name: path.stat().st_mtime_ns for path in (data / "images").iterdir()}
    film(99).save(mirror / "3.png")
    (data / "images" / "5.png").unlink()
    (data / "images" / "6.png").write_bytes(b"damaged")
    run_here(tmp_path, mirror)
    after = {path.name: path.stat().st_mtime_ns for path in (data / "images").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"3.png", "5.png", "6.png"}
    assert download.check_dataset(data) == []


def test_a_torn_journal_is_mended(tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    data = run_here(tmp_path, mirror)
    journal = next((tmp_path / "cache" / "journal").glob("*.jsonl"))
    whole = journal.read_bytes()
    (data / "dataset.json").unlink()
    for length in (len(whole) - 30, len(whole) // 2, 40):
        journal.write_bytes(whole[:length])
        if length > 40:
            run_here(tmp_path, mirror)
            assert len(read_jsonl(journal)) == 11
            (data / "dataset.json").unlink()
        else:
            with pytest.raises(Refused, match="did not write"):
                run_here(tmp_path, mirror)


def test_unusable_films_are_rejected_and_counted(tmp_path):
    mirror = folder_mirror(tmp_path / "films", 12)
    (mirror / "1.png").write_bytes((mirror / "1.png").read_bytes()[:200])
    (mirror / "2.png").unlink()
    Image.new("L", (80, 80)).save(mirror / "3.png")
    film(4, side=32).save(mirror / "4.png")
    data = run_here(tmp_path, mirror)
    assert read_jsonl(data / "rejected.jsonl") == [
        {"source": "folder", "source_id": "1.png", "reason": "cannot be decoded"},
        {"source": "folder", "source_id": "2.png", "reason": "not found"},
        {"source": "folder", "source_id": "3.png", "reason": "blank"},
        {"source": "folder", "source_id": "4.png", "reason": "smaller than 64 px"},
    ]
    counts = json.loads((data / "dataset.json").read_text())["counts"]
    assert (counts["seen"], counts["kept"], sum(counts["rejected"].values())) == (12, 8, 4)
    assert download.check_dataset(data) == []


def test_a_film_that_can_no_longer_be_used_leaves_the_set(tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    run_here(tmp_path, mirror)
    (mirror / "4.png").write_text("no film")
    data = run_here(tmp_path, mirror)
    assert not (data / "images" / "4.png").exists()
    assert download.check_dataset(data) == []


def test_lateral_films_are_left_out_and_said_so(tmp_path):
    mirror = folder_mirror(tmp_path / "films", 12, view="PA")
    rows = read_jsonl(mirror / "metadata.jsonl")
    rows[0]["view"], rows[1]["view"], rows[2]["view"] = "LL", "Lateral", None
    write_table(mirror, rows)
    data = run_here(tmp_path, mirror, "--limit", "11")
    assert [row["source_id"] for row in read_jsonl(data / "rejected.jsonl")] == ["0.png", "1.png"]
    assert len(read_jsonl(data / "metadata.jsonl")) == 9
    data = run_here(tmp_path, mirror, "--view", "all", "--overwrite")
    assert len(read_jsonl(data / "metadata.jsonl")) == 12


def test_films_without_patients_get_no_fold(tmp_path, capsys):
    mirror = folder_mirror(tmp_path / "films", 4)
    write_table(mirror, [{"file_name": f"{n}.png", "text": "A film."} for n in range(4)])
    rows = read_metadata(run_here(tmp_path, mirror))
    assert {(row["patient_id"], row["fold"]) for row in rows} == {(None, None)}
    assert "--group_by image" in capsys.readouterr().out


def test_copies_of_a_film_tie_their_patients_together(tmp_path):
    mirror = folder_mirror(tmp_path / "films", 20)
    film(2).save(mirror / "9.png", compress_level=1)
    film(2).save(mirror / "15.png", compress_level=0)
    rows = {row["source_id"]: row for row in read_metadata(run_here(tmp_path, mirror))}
    copies = [rows[name] for name in ("2.png", "9.png", "15.png")]
    assert {row["group"] for row in copies} == {"p15"}
    assert {row["patient_id"] for row in copies} == {"p2", "p9", "p15"}
    assert len({row["fold"] for row in copies}) == 1
    assert sum(row["group"] != row["patient_id"] for row in rows.values()) == 2


@pytest.mark.parametrize("change", [["--resolution", "128"], ["--seed", "1"], ["--num_folds", "2"], ["--limit", "8"]])
def test_another_set_is_refused_unless_overwritten(change, tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    data = run_here(tmp_path, mirror)
    before = (data / "dataset.json").read_bytes()
    with pytest.raises(Refused, match=f"{change[0][2:]} .*, not {change[1]}.*--overwrite"):
        run_here(tmp_path, mirror, *change)
    assert (data / "dataset.json").read_bytes() == before
    run_here(tmp_path, mirror, *change, "--overwrite")
    assert_same_folder(data, run_here(tmp_path / "fresh", mirror, *change))


def test_another_source_or_table_is_refused_unless_overwritten(tmp_path):
    data = run_here(tmp_path, folder_mirror(tmp_path / "films"))
    with pytest.raises(Refused, match="source folder, not nih"):
        run_here(tmp_path, nih_mirror(tmp_path / "nih"), source="nih")
    with pytest.raises(Refused, match="table is another"):
        run_here(tmp_path, folder_mirror(tmp_path / "others", sex="F"))
    run_here(tmp_path, tmp_path / "nih", "--overwrite", source="nih")
    assert_same_folder(data, run_here(tmp_path / "fresh", tmp_path / "nih", source="nih"))


def test_an_unfinished_set_is_protected_like_a_finished_one(tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    data = run_here(tmp_path, mirror)
    for name in ("dataset.json", "metadata.jsonl", "rejected.jsonl"):
        (data / name).unlink()
    with pytest.raises(Refused, match="resolution 64, not 128"):
        run_here(tmp_path, mirror, "--resolution", "128")


@pytest.mark.parametrize("name", ["metadata.jsonl", "images/mine.png", "notes.txt", "dataset.json"])
def test_files_of_others_are_never_overwritten(name, tmp_path):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(Refused, match="did not write"):
        run_here(tmp_path, folder_mirror(tmp_path / "films"), "--overwrite")
    assert path.read_text() == "{}"


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    data = run_here(tmp_path, mirror)
    with (
        download.lock_journal(download.journal_path(tmp_path / "cache", data)),
        pytest.raises(Refused, match="another"),
    ):
        run_here(tmp_path, mirror)


def test_check_finds_every_kind_of_damage(tmp_path):
    data = run_here(tmp_path, folder_mirror(tmp_path / "films", 12))
    rows = read_jsonl(data / "metadata.jsonl")
    (data / rows[0]["file_name"]).unlink()
    Image.open(data / rows[1]["file_name"]).convert("RGB").save(data / rows[1]["file_name"])
    (data / rows[2]["file_name"]).write_bytes(b"damaged")
    bomb = bytearray((data / rows[11]["file_name"]).read_bytes())
    bomb[16:24] = struct.pack(">2I", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (data / rows[11]["file_name"]).write_bytes(bomb)
    other = next(row for row in rows[4:] if row["fold"] != rows[3]["fold"])
    (data / rows[3]["file_name"]).write_bytes((data / other["file_name"]).read_bytes())
    film(50).save(data / "images" / "stray.png")
    (data / "rejected.jsonl").write_text('{"source_id": "x.png", "reason": "blank"}\n')
    faults = "\n".join(download.check_dataset(data))
    for expected in (
        f"{rows[0]['file_name']} is in the table but there is no such file",
        f"{rows[1]['file_name']} is not the file whose SHA-256",
        f"{rows[1]['file_name']}: mode is RGB",
        f"{rows[2]['file_name']}: cannot be decoded",
        f"{rows[11]['file_name']}: too large",
        "are one film",
        "images/stray.png is not in the table",
        "12 kept and 1 rejected are not the 12 seen",
        "dataset.json says rejected {}, found {'blank': 1}",
    ):
        assert expected in faults
    assert download.main(download.parse_args(["--check", str(data)])) == 1


def test_an_imagefolder_from_elsewhere_is_checked_too(tmp_path, capsys):
    mirror = folder_mirror(tmp_path / "films", 12)
    film(3, side=300).convert("RGB").crop((0, 0, 300, 200)).save(mirror / "3.png")
    assert download.main(download.parse_args(["--check", str(mirror)])) == 0
    assert "0 of 12 captions (0%)" in capsys.readouterr().out
    film(5).save(mirror / "7.png", compress_level=1)
    (mirror / "8.png").write_bytes(b"damaged")
    rows = read_jsonl(mirror / "metadata.jsonl")
    rows[2]["text"] = "Word " * 100 + "end."
    rows[4]["text"] = "A film. It is clear. " + "No effusion. " * 40
    write_table(mirror, rows)
    assert download.main(download.parse_args(["--check", str(mirror)])) == 1
    out = capsys.readouterr().out
    assert "2 of 12 captions (17%)" in out
    for fault in ("5.png and 7.png are one film", "8.png: cannot be decoded", "2.png: its caption begins with"):
        assert fault in out
    assert len(out.splitlines()) == 4


def test_terms_come_before_the_first_byte(tmp_path, capsys):
    with pytest.raises(Refused, match="is not a folder"):
        run_here(tmp_path, tmp_path / "absent", source="nih")
    assert "NIH Clinical Center" in capsys.readouterr().out


def test_restricted_terms_need_a_yes(tmp_path, monkeypatch):
    restricted = argparse.Namespace(NAME="closed", TERMS="Ask first.", RESTRICTED=True, EXAMPLE="")
    monkeypatch.setitem(download.SOURCES, "closed", restricted)
    with pytest.raises(Refused, match="--accept_license"):
        run_here(tmp_path, tmp_path, source="closed")


def test_a_fault_in_a_worker_thread_ends_the_run(tmp_path, monkeypatch):
    def full_disk(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(transfer, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run_here(tmp_path, folder_mirror(tmp_path / "films", 100))
    assert list((tmp_path / "data").rglob("*.*")) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", "mimic"], "--source mimic is not known; the sources are"),
        (["--source", "folder"], "needs --mirror"),
        (["--source", "folder", "--mirror", "/no/such/folder"], "is not a folder"),
        (["--source", "nih", "--mirror", "http://127.0.0.1:9"], "cannot connect"),
        (["--source", "nih", "--mirror", "ftp://host"], "only http:// and https://"),
        (["--resolution", "100", "--source", "nih"], "multiple of 8"),
        (["--limit", "0", "--source", "nih"], "--limit 0"),
        (["--seed", "-1", "--source", "nih"], "--seed -1"),
        (["--num_folds", "1", "--source", "nih"], "--num_folds 1"),
        (["--check", "/no/such/folder"], "there is no folder"),
    ],
)
def test_mistakes_are_refused_with_what_to_do(argv, message, tmp_path):
    more = ["--output_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(Refused) as refusal:
        download.main(download.parse_args([*argv, *more]))
    assert message in str(refusal.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.png", "p1"), ("a.png", "p2")], "a.png is in the table twice"),
        ([("a.png", "p1"), ("images/A.jpg", "p2")], "would both become"),
        ([("a.png", "p1"), ("b.png", None)], "b.png has no patient_id"),
        ([("a.png", "p1"), ("b.png", "p2")], "2 patients cannot fill 5 folds"),
        ([(f"{number}.png", f"p{number}") for number in range(7)], r"none of 7 films .* not found \(7\)"),
    ],
)
def test_tables_that_cannot_make_a_set_are_refused(rows, message, tmp_path):
    (tmp_path / "films").mkdir()
    table = [{"file_name": name, "text": "A film."} | ({"patient_id": p} if p else {}) for name, p in rows]
    write_table(tmp_path / "films", table)
    with pytest.raises(Refused, match=message):
        run_here(tmp_path, tmp_path / "films")


def test_the_mirror_may_not_be_what_is_written(tmp_path):
    mirror = folder_mirror(tmp_path / "data" / "films")
    with pytest.raises(Refused, match="lies in --output_dir"):
        run_here(tmp_path, mirror)


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
def test_a_file_in_the_place_of_a_folder_is_refused(flag, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=f"{flag} .*is a file"):
        run_here(tmp_path, folder_mirror(tmp_path / "films"), flag, str(tmp_path / "file" / "below"))


def test_process_ends_as_promised(tmp_path):
    mirror = folder_mirror(tmp_path / "films")
    processes = {
        0: start(arguments(tmp_path, mirror)),
        2: start(arguments(tmp_path / "other", tmp_path / "absent")),
    }
    for status, process in processes.items():
        stdout, stderr = process.communicate()
        assert process.returncode == status, stderr
        assert stderr.count("\n") == status // 2
        if status == 2:
            assert stderr.startswith("download.py: --mirror ")
    assert (tmp_path / "data" / "dataset.json").exists() and not (tmp_path / "other" / "data").exists()
    listing = start(["--list_sources"])
    assert "NIH Clinical Center" in listing.communicate()[0] and listing.returncode == 0


@pytest.mark.parametrize(("most_bytes", "least", "most"), [(1 << 30, 40, 40), (5 * 1000, 5, 5 + 2 * 2)])
def test_the_network_runs_ahead_of_the_decoder_as_far_as_the_disk_allows(
    most_bytes, least, most, tmp_path, monkeypatch
):
    monkeypatch.setattr(transfer, "MAX_AHEAD_BYTES", most_bytes)
    (tmp_path / "raw").write_bytes(bytes(1000))
    fetched, decoding, reached = [], threading.Event(), threading.Event()

    def fetch(number):
        fetched.append(number)
        if len(fetched) == least:
            reached.set()
        return number, tmp_path / "raw"

    def prepare(number, path):
        decoding.wait(HANG_S)
        return {"number": number}

    tasks = [partial(fetch, number) for number in range(40)]
    made = transfer.fetch_and_prepare(tasks, prepare, 2, threading.Event())
    first = threading.Thread(target=lambda: results.extend(made))
    results = []
    first.start()
    assert reached.wait(HANG_S)
    time.sleep(0.2)  # were there nothing to hold it back, it would go on
    assert least <= len(fetched) <= most
    decoding.set()
    first.join()
    assert sorted(number for number, _ in results) == list(range(40))
