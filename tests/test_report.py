"""Pictures, pages and cards: what is in them, and that equal runs make equal files. Hermetic."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from utils import hub
from utils.card import base_digest, model_card, public_base
from utils.pages import in_short
from utils.refusal import Refused
from utils.report import contact_sheet, draw_curves, html_page, html_table, save_png

VALIDATION = {
    "ssim": 0.7, "psnr": 22.0, "mse": 0.1, "mse_by_timestep": {"50": 0.2, "550": 0.1},
    "bounds": {name: {"ceiling": 0.9, "mean_film": 0.6, "noisy": {}} for name in ("ssim", "psnr")},
}  # fmt: skip
VALIDATIONS = [VALIDATION | {"step": 0}, VALIDATION | {"step": 10, "ssim": 0.8}, VALIDATION | {"step": 20}]
STEPS = [
    {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": None if step == 3 else 0.1} for step in range(1, 41)
]
CONFIG = {
    "base": "assets/cxr-tiny", "fold": 2, "resolution": 128, "settings": {"rank": 16, "text_encoder_rank": 8},
    "films": {"training": 400, "validation": 40, "held_out": 120},
}  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "answer"),
    [([0.01, 0.03], "Yes: "), ([-0.01, 0.03], "Not shown: "), ([-0.03, -0.01], "No, worse: "), (None, "Not shown: ")],
)
def test_an_answer_is_as_sure_as_its_interval(interval: list[float] | None, answer: str) -> None:
    distances = {kind: {"kernel": value, "kernel_error": 0.5} for kind, value in (("generated", 3), ("real", 0.1))}
    distances |= {"real_sd": {"kernel": 0.25}}  # of other draws, which the table shows, too
    gain = {"mean": 0.02, "interval": interval}
    said = in_short(gain, {"films": 40} | distances, {}, ["passed", "too few films to say", "passed"])
    assert f"better than the base? {answer}" in said[0]
    assert said[1].endswith("Kernel distance 3.00 +- 0.50, real films in their place 0.10 +- 0.25.")
    assert said[2:] == ["Do they repeat training films? The audit says: passed, too few films to say."]
    (_, too_good, *_) = in_short(gain, {"films": 40, "too_good": ["generated"]} | distances, {}, ["passed"])
    assert too_good.endswith("Too good to be true: see below.")


def test_every_film_of_a_contact_sheet_is_there_as_it_is() -> None:
    films = [[np.full((40, 40), 10 * row + column + 1, np.uint8) for column in range(4)] for row in range(3)]
    long = "PA chest radiograph of a 60-year-old man. " * 8
    sheet = np.asarray(contact_sheet(films, ["one", long, "three"], list("abcd"), "not for diagnosis"))
    for row in range(3):
        for column in range(4):
            assert (sheet == 10 * row + column + 1).sum() >= 40 * 40 * 0.99


def test_equal_curves_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_curves(tmp_path / name, STEPS, VALIDATIONS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_curves(tmp_path / "first.png", [], VALIDATIONS[:1])  # before the first step
    assert Image.open(tmp_path / "first.png").size[0] > 500


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    save_png(tmp_path / "new" / "a.png", Image.new("L", (8, 8), 7))
    assert np.asarray(Image.open(tmp_path / "new" / "a.png")).mean() == 7
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_text_in_a_page_is_no_markup() -> None:
    page = html_page("<b>", [html_table(["<i>"], [["<script>"]])])
    assert "<script>" not in page
    assert "<i>" not in page
    assert "Not for diagnosis" in page


def test_the_card_tells_what_a_user_must_know(tmp_path: Path) -> None:
    sources = [{"source": "nih", "license": "attribution", "terms": "cite Wang et al."}]
    (tmp_path / "dataset.json").write_text(json.dumps({"sources": sources}))
    card = model_card(CONFIG, tmp_path, VALIDATIONS, best_step=10)
    for text in (
        "Not for diagnosis",
        "400 films",
        "0.8000",
        "nih",
        "cite Wang et al.",
        "Kermany",
        "has not been asked",
    ):
        assert text in card
    assert str(tmp_path) not in card
    assert card.startswith("---\nlicense: cc-by-4.0\nbase_model: assets/cxr-tiny\n")


def test_the_card_of_a_set_of_others_names_no_source(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"name": "somebody else\'s"}')
    assert "those of the films' owner" in model_card(CONFIG, tmp_path, VALIDATIONS, best_step=10)


@pytest.mark.parametrize("lines", ["\ufeff{}\n{}\n", "{}\n\n{}\n", "{}\n{}\n\n"])
def test_the_card_reads_a_table_as_training_does(tmp_path: Path, lines: str) -> None:
    """At the end of a run it must not stop at a mark or an empty line that was none at its beginning."""
    row = json.dumps({"file_name": "a.png", "text": "A film.", "source": "clinic", "license": "ours"})
    (tmp_path / "metadata.jsonl").write_text(lines.format(row, row), encoding="utf-8")
    assert "Source: clinic. Terms: ours." in model_card(CONFIG, tmp_path, VALIDATIONS, best_step=10)


def test_the_card_tells_of_a_prediction_that_is_not_the_bases(tmp_path: Path) -> None:
    learnt = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config = CONFIG | {"settings": CONFIG["settings"] | learnt}
    card = model_card(config, tmp_path, VALIDATIONS, best_step=10)
    code = [line for line in card.splitlines() if line.startswith(("pipeline.scheduler", "from diffusers"))]
    pipeline = SimpleNamespace(scheduler=DDPMScheduler())
    exec("\n".join(code), {"pipeline": pipeline})
    assert learnt.items() <= dict(pipeline.scheduler.config).items()
    plain = model_card(CONFIG, tmp_path, VALIDATIONS, best_step=10)
    assert "DDIMScheduler" not in plain and plain.count("\npipeline.scheduler") == 1


def test_the_card_of_stable_diffusion_hands_its_licence_on(tmp_path: Path) -> None:
    config = CONFIG | {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    assert "no medical advice" in model_card(config, tmp_path, VALIDATIONS, best_step=10)


def test_the_hub_never_gets_a_picture_of_a_patient() -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = ["pytorch_lora_weights.safetensors", "README.md", "evaluation/films.png", "evaluation/films.jsonl",
             "samples/step-000100.png", "checkpoint-100/training_state.pt", "logs/events"]  # fmt: skip
    sent = list(filter_repo_objects(there, allow_patterns=hub.UPLOADED))
    assert sent == ["pytorch_lora_weights.safetensors", "README.md", "samples/step-000100.png"]


def test_what_leaves_the_machine_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may hold a name: of whoever trains, or of a patient."""
    base = tmp_path / "jane.doe" / "sd15"
    base.mkdir(parents=True)
    settings = {"rank": 4, "text_encoder_rank": 4, "pretrained_model_name_or_path": str(base)}
    config = CONFIG | {
        "base": str(base),
        "train_data_dir": str(tmp_path),
        "cache_dir": str(tmp_path),
        "settings": settings,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sent = {}
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    cleared = []
    monkeypatch.setattr(api, "upload_folder", lambda self, **of: cleared.append(of["delete_patterns"]))
    monkeypatch.setattr(
        api, "upload_file", lambda self, **of: sent.update({of["path_in_repo"]: of["path_or_fileobj"]})
    )
    assert hub.push(tmp_path, "chest", None) == "me/chest"
    assert cleared == [hub.UPLOADED], "nothing of another run of that name stays"
    assert json.loads(sent["config.json"])["base"] == "sd15"
    assert b"jane.doe" not in sent["config.json"] and str(tmp_path).encode() not in sent["config.json"]
    assert "jane.doe" not in model_card(config, tmp_path, VALIDATIONS, best_step=10)
    for kept in ("assets/cxr-tiny", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        assert public_base(kept) == kept
        assert base_digest(kept) is None, "images by these keep the names that they have"


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(Refused, match="trained, but not uploaded"):
        hub.push(tmp_path, "name", None)
