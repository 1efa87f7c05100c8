"""Quality control: what is no film is flagged, films are not, one real film in a hundred is called strange."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import ROOT
from utils.folds import with_folds
from utils.images import load_film
from utils.metadata import dataset_hash, read_metadata
from utils.quality import QualityControl
from utils.refusal import Refused

DEMO = ROOT / "assets" / "demo"


def demo_films(count: int, first: int = 0) -> list[Tensor]:
    rows = [json.loads(line) for line in (DEMO / "metadata.jsonl").read_text().splitlines()]
    return [load_film(DEMO / row["file_name"], 128) for row in rows[first : first + count]]


def picture(film: Tensor) -> Tensor:
    return (film.float() / 255).expand(3, -1, -1)


@pytest.fixture(scope="module")
def alone() -> QualityControl:
    return QualityControl(None, 128, torch.device("cpu"))


def test_films_pass(alone: QualityControl) -> None:
    assert alone.reference_sha256 is None
    assert [flags for film in demo_films(60) if (flags := alone.flags(picture(film)))] == []


@pytest.mark.parametrize(
    ("spoil", "flag"),
    [
        (lambda film: picture(film) * torch.tensor([1.0, 0.8, 0.8])[:, None, None], "colour"),
        (lambda film: torch.full((3, 128, 128), 0.4), "blank"),
        (lambda film: 0.4 + picture(film) * 0.02, "blank"),
        (lambda film: (picture(film) * 4).clamp(0, 1), "saturated"),
        (lambda film: (picture(film) * 4 - 3).clamp(0, 1), "saturated"),
    ],
)
def test_what_is_no_film_is_flagged(alone: QualityControl, spoil, flag: str) -> None:
    assert flag in alone.flags(spoil(demo_films(1)[0]))


def test_what_is_unlike_all_real_films_is_told_from_other_patients_films() -> None:
    rows = [json.loads(line) for line in (DEMO / "metadata.jsonl").read_text().splitlines()]
    reference = QualityControl(DEMO, 128, torch.device("cpu"))
    assert len(reference.reference_sha256) == 64 and len(reference.real) == len(rows)
    assert not any(reference.flags(picture(film)) for film in demo_films(20)), "each is in the reference itself"
    film = demo_films(1)[0]
    upside_down, noise = (
        film.flip(0),
        torch.from_numpy(np.random.default_rng(0).integers(256, size=(128, 128), dtype=np.uint8)),
    )
    for strange in (upside_down, noise, 255 - film):
        assert "far from real films" in reference.flags(picture(strange))


def test_few_films_of_unknown_patients_are_called_strange(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DEMO / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "images").symlink_to(DEMO / "images")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:180]))
    reference = QualityControl(tmp_path, 128, torch.device("cpu"))
    assert len(reference.real) == 180
    flagged = sum("far from real films" in reference.flags(picture(film)) for film in demo_films(120, first=180))
    assert flagged <= 6  # 1.2 are expected


def test_films_that_an_adapter_held_out_are_not_in_the_reference() -> None:
    rows = with_folds(read_metadata(DEMO))
    header = {"fold": 1, "data_hash": dataset_hash(rows), "settings": {"group_by": "patient_id"}}
    reference = QualityControl(DEMO, 128, torch.device("cpu"), [{}, header])
    assert len(reference.real) == sum(row["fold"] != 1 for row in rows) < len(rows)
    assert reference.reference_sha256 != dataset_hash(rows)


def test_too_small_a_reference_is_refused_in_words(tmp_path: Path) -> None:
    Image.fromarray(demo_films(1)[0].numpy()).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a film", "patient_id": "p"}\n')
    with pytest.raises(Refused, match="films of 1 patients; expected at least 10"):
        QualityControl(tmp_path, 128, torch.device("cpu"))
