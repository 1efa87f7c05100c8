"""What an audit lets an adapter do: its card says it, and the hub gets nothing that repeats its training films."""

import json
from pathlib import Path

import pytest

import train_lora
from tests.training import train
from utils.files import sha256_file
from utils.release import (
    DECODER_NAME,
    EVALUATION,
    FAILED,
    PASSED,
    TOO_FEW,
    UNDECIDED,
    WEIGHTS_NAME,
    in_words,
    read_audit,
    verdict,
    why_not_upload,
)

SPACE = {"probability": 0.512, "interval": [0.48, 0.544], "near_copies": 0.0125, "near_copies_interval": [0.007, 0.021],
         "near_copies_expected": 0.012}  # fmt: skip
AUDIT = {"features": SPACE, "pixels": SPACE, "generated": 1000, "references": 500, "training_films": 2345, "copies": 0,
         "sampling": {"num_inference_steps": 25, "guidance_scale": 4.0}, "verdict": PASSED}  # fmt: skip


def evaluated(run_dir: Path, audit: dict = AUDIT) -> None:
    """Put beside an adapter what evaluate.py leaves there."""
    (run_dir / EVALUATION).parent.mkdir(exist_ok=True)
    adapter = {"sha256": sha256_file(run_dir / WEIGHTS_NAME), "step": 1}
    (run_dir / EVALUATION).write_text(json.dumps({"adapter": adapter, "memorisation": audit}))


@pytest.mark.parametrize(
    ("references", "patients", "intervals", "near", "copies", "expected"),
    [
        (500, 500, [(0.4, 0.55), (0.5, 0.6)], (0.0, 0.03), 0, PASSED),
        (500, 500, [(0.4, 0.55), (0.5, 0.6)], (0.0, 0.03), 1, FAILED),  # a training film, as it is
        (19, 19, [(0.4, 0.55), (0.4, 0.7)], (0.0, 0.03), 1, FAILED),
        (500, 500, [(0.4, 0.55), (0.5, 0.601)], (0.0, 0.03), 0, UNDECIDED),
        (499, 499, [(0.4, 0.55), (0.4, 0.7)], (0.0, 0.03), 0, TOO_FEW),
        (499, 500, [(0.4, 0.55), (0.4, 0.55)], (0.0, 0.03), 0, UNDECIDED),  # --max_films 499 opens no gate
        (500, 900, [(0.4, 0.55), (0.551, 0.7)], (0.0, 0.03), 0, FAILED),
        (20, 20, [(0.4, 0.9), (0.7, 1.0)], (0.0, 0.03), 0, FAILED),  # it takes few films to see that
        (19, 19, [(0.4, 0.9), (0.7, 1.0)], (0.0, 0.03), 0, TOO_FEW),
        (500, 500, [(0.4, 0.55), (0.5, 0.6)], (0.01, 0.036), 0, PASSED),
        (500, 500, [(0.4, 0.55), (0.5, 0.6)], (0.01, 0.037), 0, UNDECIDED),
        (500, 500, [(0.4, 0.55), (0.5, 0.6)], (0.037, 0.06), 0, FAILED),  # near films that were not asked for
        (20, 20, [(0.4, 0.55), (0.5, 0.6)], (0.037, 0.4), 0, FAILED),
    ],
)
def test_upper_ends_let_pass_and_lower_ends_convict(references, patients, intervals, near, copies, expected) -> None:
    spaces = [{"interval": ends, "near_copies_interval": near, "near_copies_expected": 0.012} for ends in intervals]
    assert verdict(references, patients, spaces, copies) == expected
    partly = verdict(references, patients, spaces, copies, num_unmeasured=1)
    assert partly == (UNDECIDED if expected == PASSED else expected), "what was not compared may be copied"


def test_an_audit_is_that_of_what_lies_there(tmp_path: Path) -> None:
    assert read_audit(tmp_path) is None
    (tmp_path / WEIGHTS_NAME).write_bytes(b"one")
    evaluated(tmp_path)
    assert read_audit(tmp_path) == AUDIT
    assert why_not_upload(tmp_path) is None
    (tmp_path / DECODER_NAME).write_bytes(b"a decoder, which the audit was made without")
    assert read_audit(tmp_path) is None
    (tmp_path / DECODER_NAME).unlink()
    (tmp_path / WEIGHTS_NAME).write_bytes(b"another, trained since")
    assert f"evaluate.py --lora {tmp_path}, then the same command again" in why_not_upload(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"one")
    evaluated(tmp_path, {name: part for name, part in AUDIT.items() if name != "copies"})
    assert read_audit(tmp_path) is None, "an earlier version's"
    evaluated(tmp_path, AUDIT | {"sampling": {"num_inference_steps": 9, "guidance_scale": 4.0}})
    assert read_audit(tmp_path) is None, "films of so few steps are like none"
    assert "of films of 10 steps or more" in why_not_upload(tmp_path)
    for damage in ("{", "[]", "{}", '{"adapter": 3}'):
        (tmp_path / EVALUATION).write_text(damage)
        assert read_audit(tmp_path) is None


def test_the_words_hold_every_number() -> None:
    words = in_words(AUDIT)
    for text in ("passed", "1000 films, generated in 25 steps at guidance 4", "500 training patients", "0 are a training film", "0.512 [0.480, 0.544] in features", "in pixels",
                 "2345 training films", "1.2% [0.7%, 2.1%] in features", "up to 1.2% is expected"):  # fmt: skip
        assert text in words, text
    assert "has not been asked" in in_words(None)


def test_only_what_was_audited_is_uploaded_and_nothing_that_repeats_films(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    uploaded = []
    monkeypatch.setattr(train_lora, "push", lambda *args: uploaded.append(args) or "me/chest")
    run_dir = tmp_path / "run"
    command = (
        tiny_base,
        tiny_data,
        run_dir,
        "--max_train_steps",
        "1",
        "--num_validation_images",
        "0",
        "--push_to_hub",
    )
    assert train(*command) == 1
    assert "trained, but not uploaded: nobody has asked yet, of films of" in capsys.readouterr().err
    assert "has not been asked" in (run_dir / "README.md").read_text()
    for said in (FAILED, UNDECIDED):
        evaluated(run_dir, AUDIT | {"verdict": said})
        assert train(*command) == 1
        assert f"trained, but not uploaded: Memorisation audit: {said}." in capsys.readouterr().err
    assert uploaded == []
    for said in (PASSED, TOO_FEW):
        evaluated(run_dir, AUDIT | {"verdict": said})
        assert train(*command) == 0
        assert f"Memorisation audit: {said}." in (run_dir / "README.md").read_text()
    assert uploaded == [(run_dir, None, None)] * 2
