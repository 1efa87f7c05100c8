"""The bundled demo set: what it states is what it shows, and no flag is needed to have it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import download
from assets import make_demo
from assets.drawing import FINDINGS, NORMAL_PHRASES, SIDED, SIDES, ZONED, ZONES
from assets.train_cxr_features import lay_marks
from utils.features import FINDING_LABELS, extract, load_encoder
from utils.films import decode_film
from utils.findings import reader_rates, shown_labels
from utils.metadata import read_metadata
from utils.mirror import Mirror
from utils.refusal import run
from utils.report import followed_table
from utils.sources import demo

WORDS = {
    "pleural effusion": ("effusion", "fluid"),
    "pneumothorax": ("pneumothorax",),
    "nodule": ("nodule",),
    "mass": ("mass",),
    "cardiomegaly": ("cardiomegaly", "heart", "cardiac silhouette"),
    "pacemaker": ("pacemaker",),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    argv = ["--output_dir", str(folder / "data"), "--cache_dir", str(folder / "cache")]
    assert run(download.main, lambda: download.parse_args(argv)) == 0
    return folder / "data"


def test_no_flag_installs_the_whole_set(installed: Path) -> None:
    rows = read_metadata(installed)
    bundled = demo.list_films(Mirror(demo.MIRROR))
    assert 200 <= len(rows) == len(bundled) <= 400
    for row, film in zip(rows, bundled, strict=True):
        assert (row["text"], row["patient_id"], row["boxes"]) == (film.text, film.patient_id, film.boxes)
        source = Path(demo.MIRROR) / row["file_name"]
        pixels = [decode_film(path) for path in (source, installed / row["file_name"])]
        np.testing.assert_array_equal(*pixels, err_msg="films of the right size are not resampled")
    assert download.main(download.parse_args(["--check", str(installed)])) == 0


def test_patients_have_several_films_in_one_fold(installed: Path) -> None:
    folds = {}
    for row in read_metadata(installed):
        folds.setdefault(row["patient_id"], []).append(row["fold"])
    assert all(len(of) >= 2 and len(set(of)) == 1 for of in folds.values())
    assert {fold for of in folds.values() for fold in of} == set(range(5))


def test_captions_state_what_was_drawn_and_no_more(installed: Path) -> None:
    drawn = set()
    for row in read_metadata(installed):
        sentences = row["text"].removeprefix(make_demo.OPENING).strip().lower().split(". ")
        assert len(sentences) == max(1, len(row["boxes"]))
        assert {box["finding"] for box in row["boxes"]} == set(row["findings"])
        for box, sentence in zip(row["boxes"], sentences, strict=False):
            named = [finding for finding in FINDINGS if any(word in sentence for word in WORDS[finding])]
            assert named == [box["finding"]], sentence
            assert [side for side in SIDES if side in sentence] == [box["side"]] * (box["finding"] in SIDED), sentence
            assert [zone for zone in ZONES if zone in sentence] == [box["zone"]] * (box["finding"] in ZONED), sentence
            drawn.add((box["finding"], box["side"]))
        if not row["boxes"]:
            assert sentences[0].capitalize() in NORMAL_PHRASES
    assert len(drawn) == 2 * len(SIDED) + 1


def test_boxes_lie_on_their_side(installed: Path) -> None:
    """The patient's right is at the image's left; leads of a pacemaker cross over."""
    for row in read_metadata(installed):
        for box in row["boxes"]:
            left, top, right, bottom = box["box"]
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            if box["side"] and box["finding"] != "pacemaker":
                assert ((left + right) / 2 < 0.5) == (box["side"] == "right"), row


def test_the_bundled_reader_reads_it(installed: Path) -> None:
    """What a prompt's success is read with has to work on films that do show the finding."""
    rows = read_metadata(installed)
    films = torch.stack([torch.from_numpy(decode_film(installed / row["file_name"])) for row in rows])
    read = extract(load_encoder(), films)
    rates = reader_rates(read, rows, [row["fold"] for row in rows])
    assert set(rates) == set(FINDINGS)
    for finding, rate in rates.items():
        assert rate["followed"] > 0.6 and rate["followed"] > rate["chance"] + 0.5, (finding, rate)
    heads, table = followed_table(
        {"prompt_followed": {"base": rates, "adapter": rates, "reader": rates, "reader_after_round_trip": rates}}
    )
    assert [row[0] for row in table] == list(rates) and all(len(row) == len(heads) for row in table)


def test_the_bundled_reader_takes_no_mark_for_a_finding(installed: Path) -> None:
    """A base model draws pins and cables unasked; a reader that takes bright metal for a nodule flatters it."""
    normal = [decode_film(installed / row["file_name"]) for row in read_metadata(installed) if not row["boxes"]]
    marked = [lay_marks(film, seed) for seed, film in enumerate(normal * 3)]
    read = extract(load_encoder(), torch.stack([torch.from_numpy(film) for film in marked]))
    assert (read.finding_probabilities > 0.5).float().mean(dim=0).max() < 0.03


def test_labels_cover_what_is_drawn(installed: Path) -> None:
    assert set().union(*(shown_labels(row) for row in read_metadata(installed))) == set(FINDING_LABELS)


def test_findings_are_drawn_alike_again() -> None:
    film = decode_film(Path(demo.MIRROR) / "images/virtual-000-0.png")
    once, again = (make_demo.draw_findings(film, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(once[0], again[0])
    assert once[1:] == again[1:]


def test_a_mirror_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mirror").mkdir()
    argv = ["--mirror", str(tmp_path / "mirror"), "--output_dir", str(tmp_path / "data")]
    assert run(download.main, lambda: download.parse_args(argv)) == 2
    assert "is not the demo set; leave --mirror out, or for your own add --source folder" in capsys.readouterr().err
