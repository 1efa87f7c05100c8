"""Checkpoints: whole or absent, newest kept, and refused where they do not fit. Hermetic."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from utils.checkpoint import (
    checkpoint_steps,
    clear_run,
    find_start,
    forget_after,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from utils.files import read_jsonl, write_jsonl
from utils.refusal import Refused
from utils.release import WEIGHTS_NAME

SETTINGS = {"rank": 4, "films_a_step": 8}
VALIDATIONS = [{"step": 0, "ssim": 0.5}, {"step": 1, "ssim": 0.625}]


def save(run: Path, step: int, finished: bool = False, settings: dict | None = None) -> None:
    state = {"step": step, "finished": finished, "num_processes": 1, "device": "cpu", "settings": settings or SETTINGS}
    state |= {"validated": True, "validations": VALIDATIONS}
    save_checkpoint(run, step, state, {"adapters": {"a": torch.full((2,), float(step))}})


def start(run: Path, wanted: str = "latest", processes: int = 1, overwrite: bool = False, **settings):
    return find_start(run, wanted, SETTINGS | settings, processes, overwrite)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    state, tensors = load_checkpoint(tmp_path / "checkpoint-7")
    assert state["step"] == 7
    assert torch.equal(tensors["adapters"]["a"], torch.tensor([7.0, 7.0]))


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-100").rename(tmp_path / "checkpoint-100.tmp")  # killed before it was renamed
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10]  # 10 after 9: by number, not by name
    assert start(tmp_path)[0]["step"] == 10
    assert start(tmp_path, wanted=str(tmp_path / "checkpoint-9"))[0]["step"] == 9


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 3]
    prune_checkpoints(tmp_path, keep=0)  # keeps all
    assert checkpoint_steps(tmp_path) == [2, 3]


def test_what_is_deleted_is_emptied_first_but_not_what_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drive's trash counts. Nor is a checkpoint whole that a kill left half emptied."""
    for step in (1, 2):
        save(tmp_path, step)
    old, backup = tmp_path / "checkpoint-1", tmp_path / "backup.json"
    backup.hardlink_to(old / "state.json")
    (old / "linked").symlink_to(tmp_path / "checkpoint-2" / "training_state.pt")
    trash, emptied, truncate = {}, [], os.truncate

    def note(path: Path, length: int) -> None:
        emptied.append(path.name)
        truncate(path, length)

    monkeypatch.setattr(os, "truncate", note)
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder: trash.update({p.name: p.read_bytes() for p in folder.iterdir()})
    )
    (old / "best_adapter.safetensors").write_bytes(b"best")
    prune_checkpoints(tmp_path, keep=1)
    assert emptied == ["training_state.pt", "best_adapter.safetensors"]
    assert trash["training_state.pt"] == trash["best_adapter.safetensors"] == b""
    assert json.loads(backup.read_text())["step"] == 1
    assert load_checkpoint(tmp_path / "checkpoint-2")[0]["step"] == 2


