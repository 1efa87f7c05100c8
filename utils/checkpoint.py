"""Checkpoints that are whole or absent: everything an exact resume needs and nothing else."""

import io
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils.files import read_jsonl, sha256_file, sync_folder, write_bytes, write_json, write_jsonl
from utils.refusal import Refused
from utils.release import DECODER_NAME, HEADER_KEY, KOHYA_NAME, WEIGHTS_NAME
from utils.runlog import cut_back, differences

STATE_NAME = "state.json"
TENSORS_NAME = "training_state.pt"
BEST_NAME = "best_adapter.safetensors"  # a copy of the run's adapter as it was then


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints in a run's folder, ascending. Unfinished ones are not among them."""
    names = (folder.name.removeprefix("checkpoint-") for folder in run.glob("checkpoint-*") if folder.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def save_checkpoint(run: Path, step: int, state: dict, tensors: dict) -> None:
    """Write `checkpoint-<step>`: into another name, synced, then renamed, and only then older ones may go.

    The best adapter so far is copied into it.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        state: numbers and texts, as JSON.
        tensors: state dicts of adapters and optimizer; what `torch.load(weights_only=True)` reads.
    """
    folder = run / f"checkpoint-{step}"
    partial = run / f"checkpoint-{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    buffer = io.BytesIO()  # on a full disk torch.save to a file fails without saying so
    torch.save(tensors, buffer)
    write_bytes(partial / TENSORS_NAME, buffer.getvalue())
    write_json(partial / STATE_NAME, state)
    copy_best(run / WEIGHTS_NAME, partial / BEST_NAME)
    sync_folder(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(run)


def amend_checkpoint(run: Path, step: int, state: dict) -> None:
    """Replace numbers, texts and the best adapter of a checkpoint: after a validation, which changes no weight."""
    copy_best(run / WEIGHTS_NAME, run / f"checkpoint-{step}" / BEST_NAME)
    write_json(run / f"checkpoint-{step}" / STATE_NAME, state)


def copy_best(source: Path, target: Path) -> None:
    """Copy the best adapter, where there is one and it is not there yet."""
    if source.is_file() and not (target.is_file() and sha256_file(target) == sha256_file(source)):
        write_bytes(target, source.read_bytes())


def restore_best(run: Path, step: int, best_step: int) -> None:
    """Put the best adapter as of a checkpoint back: a sync may have lost it, or it is of a later step, now forgotten.

    Args:
        run: the run's folder.
        step: of the checkpoint that is gone on from.
        best_step: that its record names the best; 0 where there was none yet.

    Raises:
        Refused: where neither the run's adapter nor the checkpoint's copy can be read.
    """
    adapter, copy = run / WEIGHTS_NAME, run / f"checkpoint-{step}" / BEST_NAME
    steps = {path: adapter_step(path) for path in (adapter, copy)}
    if steps[adapter] == (best_step or None):
        return
    if best_step == 0 or steps[copy] == best_step:
        for path in (adapter, run / KOHYA_NAME):
            path.unlink(missing_ok=True)
        copy_best(copy, adapter)
    elif steps[adapter] is None:
        raise Refused(
            f"{adapter} is missing or not whole, and so is its copy in {copy.parent}; delete that checkpoint to go on from the "
            "one before, or start afresh with --resume_from_checkpoint none"
        )


def adapter_step(path: Path) -> int | None:
    """Return the step that an adapter file is of, None where there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[HEADER_KEY])["step"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for step in checkpoint_steps(run)[:-keep] if keep > 0 else []:
        delete_checkpoint(run / f"checkpoint-{step}")


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, emptied first: what is deleted in a mounted Drive lies in its trash and counts as used.

    A file with another name elsewhere (a hard or a symbolic link, as backups have them) is not emptied.
    """
    for path in sorted(folder.iterdir(), reverse=True):  # the tensors first: what a kill leaves is no whole checkpoint
        entry = path.lstat()
        if stat.S_ISREG(entry.st_mode) and entry.st_nlink == 1:
            os.truncate(path, 0)
    shutil.rmtree(folder)


def load_checkpoint(folder: Path) -> tuple[dict, dict]:
    """Return `state` and `tensors` (on the CPU) of a checkpoint.

    Raises:
        Refused: where the folder is no whole checkpoint.
    """
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        tensors = torch.load(folder / TENSORS_NAME, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise Refused(
            f"{folder} is no whole checkpoint ({' '.join(str(error).split())[:160]}); leave --resume_from_checkpoint out to "
            "go on from the newest that is whole, or start afresh with --resume_from_checkpoint none"
        ) from error
    return state, tensors


def newest_whole(run: Path) -> tuple[dict, dict, Path, list[str]]:
    """Return `state` and `tensors` of a run's newest whole checkpoint, its folder, and the names of later ones, torn.

    Raises:
        Refused: where none is whole.
    """
    torn = []
    for step in reversed(checkpoint_steps(run)):
        folder = run / f"checkpoint-{step}"
        try:
            return *load_checkpoint(folder), folder, torn
        except Refused:
            torn.append(folder.name)
    raise Refused(
        f"no checkpoint of {run} is whole ({', '.join(torn)}); start afresh with --resume_from_checkpoint none"
    )


def recorded_validations(run: Path, state: dict) -> list[dict]:
    """Return the rows of the validations before a checkpoint: its own, or the record's where it is of before it had any."""
    if "validations" in state:
        return state["validations"]
    log, last = run / "validation.jsonl", state["step"] if state["validated"] else state["step"] - 1
    rows = [row for row in read_jsonl(log) if row["step"] <= last] if log.exists() else []
    if not rows:
        raise Refused(f"{log} is missing or empty; start afresh with --resume_from_checkpoint none")
    return rows


def find_start(
    run: Path, wanted: str, settings: dict, num_processes: int, overwrite: bool, device: str = "cpu"
) -> tuple[dict | None, dict, str]:
    """Find where a run goes on.

    Args:
        run: the run's folder.
        wanted: "latest", one of the run's checkpoints (its name or its folder), or "none".
        settings: of this command.
        num_processes: of this command; it may differ from the checkpoint's, the films a step may not.
        overwrite: whether "none" may replace a finished run.
        device: kind of device of this command; another kind draws other noise.

    Returns:
        The checkpoint's state and tensors (None and {} for a fresh start), and what the user should know.

    Raises:
        Refused: for a checkpoint that is missing or broken, changed settings (each by name), or a finished run that
            would be lost.
    """
    steps = checkpoint_steps(run)
    if wanted == "none" or (wanted == "latest" and not steps):
        if is_finished(run) and not (wanted == "none" and overwrite):
            raise Refused(f"{run} holds a finished run; --resume_from_checkpoint none --overwrite deletes it")
        return None, {}, "starting afresh"
    if wanted == "latest":
        state, tensors, folder, torn = newest_whole(run)
    else:
        folder, torn = run / Path(wanted).name, []
        if not folder.is_dir() or (wanted != folder.name and Path(wanted).resolve() != folder.resolve()):
            raise Refused(f"no checkpoint {wanted} in {run}, which has those of steps {steps or 'none'}")
        state, tensors = load_checkpoint(folder)
    state["validations"] = recorded_validations(run, state)
    parts = ("training_data_hash", "validation_data_hash")
    if [state["settings"].get(part) for part in parts] != [settings.get(part) for part in parts]:
        raise Refused(
            f"{folder} was made with other films or captions than the training folder holds now, with other patients set "
            "aside for validation (a changed finding moves some), or by a version that did not record those; choose "
            "another --output_dir, or start afresh with --resume_from_checkpoint none"
        )
    if changed := differences(state["settings"], settings):
        raise Refused(
            f"{folder} was made with other settings ({'; '.join(changed)}); type the first command again (on another "
            "number of processes with a --train_batch_size that keeps films_a_step), choose another --output_dir, or "
            "start afresh with --resume_from_checkpoint none"
        )
    remark = f"going on from {folder}"
    if torn:
        remark += f", as {' and '.join(torn)} cannot be read"
    if state["num_processes"] != num_processes:
        remark += f", on {num_processes} processes instead of {state['num_processes']}"
    if state["device"] != device:
        remark += f", on {device} instead of {state['device']}, whose noise is another"
    return state, tensors, remark


def is_finished(run: Path) -> bool:
    """Return whether a run has come to its end: its last checkpoint says so, or only its model card is left to."""
    steps = checkpoint_steps(run)
    if not steps:
        return is_run(run) and (run / "README.md").exists()
    try:
        return json.loads((run / f"checkpoint-{steps[-1]}" / STATE_NAME).read_text(encoding="utf-8"))["finished"]
    except (OSError, ValueError, KeyError):
        return False


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that training has written to, not one of the user's with files of their own."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return bool(checkpoint_steps(folder))
    return isinstance(config, dict) and "settings" in config


def go_back_to(run: Path, state: dict, keep: int) -> None:
    """Make a run's folder what it was at a checkpoint, but for older checkpoints beyond `keep`, which a kill has left.

    Args:
        run: the run's folder.
        state: of the checkpoint, from `find_start`.
        keep: how many checkpoints stay; 0 keeps all.

    Raises:
        Refused: where the best adapter as of then is lost.
    """
    restore_best(run, state["step"], state["early_stopping"]["best_step"])
    forget_after(run, state["step"], state["validations"])
    prune_checkpoints(run, keep)


def forget_after(run: Path, step: int, validations: list[dict]) -> None:
    """Delete what lies after `step` and what kills left unfinished, so that the run goes on from there alone.

    Args:
        run: the run's folder.
        step: of the checkpoint that is gone on from.
        validations: its rows of them; one that a kill cut short is not among them and is made again.
    """
    delete_after(run, step)
    cut_back(run / "log.jsonl", step)
    write_jsonl(run / "validation.jsonl", validations)


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints in a folder that are later than `step`, and unfinished ones."""
    for later in checkpoint_steps(folder):
        if later > step:
            delete_checkpoint(folder / f"checkpoint-{later}")
    for partial in folder.glob("checkpoint-*.tmp"):
        delete_checkpoint(partial)


def clear_run(run: Path, keep_decoder: bool) -> None:
    """Delete what an earlier run left in its folder, and only that; not an adapted decoder that will be looked at."""
    run.mkdir(parents=True, exist_ok=True)
    if not is_run(run):
        return
    delete_after(run, -1)  # first: nothing may be gone on from whose records are gone
    if not keep_decoder:
        delete_after(run / "decoder", -1)
        (run / DECODER_NAME).unlink(missing_ok=True)
        shutil.rmtree(run / "decoder", ignore_errors=True)
    pictures = [*run.glob("samples/step-*.png"), *run.rglob("events.out.tfevents.*")]
    records = ("log.jsonl", "validation.jsonl", "curves.png", "README.md", WEIGHTS_NAME, KOHYA_NAME, "config.json")
    for path in (*pictures, *(run / name for name in records)):
        path.unlink(missing_ok=True)
