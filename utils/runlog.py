"""The record of a run: settings, versions, and logs that a resume cuts back to where it goes on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.files import read_jsonl, write_jsonl

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