def test_going_on_from_an_earlier_checkpoint_forgets_what_came_after(tmp_path: Path) -> None:
    """Else the next kill would go on from a checkpoint whose steps are no longer in the log."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-4.tmp").mkdir()
    write_jsonl(tmp_path / "log.jsonl", [{"step": step} for step in (1, 2, 3)])
    assert start(tmp_path, wanted="checkpoint-2")[0]["step"] == 2  # a name, as diffusers takes it
    forget_after(tmp_path, 2, VALIDATIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "log.jsonl",
        "validation.jsonl",
    ]
    assert [row["step"] for row in read_jsonl(tmp_path / "log.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "validation.jsonl") == VALIDATIONS


def test_a_fresh_folder_starts_afresh(tmp_path: Path) -> None:
    assert start(tmp_path / "none")[:2] == (None, {})


def test_changed_settings_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Refused, match="rank: 4 -> 8"):
        start(tmp_path, rank=8)
    with pytest.raises(Refused, match="films_a_step: 8 -> 16"):
        start(tmp_path, films_a_step=16)


def test_another_number_of_processes_is_allowed_and_said_but_not_another_batch(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state, _, remark = start(tmp_path, processes=2)
    assert state["step"] == 1
    assert "on 2 processes instead of 1" in remark
    with pytest.raises(Refused, match="films_a_step: 8 -> 16"):
        start(tmp_path, processes=2, films_a_step=16)


def test_a_finished_run_is_not_lost_by_accident(tmp_path: Path) -> None:
    save(tmp_path, 1, finished=True)
    with pytest.raises(Refused, match="--overwrite"):
        start(tmp_path, wanted="none")
    assert start(tmp_path, wanted="none", overwrite=True)[0] is None
    clear_run(tmp_path / "other", keep_decoder=False)
    (tmp_path / "other" / WEIGHTS_NAME).touch()  # killed between its first adapter and its first checkpoint
    assert start(tmp_path / "other")[0] is None
    (tmp_path / "other" / "config.json").write_text('{"settings": {}}')
    (tmp_path / "other" / "README.md").touch()  # finished, and its checkpoints deleted to save space
    with pytest.raises(Refused, match="finished run"):
        start(tmp_path / "other")


def test_an_unfinished_run_may_be_started_afresh(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert start(tmp_path, wanted="none")[0] is None


def test_broken_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no checkpoint"):
        start(tmp_path / "run", wanted=str(tmp_path / "run" / "checkpoint-3"))
    save(tmp_path / "elsewhere", 3)
    with pytest.raises(Refused, match="no checkpoint"):  # its logs would not be ours
        start(tmp_path / "run", wanted=str(tmp_path / "elsewhere" / "checkpoint-3"))
    save(tmp_path, 3)
    file = tmp_path / "checkpoint-3" / "training_state.pt"
    for content in (file.read_bytes()[:100], b"", b"no checkpoint"):
        file.write_bytes(content)
        with pytest.raises(Refused, match="no whole checkpoint"):
            start(tmp_path, wanted="checkpoint-3")
        with pytest.raises(Refused, match=r"no checkpoint of .* is whole \(checkpoint-3\); start afresh"):
            start(tmp_path)
    assert start(tmp_path, wanted="none")[0] is None  # the way out that the message names


@pytest.mark.parametrize("name", ["training_state.pt", "state.json"])
def test_a_torn_checkpoint_is_passed_over_and_said_unless_it_is_asked_for(tmp_path: Path, name: str) -> None:
    """Half of it is what a mounted Drive keeps of a file when the machine is taken away."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / name).write_bytes(b"")
    state, _, remark = start(tmp_path)
    assert state["step"] == 1
    assert remark == f"going on from {tmp_path / 'checkpoint-1'}, as checkpoint-3 and checkpoint-2 cannot be read"
    with pytest.raises(Refused, match="checkpoint-3 is no whole checkpoint .* leave --resume_from_checkpoint out"):
        start(tmp_path, wanted="checkpoint-3")
    forget_after(tmp_path, 1, state["validations"])
    assert checkpoint_steps(tmp_path) == [1]


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    save(tmp_path, 3)
    torch.save({"adapters": Trap()}, tmp_path / "checkpoint-3" / "training_state.pt")
    with pytest.raises(Refused, match="no whole checkpoint"):
        start(tmp_path, wanted="checkpoint-3")
    assert not (tmp_path / "ran").exists()


def test_clearing_a_run_takes_only_what_a_run_writes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path / "decoder", 2)
    (tmp_path / "checkpoint-3.tmp").mkdir()
    (tmp_path / "log.jsonl").touch()
    for name in ("notes.txt", "checkpoint-best/mine.bin", "checkpoint-500-mine/mine.bin", "checkpoint-500.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    clear_run(tmp_path, keep_decoder=False)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"notes.txt", "checkpoint-best/mine.bin", "checkpoint-500-mine/mine.bin", "checkpoint-500.zip"}
    assert all(path.read_text() == "mine" for path in tmp_path.rglob("*") if path.is_file())


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    """One that no run has written to, whatever its files are called."""
    for name in ("README.md", "config.json", "samples/mine.png", "logs/slurm-1.out"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert start(tmp_path)[0] is None
    clear_run(tmp_path, keep_decoder=False)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    (tmp_path / "config.json").write_text('{"settings": {}}')
    (tmp_path / "samples" / "step-000000.png").touch()
    clear_run(tmp_path, keep_decoder=False)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"mine.png", "slurm-1.out"}


def test_other_films_are_refused_in_words(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Refused, match="other films or captions"):
        start(tmp_path, training_data_hash="other")
    with pytest.raises(Refused, match="other patients set aside .* or by a version that did not record those"):
        start(tmp_path, validation_data_hash="other")


@pytest.mark.parametrize(("validated", "rows"), [(True, VALIDATIONS), (False, VALIDATIONS[:1])])
def test_a_checkpoint_of_before_it_held_validations_takes_those_of_the_record(
    tmp_path: Path, validated: bool, rows: list[dict]
) -> None:
    save(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "state.json"
    state = json.loads(path.read_text()) | {"validated": validated}
    del state["validations"]
    path.write_text(json.dumps(state))
    record = tmp_path / "validation.jsonl"
    write_jsonl(record, [*VALIDATIONS, {"step": 2}])
    assert start(tmp_path)[0]["validations"] == rows
    for lose in (lambda: record.write_bytes(b""), record.unlink):
        lose()
        with pytest.raises(Refused, match=r"validation\.jsonl is missing or empty; start afresh"):
            start(tmp_path)


def test_another_kind_of_device_is_said(tmp_path: Path) -> None:
    save(tmp_path, 1)
    _, _, remark = find_start(tmp_path, "latest", SETTINGS, 1, overwrite=False, device="cuda")
    assert "on cuda instead of cpu" in remark
