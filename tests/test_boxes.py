"""Weights of the loss by place, and the boxes they come from. Hermetic."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.boxes import box_loss_weights, read_boxes
from utils.refusal import Refused

NODULE, EFFUSION = [0.25, 0.5, 0.3125, 0.5625], [0.5, 0.5, 1.0, 1.0]


def mean_in(error: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return error[rows, columns].mean()


def test_a_box_adds_its_own_mean_error_however_small_it_is() -> None:
    error = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    weights = box_loss_weights([NODULE, EFFUSION], 16, 16, 0.5)
    small = mean_in(
        error, slice(7, 10), slice(3, 6)
    )  # the box is the latent pixel (8, 4), half a pixel wider all around
    large = mean_in(error, slice(7, 16), slice(7, 16))
    torch.testing.assert_close((weights * error).mean(), error.mean() + 0.5 * (small + large))


def test_without_boxes_all_places_weigh_alike() -> None:
    assert torch.equal(box_loss_weights([], 8, 12, 0.5), torch.ones(8, 12))
    assert torch.equal(box_loss_weights([EFFUSION], 8, 12, 0.0), torch.ones(8, 12))


def test_rows_are_down_and_columns_are_across() -> None:
    weights = box_loss_weights([[0.0, 0.75, 0.25, 1.0]], 16, 32, 1.0)
    assert weights[-1, 0] > 1 and weights[0, 0] == 1 and weights[-1, -1] == 1


@pytest.fixture
def films(tmp_path: Path) -> Path:
    Image.new("L", (64, 64)).save(tmp_path / "square.png")
    Image.new("L", (64, 48)).save(tmp_path / "wide.png")
    (tmp_path / "damaged.png").write_bytes(b"no film")
    return tmp_path


def test_boxes_are_read_film_by_film(films: Path) -> None:
    rows = [
        {"file_name": "square.png", "boxes": [{"finding": "nodule", "box": NODULE}, {"box": EFFUSION}]},
        {"file_name": "wide.png", "boxes": None},
        {"file_name": "wide.png"},
    ]
    assert read_boxes(films, rows) == [[NODULE, EFFUSION], [], []]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "square.png"}, "no film of .* has a box"),
        ({"file_name": "square.png", "boxes": []}, "no film of .* has a box"),
        ({"file_name": "square.png", "boxes": "[[0, 0, 1, 1]]"}, "square.png: boxes .*expected a list"),
        ({"file_name": "square.png", "boxes": [[0, 0, 1, 1]]}, "square.png: box None"),
        ({"file_name": "square.png", "boxes": [{"box": [10, 10, 20, 20]}]}, r"square.png: box \[10, 10, 20, 20\]"),
        ({"file_name": "square.png", "boxes": [{"box": [0.5, 0, 0.5, 1]}]}, "square.png: box"),
        ({"file_name": "square.png", "boxes": [{"box": [0, 0, 1]}]}, "square.png: box"),
        ({"file_name": "square.png", "boxes": [{"box": [0, 0, 1, float("nan")]}]}, "square.png: box"),
        ({"file_name": "damaged.png", "boxes": [{"box": NODULE}]}, "damaged.png cannot be read"),
        ({"file_name": "square.png", "boxes": 5}, "square.png: boxes 5; expected a list"),
        ({"file_name": "wide.png", "boxes": [{"box": NODULE}]}, "wide.png: boxes need square films"),
    ],
)
def test_other_boxes_are_refused_by_name(films: Path, row: dict, said: str) -> None:
    with pytest.raises(Refused, match=said):
        read_boxes(films, [row])
