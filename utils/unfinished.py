"""What an evaluation that was cut off had drawn and scored: it waits beside the results until these are whole."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.files import canonical_json, write_bytes

NAME = "unfinished-{}.safetensors"


def keep(
    folder: Path, made_of: list, name: str, what: list, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what `make` returns, by sorted name: from a file where it was made before, else made now and put into one.

    Args:
        folder: of the results.
        made_of: whatever decides what comes out: models, settings, versions.
        name: of what is made, unlike that of all else.
        what: films, or captions and seeds, that it is made of.
        make: draws or scores.
    """
    key = hashlib.sha256(canonical_json([made_of, what]).encode()).hexdigest()
    path = folder / NAME.format(re.sub(r"[^a-z]+", "-", name))
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() == {"key": key}:
                print(f"{name}: from {path}, which an unfinished evaluation left")
                return {tensor: file.get_tensor(tensor) for tensor in sorted(file.keys())}
    except (FileNotFoundError, SafetensorError):  # none, or half of one
        pass
    made = dict(sorted(make().items()))
    write_bytes(path, save({tensor: values.contiguous() for tensor, values in made.items()}, {"key": key}))
    return made


def forget(folder: Path) -> None:
    """Delete what was kept in a folder."""
    for path in folder.glob(NAME.format("*")):
        path.write_bytes(b"")  # in place: what is deleted from a mounted Drive keeps its room there for weeks
        path.unlink()
