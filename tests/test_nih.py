"""NIH's twelve archives: no more of them is fetched than the films asked for need. Made-up films, two archives."""

import argparse
import gzip
import hashlib
from pathlib import Path

import pytest

import download
from tests.test_archives import pack
from tests.test_download import assert_same_folder, nih_mirror, run_here, serve  # noqa: F401
from utils.files import read_jsonl
from utils.refusal import run
from utils.sources import nih


@pytest.fixture
def published(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """24 films as NIH publishes them: a table, and archives of 10 and 14 films under names that say nothing."""
    unpacked, folder = nih_mirror(tmp_path / "unpacked"), tmp_path / "published"
    folder.mkdir()
    films = sorted((unpacked / "images").iterdir())
    archives = []
    for name, part in (("vfk4.gz", films[:10]), ("i28r.gz", films[10:])):
        content = pack(
            {f"images/{film.name}": film.read_bytes() for film in reversed(part)}
        )  # not in the table's order
        (folder / name).write_bytes(content)
        archives.append((name.removesuffix(".gz"), hashlib.md5(content).hexdigest(), len(part)))
    table = next(unpacked.glob("*.csv"))
    (folder / nih.TABLES[-1]).write_bytes(gzip.compress(table.read_bytes()))
    host = serve(folder).address
    names = ["images_001.tar.gz", "images_002.tar.gz"]
    monkeypatch.setattr(nih, "MIRROR", host)
    monkeypatch.setattr(nih, "ARCHIVES", tuple(archives))
    monkeypatch.setattr(nih, "MD5S", {name: md5 for name, (_, md5, _) in zip(names, archives, strict=True)})
    addresses = {name: f"{host}/{key}.gz" for name, (key, _, _) in zip(names, archives, strict=True)}
    monkeypatch.setattr(nih, "ADDRESSES", addresses | {nih.TABLES[-1]: f"{host}/{nih.TABLES[-1]}"})
    return folder


def arguments(tmp_path: Path, *more: str) -> argparse.Namespace:
    folders = ["--output_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
    return download.parse_args(["--source", "nih", "--resolution", "64", *folders, *more])


def fetch(tmp_path: Path, *more: str) -> Path:
    assert run(download.main, lambda: arguments(tmp_path, *more)) == 0
    return tmp_path / "data"


def test_without_a_mirror_the_films_come_out_of_the_archives(published: Path, tmp_path: Path) -> None:
    fetched = fetch(tmp_path / "host")
    assert_same_folder(fetched, run_here(tmp_path / "folder", tmp_path / "unpacked", source="nih"))
    raw = [path.name for path in (tmp_path / "host" / "cache" / "raw").rglob("*") if path.suffix]
    assert all(name.startswith("images_00") for name in raw), "single films are not kept beside their archives"


def test_archives_that_no_film_is_wanted_of_are_left_alone(published: Path, tmp_path: Path) -> None:
    (published / "i28r.gz").unlink()
    data = fetch(tmp_path, "--limit", "10")
    assert len(read_jsonl(data / "metadata.jsonl")) == 10 and not read_jsonl(data / "rejected.jsonl")


def test_archives_in_a_folder_are_read_in_place(published: Path, tmp_path: Path) -> None:
    for name, address in nih.ADDRESSES.items():
        (published / address.rpartition("/")[2]).rename(published / name)
    packed = run_here(tmp_path / "packed", published, source="nih")
    assert_same_folder(packed, run_here(tmp_path / "folder", tmp_path / "unpacked", source="nih"))
    assert not list((tmp_path / "packed" / "cache").rglob("*.tar.gz"))


def test_an_archive_with_other_bytes_than_published_is_refused(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where the fault is found after the last film."""
    monkeypatch.setitem(nih.MD5S, "images_002.tar.gz", "0" * 32)
    assert run(download.main, lambda: arguments(tmp_path)) == 2
    assert "published as 000" in capsys.readouterr().err
    assert not (tmp_path / "data" / "metadata.jsonl").exists()
    assert not list((tmp_path / "cache").rglob("images_002.tar.gz*"))
    # Nor is any film of it believed later on; the ten of the first archive are
    films = sorted((tmp_path / "unpacked" / "images").iterdir())
    assert {path.name for path in (tmp_path / "data" / "images").iterdir()} == {film.name for film in films[:10]}
