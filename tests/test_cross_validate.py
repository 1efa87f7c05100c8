"""launch/cross_validate.sh: every fold once, whatever was done before, on as many GPUs as there are. python is a stub."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S, ROOT

# Says what was asked for in the order it was, and writes what the real commands write last
STUB = """#!/usr/bin/env bash
case "$*" in
    *device_count*) echo "${GPUS:-0}"; exit ;;
    launch/doctor.py*) [[ "$*" == *" --no_launcher --run "*/fold? ]] && echo "python train_lora.py --train_batch_size 8"; exit ;;
    *train_lora.py*) all="$*"; run=${all##*--output_dir }; run=${run%% *}
        [ -z "${SLOW:-}" ] || { trap 'sleep 1; echo "left $run" >>calls.txt; exit 143' TERM; echo "began $run" >>calls.txt; sleep 1000 & wait; }
        [ "$run" != "${BROKEN:-}" ] || { echo "refused: that" >&2; exit 2; }
        mkdir -p "$run"; [ -e "$run/pytorch_lora_weights.safetensors" ] || touch "$run/pytorch_lora_weights.safetensors" ;;
    evaluate.py\\ --lora*) run=$3; mkdir -p "$run/evaluation"; echo '  "training_films": 9' >"$run/evaluation/metrics.json" ;;
esac
echo "${CUDA_VISIBLE_DEVICES:--} $*" >>calls.txt
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "cross_validate.sh", tmp_path / "launch")
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    return tmp_path


def cross_validate(checkout: Path, *flags: str, **environment: str) -> tuple[int, list[str], str]:
    """Run the script; return its status, the commands it gave, and its standard error."""
    (checkout / "calls.txt").unlink(missing_ok=True)
    names = ("PYTHON", "OUT", "DATA", "FOLDS", "EVALUATE", "CUDA_VISIBLE_DEVICES")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        ["bash", checkout / "launch" / "cross_validate.sh", *flags], cwd="/", env={**inherited, **environment},
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    calls = (checkout / "calls.txt").read_text().splitlines() if (checkout / "calls.txt").exists() else []
    return done.returncode, calls, done.stderr


def test_every_fold_is_trained_and_evaluated_then_all_are_pooled(checkout: Path) -> None:
    status, calls, _ = cross_validate(checkout, "--rank", "8", EVALUATE="--seed 3 --max_films 9")
    assert status == 0
    expected = []
    for fold in range(5):
        run = f"--train_data_dir data --output_dir out/fold{fold} --rank 8"
        expected.append(f"- train_lora.py --train_batch_size 8 --fold {fold} {run}")
        expected.append(f"- evaluate.py --lora out/fold{fold} --seed 3 --max_films 9")
    assert calls == [*expected, "- evaluate.py --cross_validation out"]


def test_what_was_evaluated_is_evaluated_again_only_where_adapter_or_flags_changed(checkout: Path) -> None:
    places = dict(OUT="runs/a", DATA="films", FOLDS="0 3")
    cross_validate(checkout, **places)
    status, calls, _ = cross_validate(checkout, **places)
    assert status == 0
    assert [call for call in calls if "--lora" in call] == []
    assert sum("train_lora.py" in call for call in calls) == 2, "which say themselves that they are done"
    adapter = checkout / "runs/a/fold3/pytorch_lora_weights.safetensors"
    later = (checkout / "runs/a/fold3/evaluation/metrics.json").stat().st_mtime + 10
    os.utime(adapter, (later, later))
    _, calls, _ = cross_validate(checkout, **places)
    assert [call for call in calls if "--lora" in call] == ["- evaluate.py --lora runs/a/fold3"]
    os.utime(adapter, (0, 0))
    (checkout / "runs/a/fold0/evaluation/metrics.json").write_text("of an earlier version")
    _, calls, _ = cross_validate(checkout, **places)
    assert [call for call in calls if "--lora" in call] == ["- evaluate.py --lora runs/a/fold0"]
    for again in (2, 0):
        _, calls, _ = cross_validate(checkout, **places, EVALUATE="--max_films 9")
        assert [call for call in calls if "--max_films 9" in call] == [call for call in calls if "--lora" in call]
        assert sum("--lora" in call for call in calls) == again


def test_a_fold_that_fails_ends_it(checkout: Path) -> None:
    status, calls, error = cross_validate(checkout, BROKEN="out/fold1")
    assert status == 2
    assert [call for call in calls if "--fold 2" in call or "--cross_validation" in call] == []
    assert error.endswith("refused: that\n")


def test_an_upload_is_refused_at_the_door(checkout: Path) -> None:
    status, calls, error = cross_validate(checkout, "--rank", "4", "--push_to_hub")
    assert (status, calls) == (2, [])
    assert error.count("\n") == 1 and "evaluated adapter" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_runs_on_the_gpus_leaves_before_the_script_does(checkout: Path, number: signal.Signals) -> None:
    """A fold that went on without it, or was still saving, would keep the next call from its folder."""
    process = subprocess.Popen(
        ["bash", checkout / "launch" / "cross_validate.sh"], cwd="/", env={**os.environ, "GPUS": "2", "SLOW": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup's ignoring of it is inherited
    )  # fmt: skip
    calls = checkout / "calls.txt"

    def said() -> list[str]:
        return sorted(calls.read_text().splitlines()) if calls.exists() else []

    end = time.monotonic() + HANG_S
    while len(said()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(HANG_S) == 130
    assert said() == ["began out/fold0", "began out/fold1", "left out/fold0", "left out/fold1"]


def test_gpus_share_the_folds_and_one_failure_is_the_jobs(checkout: Path) -> None:
    for visible, (one, other) in ({}, "01"), ({"CUDA_VISIBLE_DEVICES": "6,3"}, "63"):
        status, calls, _ = cross_validate(checkout, GPUS="2", **visible)
        assert status == 0
        of_gpu = {call.split("--fold ")[1][0]: call[0] for call in calls if "train_lora.py" in call}
        assert of_gpu == {"0": one, "1": other, "2": one, "3": other, "4": one}
    assert calls[-1].endswith("evaluate.py --cross_validation out")
    shutil.rmtree(checkout / "out")
    status, calls, error = cross_validate(checkout, GPUS="2", BROKEN="out/fold1")
    assert status == 1
    assert "--cross_validation" not in " ".join(calls)
    assert "refused: that" in error
