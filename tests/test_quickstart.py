"""The quickstart: its page from a finished run, and which stages run again after a break. Hermetic: python is a stub."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from launch import quickstart_page
from tests.conftest import ROOT
from utils.refusal import run

STAGES = ["set-up", "films", "training", "films by the base", "films by the adapter", "evaluation", "report"]
# Writes what the real command writes last, and says on stdout what was asked for
STUB = """#!/usr/bin/env bash
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || exit 1 # every stage would compile the libraries anew
case "$*" in
    "-m pip --version" | "-m pip install"*) ;;
    download.py*) mkdir -p out/quickstart/data && touch out/quickstart/data/dataset.json ;;
    train_lora.py*) [ -z "${BROKEN:-}" ] || exit 1
        mkdir -p out/quickstart/fold0 && touch out/quickstart/fold0/{pytorch_lora_weights.safetensors,README.md} ;;
    generate.py*--lora*) mkdir -p out/quickstart/images/adapter && touch out/quickstart/images/adapter/contact_sheet.png ;;
    generate.py*) mkdir -p out/quickstart/images/base && touch out/quickstart/images/base/contact_sheet.png ;;
    evaluate.py*) mkdir -p out/quickstart/fold0/evaluation && touch out/quickstart/fold0/evaluation/metrics.json ;;
    "-m launch.quickstart_page"*) touch out/quickstart/report.html ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real script, small files in place of weights, and a stub in place of .venv's python."""
    for name in ("cxr-tiny/unet/model.safetensors", "cxr-features/model.safetensors", "demo/metadata.jsonl"):
        path = tmp_path / "assets" / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def quickstart(checkout: Path, **environment: str) -> tuple[int, list[str], str]:
    """Return the exit status, the stages that were not skipped, and stderr."""
    command = ["bash", "launch/quickstart.sh"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ | environment)
    titles = [line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("== ")]
    return done.returncode, [title for title in titles if not title.endswith(": done before")], done.stderr


def test_a_finished_quickstart_does_nothing_again(checkout: Path) -> None:
    assert quickstart(checkout, PYTHONDONTWRITEBYTECODE="1")[:2] == (0, STAGES)
    assert quickstart(checkout)[:2] == (0, [])
    (checkout / "out/quickstart/images/base/contact_sheet.png").unlink()
    assert quickstart(checkout)[:2] == (0, ["films by the base"])


def test_a_broken_quickstart_goes_on_where_it_broke(checkout: Path) -> None:
    assert quickstart(checkout, BROKEN="1")[:2] == (1, STAGES[:3])
    times = (checkout / "out/quickstart/seconds.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in times] == STAGES[:3], "also of the stage that failed"
    assert quickstart(checkout)[:2] == (0, STAGES[2:])


def test_other_bundled_models_are_not_mixed_with_old_films(checkout: Path) -> None:
    quickstart(checkout)
    (checkout / "assets/cxr-tiny/unet/model.safetensors").write_text("2")
    status, ran, stderr = quickstart(checkout)
    assert (status, ran) == (2, [])
    assert "delete it and run this again" in stderr and len(stderr.splitlines()) == 1


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a quickstart leaves behind, as far as its page reads it."""
    stat = {"mean": 0.5, "interval": [0.4, 0.6]}
    compared = dict.fromkeys(("adapter", "base", "gain", "noisy"), stat)
    rebuilt = compared | {"adapter_normalised": 0.4, "base_normalised": 0.3}
    rates = {"mass": {"films": 24, "followed": 0.75, "interval": [0.6, 0.9], "chance": 0.1}}
    metrics = {
        "films": 60,
        "patients": 20,
        "rebuilt": {"0.5": dict.fromkeys(("ssim", "psnr", "ms_ssim"), rebuilt)},
        "bounds": {name: {"mean_film": stat, "ceiling": stat} for name in ("ssim", "psnr", "ms_ssim")},
        "noise_prediction_mse": {"50": compared},
        "prompt_followed": dict.fromkeys(("base", "adapter", "reader", "reader_after_round_trip"), rates),
    }
    files = {
        "fold0/config.json": json.dumps({"films": {"training": 216}}),
        "fold0/log.jsonl": '{"step": 1}\n{"step": 2}\n',
        "fold0/evaluation/metrics.json": json.dumps(metrics),
        "seconds.tsv": "set-up\t50\ntraining\t100\ntraining\t25\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    pictures = [
        "images/base/contact_sheet",
        "images/adapter/contact_sheet",
        "fold0/curves",
        "fold0/evaluation/findings",
    ]
    for name in pictures:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_the_page_says_what_was_measured(finished: Path) -> None:
    quickstart_page.main(quickstart_page.parse_args([str(finished)]))
    page = (finished / "report.html").read_text()
    for text in (
        "216 films",
        "2 steps in 2 min 5 s",
        "in 2 min 55 s",
        "24 films of each",
        "0.75 [0.60, 0.90]",
        "60 films of 20",
    ):
        assert text in " ".join(page.split()), text
    assert page.count("data:image/png;base64,") == 4, "one file that can be sent"
    assert "Not for diagnosis" in page


@pytest.mark.parametrize("name", ["seconds.tsv", "images/adapter/contact_sheet.png", "fold0/evaluation/findings.png"])
def test_an_unfinished_quickstart_has_no_page(finished: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    (finished / name).unlink()
    assert run(quickstart_page.main, lambda: quickstart_page.parse_args([str(finished)])) == 2
    assert f"{name} is missing" in capsys.readouterr().err
