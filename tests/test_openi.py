"""Open-i: what its reports and tables become, and that archives, folders and addresses give the same set. Made-up reports."""

import argparse
import fcntl
import gzip
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import download
import utils.fetch as fetch_module
from tests.conftest import mirror_of
from tests.test_archives import long_name, pack
from tests.test_download import assert_same_folder, film, serve  # noqa: F401
from utils.files import read_jsonl
from utils.mirror import Mirror
from utils.refusal import Refused, run
from utils.sources import openi

REPORT = """<?xml version="1.0"?><eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="INDICATION">XXXX-year-old {sex} with cough</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH>{terms}</MeSH>{images}</eCitation>"""
NORMAL, EFFUSION = "<major>normal</major>", "<major>Pleural Effusion/left</major><major>Opacity/lung/base/left</major>"


def png(seed: int) -> bytes:
    data = io.BytesIO()
    film(seed).save(data, "PNG")
    return data.getvalue()


def report(uid: int, images: list[str], impression: str = "Clear.", terms: str = NORMAL, findings: str = "") -> bytes:
    listed = "".join(f'<parentImage id="{image}"/>' for image in images)
    sex = ("male", "female")[uid % 2]
    text = REPORT.format(uid=uid, images=listed, impression=impression, findings=findings, terms=terms, sex=sex)
    return text.encode()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Twelve patients: a frontal film each, of three a second film; 1 has no words, 2 a film without a known view."""
    folder = tmp_path / "openi"
    folder.mkdir()
    reports, headers, clusters, films = {}, ["imageid,View Position"], ["imageid,tsne-view"], {}
    for uid in range(1, 13):
        images = [f"CXR{uid}_IM-{uid:04d}-1001"] + ([f"CXR{uid}_1_IM-{uid:04d}-2001"] if uid % 4 == 0 else [])
        reports[f"ecgen/{uid}.xml"] = report(uid, images)
        headers.append(f"{images[0]},{'' if uid in (2, 3) else 'PA'}")
        headers += [f"CXR{uid}_IM-{uid:04d}-2001,LL"] * (len(images) - 1)
        films |= {f"{image}.png": png(10 * uid + i) for i, image in enumerate(images)}
    clusters.append("CXR3_IM-0003-1001,PA")
    reports["ecgen/1.xml"] = report(1, ["CXR1_IM-0001-1001"], impression="Stable.", findings="XXXX.")
    reports["ecgen/5.xml"] = report(
        5, ["CXR5_IM-0005-1001"], "1. Left XXXX effusion, unchanged. 2. Dr. XXXX was called.", EFFUSION, "Heart is normal. Scar."
    )  # fmt: skip
    (folder / openi.REPORTS).write_bytes(pack(reports))
    (folder / openi.FILMS).write_bytes(pack(films))
    (folder / openi.HEADERS).write_bytes(gzip.compress("\n".join(headers).encode()))
    (folder / openi.CLUSTERS).write_bytes(gzip.compress("\n".join(clusters).encode()))
    return folder


def arguments(cache: Path, output: Path, *more: str) -> argparse.Namespace:
    folders = ["--output_dir", str(output / "data"), "--cache_dir", str(cache / "cache")]
    return download.parse_args(["--source", "openi", "--accept_license", "--resolution", "64", *folders, *more])


def fetch(tmp_path: Path, mirror: Path | str) -> Path:
    assert run(download.main, lambda: arguments(tmp_path, tmp_path, "--mirror", str(mirror))) == 0
    return tmp_path / "data"


def test_reports_become_captions_and_patients(mirror: Path, tmp_path: Path) -> None:
    data = fetch(tmp_path, mirror)
    rows = {row["source_id"]: row for row in read_jsonl(data / "metadata.jsonl")}
    assert len(rows) == 10
    row = rows["CXR5_IM-0005-1001"]
    assert row["text"] == "PA chest radiograph of a woman. Left effusion. Scar. Heart is normal."
    assert (row["patient_id"], row["findings"], row["view"], row["sex"]) == (
        "openi-5", ["Opacity", "Pleural Effusion"], "PA", "F"
    )  # fmt: skip
    assert row["license"] == "CC BY-NC-ND 4.0"
    assert rows["CXR4_IM-0004-1001"]["findings"] == []
    assert rows["CXR3_IM-0003-1001"]["view"] == "PA"  # by its cluster, as the header is silent
    assert {(row["source_id"], row["reason"]) for row in read_jsonl(data / "rejected.jsonl")} == {
        ("CXR1_IM-0001-1001", "no text"),
        ("CXR2_IM-0002-1001", "view not known"),
        *((f"CXR{uid}_1_IM-{uid:04d}-2001", "not frontal but LATERAL") for uid in (4, 8, 12)),
    }


def test_archive_folder_and_address_give_the_same_bytes(mirror: Path, tmp_path: Path, serve) -> None:  # noqa: F811
    packed = fetch(tmp_path / "packed", mirror)
    served = fetch(tmp_path / "served", serve(mirror).address)
    assert_same_folder(packed, served)
    for part in ("packed", "served"):
        assert not list((tmp_path / part / "cache" / "raw").rglob("*.png")), "the archive alone is kept"
    shutil.unpack_archive(mirror / openi.FILMS, mirror / "NLMCXR_png")
    (mirror / openi.FILMS).unlink()
    assert_same_folder(packed, fetch(tmp_path / "unpacked", mirror))
    assert list((mirror / "NLMCXR_png").iterdir())


def test_finished_films_need_no_archive(mirror: Path, tmp_path: Path, serve) -> None:  # noqa: F811
    server = serve(mirror)
    data = fetch(tmp_path, server.address)
    before = {path.name: path.stat().st_mtime_ns for path in (data / "images").iterdir()}
    (mirror / openi.FILMS).unlink()
    for archive in (tmp_path / "cache").rglob(openi.FILMS):
        archive.unlink()
    fetch(tmp_path, server.address)
    assert {path.name: path.stat().st_mtime_ns for path in (data / "images").iterdir()} == before


def test_films_that_the_archive_lacks_are_left_out(mirror: Path, tmp_path: Path) -> None:
    (mirror / openi.FILMS).write_bytes(pack({f"CXR{uid}_IM-{uid:04d}-1001.png": png(uid) for uid in range(4, 13)}))
    data = fetch(tmp_path, mirror)
    missing = [row for row in read_jsonl(data / "rejected.jsonl") if row["source_id"] == "CXR3_IM-0003-1001"]
    assert missing == [{"source": "openi", "source_id": "CXR3_IM-0003-1001", "reason": "not in its archive"}]
    assert json.loads((data / "dataset.json").read_text())["counts"]["kept"] == 9


def test_a_broken_archive_is_refused_by_name(mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (mirror / openi.FILMS).write_bytes((mirror / openi.FILMS).read_bytes()[:20_000])
    assert run(download.main, lambda: arguments(tmp_path, tmp_path, "--mirror", str(mirror))) == 2
    assert f"{mirror / openi.FILMS} cannot be unpacked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (openi.REPORTS, None, f"holds no {openi.REPORTS}"),
        (openi.HEADERS, None, f"holds no {openi.HEADERS}; it is at https://"),
        (openi.REPORTS, b"no archive", f"{openi.REPORTS} cannot be unpacked"),
        (openi.REPORTS, pack({"a.xml": b"<eCitation>"}), "a.xml is no report of Open-i"),
        (openi.REPORTS, pack({"a.xml": b"<eCitation/>"}), "a.xml is no report of Open-i"),
        (openi.REPORTS, pack({"a.xml": b"<eCitation><uId/></eCitation>"}), "a.xml is no report of Open-i"),
        (openi.REPORTS, pack({"a.xml": b"<?xml version='1.0' encoding='foo'?><a/>"}), "a.xml is no report of Open-i"),
        (openi.REPORTS, pack({"a.xml": report(1, ["../../CXR1"])}), "a.xml names a film '../../CXR1'"),
        (openi.REPORTS, pack({"a.txt": b"-"}), "names no film"),
        (openi.REPORTS, pack({"a.xml": report(1, ["CXR1"])})[:100], f"{openi.REPORTS} cannot be unpacked"),
        (openi.REPORTS, gzip.compress(b"no tar" * 999), f"{openi.REPORTS} cannot be unpacked"),
        (openi.REPORTS, long_name(1 << 30), "a header of 1073741824 bytes"),
        (openi.CLUSTERS, b"no gzip", f"{openi.CLUSTERS} cannot be unpacked"),
        (openi.HEADERS, gzip.compress(b"imageid\nCXR1"), "View Position"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_files_that_are_something_else_are_refused(
    name: str, content: bytes | None, message: str, mirror: Path
) -> None:
    contents = {path.name: path.read_bytes() for path in mirror.iterdir()} | {name: content}
    with pytest.raises(Refused) as refusal:
        openi.list_films(mirror_of({name: content for name, content in contents.items() if content is not None}))
    assert message in str(refusal.value)


def test_the_address_of_the_tables_is_used_where_no_mirror_is_named(mirror: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def read(self: Mirror, name: str) -> bytes:
        asked.append(self.address(name))
        return (mirror / name).read_bytes()

    monkeypatch.setattr(Mirror, "read", read)
    monkeypatch.setattr(openi, "MIRROR", str(mirror))
    assert run(download.main, lambda: arguments(tmp_path, tmp_path)) == 0
    tables = "https://raw.githubusercontent.com/mlmed/torchxrayvision/HEAD/torchxrayvision/data"
    assert asked == [f"{mirror}/{openi.REPORTS}", f"{tables}/{openi.HEADERS}", f"{tables}/{openi.CLUSTERS}"]


def test_an_archive_whose_end_comes_slowly_is_waited_for(mirror: Path, tmp_path: Path, serve, monkeypatch) -> None:  # noqa: F811
    """The last wanted film is prepared long before the last byte has come."""
    films = {f"CXR{uid}_IM-{uid:04d}-1001.png": png(uid) for uid in range(1, 13)}
    (mirror / openi.FILMS).write_bytes(pack(films | {"rest": np.random.default_rng(0).bytes(600_000)}))
    receive = fetch_module.receive

    def slowly(*args):
        for number, block in enumerate(receive(*args)):
            time.sleep(0.1 * (number > 2))
            yield block

    monkeypatch.setattr(fetch_module, "receive", slowly)
    data = fetch(tmp_path, serve(mirror).address)
    assert (data / "metadata.jsonl").exists()
    (archive,) = (tmp_path / "cache").rglob(openi.FILMS)
    assert archive.read_bytes() == (mirror / openi.FILMS).read_bytes()


def test_two_runs_do_not_share_their_raw_films(mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fetch(tmp_path, mirror)
    (lock,) = (tmp_path / "cache" / "raw").rglob(".lock")
    with open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(download.main, lambda: arguments(tmp_path, tmp_path / "second", "--mirror", str(mirror))) == 2
    assert "another download.py is fetching" in capsys.readouterr().err


def test_a_repaired_archive_is_used(mirror: Path, tmp_path: Path) -> None:
    whole = (mirror / openi.FILMS).read_bytes()
    (mirror / openi.FILMS).write_bytes(pack({f"CXR{uid}_IM-{uid:04d}-1001.png": png(uid)[:99] for uid in range(3, 8)}
                                            | {f"CXR{uid}_IM-{uid:04d}-1001.png": png(10 * uid) for uid in range(8, 13)}))  # fmt: skip
    assert len(read_jsonl(fetch(tmp_path, mirror) / "metadata.jsonl")) == 5
    (mirror / openi.FILMS).write_bytes(whole)
    assert len(read_jsonl(fetch(tmp_path, mirror) / "metadata.jsonl")) == 10
