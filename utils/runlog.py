"""The record of a run: settings, versions, the split of its films, and logs that a resume cuts back to where it goes on."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.files import read_jsonl, write_jsonl
from utils.folds import split_fold, with_folds
from utils.metadata import dataset_hash, read_metadata
from utils.refusal import Refused

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "peft", "bitsandbytes", "xformers", "torchmetrics")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def precision_name(mixed_precision: str) -> str:
    """Return what accelerate's word for a precision means: its "no" is fp32."""
    return "fp32" if mixed_precision == "no" else mixed_precision


def which_run(folder: Path) -> str:
    """Return what to name in place of a folder that is no run's: a run in it or around it, where there is one."""
    around = [folder.parent] if (folder.parent / "config.json").is_file() else []
    runs = around + sorted(path.parent for path in folder.glob("*/config.json"))
    return f"name a run: {', '.join(map(str, runs[:8]))}" if runs else "expected a folder such as out/fold2"


def read_config(run_dir: Path) -> dict:
    """Return a run's settings as `train_lora.py` recorded them."""
    config = run_dir / "config.json"
    if not config.is_file():
        raise Refused(f"no training run at {run_dir} ({config} is missing); {which_run(run_dir)}")
    try:
        record = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{config} is damaged ({error}); train again, or restore it") from error
    if not isinstance(record, dict) or not {"settings", "base", "fold"} <= record.keys():
        raise Refused(f"{config} is not that of a training run of this project; expected a folder such as out/fold2")
    return record


def films_of_run(config: dict, given: Path | None) -> Path:
    """Return the folder of a run's films: the one given, else where the run found them."""
    if given is None and "train_data_dir" not in config:
        raise Refused(
            "this run's config.json names no films, as one from the hub; say where they are: --train_data_dir"
        )
    return given or Path(config["train_data_dir"])


def read_split(config: dict, run_dir: Path, data_dir: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the rows of a run's data: all, those for training (before --max_train_samples), those of its held-out fold.

    Those that it was validated on are in neither part.

    Args:
        config: the run's, from `read_config`.
        run_dir: its folder.
        data_dir: where its films lie now.

    Raises:
        Refused: for other data than it was trained on, and for a table that cannot be read.
    """
    settings = config["settings"]
    rows = read_metadata(data_dir, settings["image_column"], settings["caption_column"])
    rows = with_folds(rows, group_by=settings["group_by"])
    if dataset_hash(rows) != config["data_hash"]:
        raise Refused(f"{data_dir} is not the data that {run_dir} was trained on; its fold may hold training films")
    training, _, held_out = split_fold(rows, config["fold"], settings["seed"], group_by=settings["group_by"])
    # Findings, which decide whom validation has, are not in the hash of the set; earlier versions recorded no split
    if "validation_data_hash" in settings and dataset_hash(training) != settings["training_data_hash"]:
        raise Refused(
            f"{data_dir} has the films that {run_dir} was trained on, but other patients set aside for validation; put "
            "its findings and groups back as they were"
        )
    return rows, training, held_out


def cut_back(log: Path, step: int) -> None:
    """Drop from a JSON-lines log every row after `step`, and a last line that a kill tore; absent logs stay absent."""
    if log.exists():
        write_jsonl(log, [row for row in read_jsonl(log) if row["step"] <= step])


def differences(before: dict, now: dict) -> list[str]:
    """Return "name: before -> now" for every setting that differs or exists on one side only, in order of name."""
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
