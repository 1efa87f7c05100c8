"""The bundled demo set: films of virtual patients, sampled from cxr-tiny, with findings drawn in."""

from dataclasses import replace
from pathlib import Path

from utils.films import Film
from utils.metadata import parse_table
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.sources import folder

NAME = "demo"
COUNT, SIZE, TEXT = "360", "bundled", "finding, side, zone"
LICENSE = "CC BY 4.0"
RESTRICTED = False
TERMS = """\
Synthetic films of patients who do not exist, made by assets/make_demo.py; see assets/demo/README.md. CC BY 4.0, as the
films of Kermany et al., Cell 2018, that their model was trained on. They show what this software does. They are not for
diagnosis, nor for training or testing anything that will be used for it."""
EXAMPLE = "python download.py"

MIRROR = str(Path(__file__).resolve().parents[2] / "assets/demo")
RESOLUTION = 128  # pixels: that of the base they were sampled from
TABLE = "metadata.jsonl"


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the table, in its order, with the boxes of what is drawn in them."""
    content = mirror.read(TABLE)
    rows = [] if content is None else parse_table(TABLE, content, folder.COLUMNS)
    if not rows or any(not isinstance(row.get("boxes"), list) for row in rows):
        raise Refused(
            f"--mirror {mirror.place} is not the demo set; leave --mirror out, or for your own add --source folder"
        )
    return [replace(folder.film_of(row, TABLE), boxes=row["boxes"], is_prepared=True) for row in rows]
