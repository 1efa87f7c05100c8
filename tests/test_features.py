"""The film encoder with random weights: shapes, batches, files. Hermetic."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.features import (
    CONFIG_NAME,
    FINDING_LABELS,
    LABELS,
    WEIGHTS_NAME,
    Extracted,
    FilmEncoder,
    extract,
    finding_label,
    load_encoder,
    save_encoder,
    to_input,
)
from utils.refusal import Refused


def films(count: int, side: int = 128) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def tiny_encoder() -> FilmEncoder:
    """Statistics of the norms that are not those of a fresh encoder, as training leaves them."""
    torch.manual_seed(0)
    encoder = FilmEncoder(widths=(4, 4, 8, 8), depths=(1, 1, 1), num_features=6)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 1e-6, 2.0)
    return encoder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_encoder(tiny_encoder(), tmp_path / "encoder")
    return tmp_path / "encoder"


def assert_same(read: Extracted, expected: Extracted, tolerance: float = 0.0) -> None:
    for name in vars(expected):
        torch.testing.assert_close(getattr(read, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


def test_what_is_extracted_and_its_ranges() -> None:
    read = extract(tiny_encoder(), films(5), batch_size=2)
    assert read.features.shape == (5, 6)
    assert read.features.dtype == torch.float32
    assert read.label_probabilities.shape == (5, len(LABELS))
    torch.testing.assert_close(read.label_probabilities.sum(dim=1), torch.ones(5))
    assert read.finding_probabilities.shape == (5, len(FINDING_LABELS))
    assert 0 <= read.finding_probabilities.min() <= read.finding_probabilities.max() <= 1
    assert read.finding("cardiomegaly").equal(read.finding_probabilities[:, 6])


def test_a_film_is_read_alike_in_any_company() -> None:
    encoder = tiny_encoder().train()
    alone = extract(encoder, films(5), batch_size=1)
    assert_same(extract(encoder, films(5), batch_size=4), alone, 1e-5)
    assert encoder.training, "left in the mode that it was found in"
    norm = next(module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 0, "reading films must not train"


def test_findings_are_read_by_place() -> None:
    """A network that pools before it reads could not tell left from right."""
    torch.manual_seed(0)
    encoder = tiny_encoder().eval()
    maps = torch.zeros(2, 8, 8, 8)
    maps[0, :, 2, 1] = maps[1, :, 2, 6] = 1.0
    right, left = encoder.finding_head(maps)
    assert (right - left).abs().max() > 1e-3


def test_the_bundled_size_is_small() -> None:
    parameters = sum(parameter.numel() for parameter in FilmEncoder().parameters())
    assert 0.7e6 < parameters < 0.9e6
    assert FilmEncoder().config["num_features"] == 64


def test_films_of_any_size_are_read_at_128_px() -> None:
    uniform = torch.full((1, 512, 512), 255, dtype=torch.uint8)
    assert to_input(uniform).shape == (1, 1, 128, 128)
    torch.testing.assert_close(to_input(uniform), torch.ones(1, 1, 128, 128))
    assert to_input(films(1)).flatten()[0] == films(1).flatten()[0] / 127.5 - 1
    with pytest.raises(ValueError, match="uint8"):
        to_input(films(2).float())


def test_every_drawn_finding_has_its_label() -> None:
    assert finding_label("mass", "left") == finding_label("nodule", "left") == "left nodule or mass"
    assert finding_label("cardiomegaly", None) == "cardiomegaly"
    sided = [finding_label(name, side) for name in ("pleural effusion", "pneumothorax", "nodule", "pacemaker")
             for side in ("right", "left")]  # fmt: skip
    assert {*sided, "cardiomegaly"} == set(FINDING_LABELS)


def test_an_encoder_survives_its_file(saved: Path) -> None:
    """To the bit from the second time on; the first rounds kernels to fp16, which a reading hardly notices."""
    once = load_encoder(saved)
    save_encoder(once, saved.parent / "again")
    assert (saved.parent / "again" / WEIGHTS_NAME).read_bytes() == (saved / WEIGHTS_NAME).read_bytes()
    assert_same(extract(load_encoder(saved.parent / "again"), films(3)), extract(once, films(3)))
    assert_same(extract(once, films(3)), extract(tiny_encoder(), films(3)), 2e-2)
    assert {parameter.dtype for parameter in once.parameters()} == {torch.float32}
    assert not once.training


def test_kernels_are_stored_in_fp16_and_statistics_are_not(saved: Path) -> None:
    stored = load_file(saved / WEIGHTS_NAME)
    assert stored["stem.0.weight"].dtype == torch.float16
    assert stored["stem.1.running_var"].equal(tiny_encoder().stem[1].running_var)


def break_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-100])


def replace_weights(folder: Path) -> None:
    save_file({"conv.weight": torch.zeros(3, 3)}, folder / WEIGHTS_NAME)


def pickle_weights(folder: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3)}, folder / WEIGHTS_NAME)


def replace_config(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))


def reorder_findings(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "findings": config["findings"][::-1]}))


def absurd_config(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "widths": "wide"}))


def no_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


SPOILED = (
    break_weights,
    replace_weights,
    pickle_weights,
    replace_config,
    reorder_findings,
    absurd_config,
    no_json,
    no_weights,
)


@pytest.mark.parametrize("spoil", SPOILED)
def test_foreign_and_broken_files_are_refused_in_one_line(spoil, saved: Path) -> None:
    spoil(saved)
    with pytest.raises(Refused, match="film encoder") as refusal:
        load_encoder(saved)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
