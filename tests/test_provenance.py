"""Generated films on disk: what a file says of itself, and records that no kill leaves wrong."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.files import read_jsonl
from utils.folds import with_folds
from utils.metadata import read_metadata
from utils.provenance import (
    RECORD,
    TABLE,
    eight_bits,
    encode_png,
    file_name,
    keep,
    read_made,
    read_png,
    settle_records,
)
from utils.refusal import Refused

LABELS = {"findings": ["Edema"], "age": 40}


def made(seed: int = 0, **more) -> dict:
    request = {
        "prompt": "Überlagerung, left.\u2028Two.", "negative_prompt": "", "seed": seed, "resolution": 32,
        "init_image_sha256": None,
    }  # fmt: skip
    return request | {"noise_seed": seed, "attempts": 1, "flags": [], "labels": LABELS} | more


def film(seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(np.iinfo(dtype).max, size=(32, 32), dtype=dtype, endpoint=True)


def draw(folder: Path, seed: int, **more) -> str:
    name = file_name({"prompt": "a film", "seed": seed})
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(encode_png(film(seed), made(seed, **more)))
    return name


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_says_how_it_was_made_and_keeps_every_level(tmp_path: Path, dtype: type) -> None:
    png = encode_png(film(1, dtype), made())
    assert png == encode_png(film(1, dtype), made())
    (tmp_path / "a.png").write_bytes(png)
    np.testing.assert_array_equal(read_png(tmp_path / "a.png"), film(1, dtype))
    assert read_made(tmp_path / "a.png") == made()
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["Synthetic"] == "YES" and "Not for diagnosis" in image.text["Disclaimer"]
        assert (image.text["prompt"], image.text["seed"]) == (made()["prompt"], "0")


def test_sixteen_bits_become_eight_as_they_came_from_eight() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(eight_bits(levels * 257), levels)


def test_names_differ_in_whatever_images_differ_in() -> None:
    one = {"prompt": "A/..\\ film: of " + "x" * 300, "seed": 3, "guidance_scale": 4.0}
    assert file_name(one) == file_name(dict(reversed(one.items())))
    assert file_name(one) != file_name(one | {"guidance_scale": 4.5})
    assert "/" not in file_name(one) and len(file_name(one)) < 100
    assert file_name({"prompt": "\u80f8", "seed": 0}).startswith("image_0_")


def test_records_are_mended_and_name_every_image_once(tmp_path: Path) -> None:
    names = [draw(tmp_path, seed) for seed in range(4)]
    for seed in (1, 0, 0):
        keep(tmp_path, names[seed], encode_png(film(seed), made(seed)), made(seed))
    with open(tmp_path / RECORD, "a") as record:
        record.write('{"file_name": "half')  # torn by a kill; images 2 and 3 have no row at all
    rows = settle_records(tmp_path, names)
    assert [row["file_name"] for row in rows] == names
    written = read_jsonl(tmp_path / RECORD)
    assert written == rows
    assert [row["noise_seed"] for row in rows] == [0, 1, 2, 3]
    before = (tmp_path / RECORD).read_bytes(), (tmp_path / TABLE).read_bytes()
    settle_records(tmp_path, names)
    assert ((tmp_path / RECORD).read_bytes(), (tmp_path / TABLE).read_bytes()) == before
    (tmp_path / names[0]).unlink()
    settle_records(tmp_path, names[2:])
    assert [row["file_name"] for row in read_jsonl(tmp_path / RECORD)] == names[1:]


def test_two_equal_commands_at_once_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    requests = [{"prompt": "a film", "seed": seed} for seed in range(50)]

    def command(_: int) -> None:
        for request in requests:
            about = made(request["seed"])
            keep(tmp_path, file_name(request), encode_png(film(request["seed"]), about), about)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(command, range(4)))
    names = [file_name(request) for request in requests]
    assert [row["file_name"] for row in settle_records(tmp_path, names)] == names
    assert not list(tmp_path.glob("*.tmp"))


def test_what_was_held_out_stays_so_when_the_image_is_asked_for_without_its_fold(tmp_path: Path) -> None:
    name = draw(tmp_path, 0)
    settle_records(tmp_path, [name], {name: {"held_out": True}})
    (row,) = settle_records(tmp_path, [name], {name: {"age": 50}})
    assert row["labels"] == made(0)["labels"] | {"held_out": True, "age": 50}
    assert read_jsonl(tmp_path / TABLE) == []


def test_the_folder_is_a_data_set_whose_folds_share_no_noise_and_no_film(tmp_path: Path) -> None:
    names = [draw(tmp_path, seed) for seed in range(12)]
    same_noise = draw(tmp_path, 100, noise_seed=0)
    of_film = [draw(tmp_path, seed, init_image_sha256="f" * 64) for seed in (200, 201)]
    flagged = draw(tmp_path, 300, flags=["blank"])
    settle_records(tmp_path, [*names, same_noise, *of_film, flagged])
    rows = {row["file_name"]: row for row in with_folds(read_metadata(tmp_path))}
    assert flagged not in rows and len(rows) == 15
    assert rows[names[0]]["fold"] == rows[same_noise]["fold"] and rows[of_film[0]]["fold"] == rows[of_film[1]]["fold"]
    assert len({row["patient_id"] for row in rows.values()}) == 13
    assert (rows[names[0]]["findings"], rows[names[0]]["age"], rows[names[0]]["sex"]) == (["Edema"], 40, None)


def test_what_is_not_ours_or_damaged_is_refused_in_words(tmp_path: Path) -> None:
    name = draw(tmp_path, 0)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(Refused, match="no whole PNG of ours"):
        settle_records(tmp_path, [name])
    Image.fromarray(film()).save(tmp_path / "other.png")
    with pytest.raises(Refused, match="no whole PNG of ours"):
        read_made(tmp_path / "other.png")
    (tmp_path / RECORD).write_text("not JSON\n{}\n")
    with pytest.raises(Refused, match="line 1.*move that file away"):
        settle_records(tmp_path, [])
