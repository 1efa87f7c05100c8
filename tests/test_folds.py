"""No patient, and no copy of a film, is on two sides of a split; every side has its share of findings."""

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from utils.films import difference_hash, thumbnail
from utils.folds import (
    assign_folds,
    draw_most_patients,
    draw_patients,
    find_duplicates,
    group_of,
    held_out_of,
    merge_groups,
    patient_of,
    shuffle_captions,
    split_fold,
    with_folds,
)
from utils.metadata import dataset_hash
from utils.refusal import Refused


def made_up_rows(num_patients: int = 120, **columns) -> list[dict]:
    """Rows of patients with one to five films, a third of them with a finding."""
    rng = random.Random(0)
    return [
        {
            "file_name": f"images/{patient:03d}_{film}.png",
            "text": "A film.",
            "patient_id": f"p{patient}",
            "findings": ["Edema"] if rng.random() < 0.33 else [],
            **columns,
        }
        for patient in range(num_patients)
        for film in range(rng.randint(1, 5))
    ]


def patients(rows: list[dict], group_by: str = "patient_id") -> set[str]:
    return {group_of(row, group_by) for row in rows}


def test_no_patient_is_in_two_folds_and_folds_are_balanced():
    rows = with_folds(made_up_rows(), 5, seed=0)
    assert len({(row["patient_id"], row["fold"]) for row in rows}) == 120
    sizes = Counter(row["fold"] for row in rows)
    sick = Counter(row["fold"] for row in rows if row["findings"])
    assert sorted(sizes) == [0, 1, 2, 3, 4]
    assert max(sizes.values()) - min(sizes.values()) <= 0.1 * len(rows) / 5
    assert max(sick.values()) - min(sick.values()) <= 0.1 * len(rows) / 5


@pytest.mark.parametrize("boxes", [False, True])
def test_every_finding_is_spread_over_the_folds(boxes):
    """And each place of a finding, where the table knows places: a fold without left lower masses cannot teach them."""
    rng = np.random.default_rng(0)
    rows = made_up_rows(300)
    for row in rows:
        found = np.flatnonzero(rng.random(6) < (0.2, 0.15, 0.1, 0.1, 0.05, 0.03))
        row["findings"] = [f"finding {number}" for number in found]
        if boxes:
            row["boxes"] = [{"finding": name, "side": str(rng.choice(["left", "right"]))} for name in row["findings"]]
    rows = with_folds(rows, 5, 0)

    def spread(has) -> float:
        rates = [np.mean([has(row) for row in rows if row["fold"] == fold]) for fold in range(5)]
        return max(rates) - min(rates)

    for number in range(6):
        name = f"finding {number}"
        assert spread(lambda row, name=name: name in row["findings"]) < 0.07
        if boxes:
            for side in ("left", "right"):
                box = {"finding": name, "side": side}
                assert spread(lambda row, box=box: box in row["boxes"]) < 0.07


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows():
    rows = made_up_rows()
    shuffled = random.Random(1).sample(rows, len(rows))
    assert with_folds(rows, 5, seed=0) == with_folds(shuffled, 5, seed=0)
    assert with_folds(rows, 5, seed=0) != with_folds(rows, 5, seed=1)


def test_folds_of_the_table_are_kept():
    rows = with_folds(made_up_rows(), 3, seed=7)
    assert with_folds(rows[::-1], 5, seed=0) == rows
    with pytest.raises(Refused, match="images/000_0.png has no fold but other rows have"):
        with_folds([rows[0] | {"fold": None}, *rows[1:]], 5, seed=0)


def test_equal_files_of_different_patients_stay_together():
    rows = [{**row, "sha256": "same" if i % 120 == 0 else str(i)} for i, row in enumerate(made_up_rows())]
    dealt = with_folds(rows)
    assert len({row["fold"] for row in dealt if row["sha256"] == "same"}) == 1
    fold = next(row["fold"] for row in dealt if row["sha256"] == "same")
    training, validation, _ = split_fold(dealt, (fold + 1) % 5, seed=0)
    sides = [any(row["sha256"] == "same" for row in side) for side in (training, validation)]
    assert sum(sides) == 1


def test_equal_files_in_the_folds_of_a_table_share_a_side_or_are_refused():
    """Whatever the fold, they train together or validate together, as download.py's copies do."""
    table = [row | {"fold": i % 3} for i, row in enumerate(made_up_rows()[::3])]
    table = [row | {"patient_id": row["file_name"], "sha256": row["file_name"]} for row in table]
    for row in table[0:4:3]:
        row["sha256"] = "same"
    for seed in range(30):
        parts = split_fold(with_folds(table), 1, seed)
        assert sorted(sum(row["sha256"] == "same" for row in part) for part in parts) == [0, 0, 2]
    table[3]["fold"] = 1
    with pytest.raises(Refused, match=f"{table[0]['file_name']} and {table[3]['file_name']} .* in folds 0 and 1"):
        with_folds(table)


def test_fewer_patients_than_folds_are_refused():
    assert sorted(assign_folds(list("abc"), [0, 0, 1], 3, seed=0)) == [0, 1, 2]
    with pytest.raises(Refused, match="3 patients cannot fill 5 folds"):
        assign_folds(list("aabbc"), [0] * 5, 5, seed=0)
    with pytest.raises(Refused, match="films from 2 noises cannot fill 5 folds.* generate.py --own_noise"):
        assign_folds(["noise-0", "noise-1", "noise-0"], [0] * 3, 5, seed=0)


@pytest.mark.parametrize("findings", [["Edema"], [], None])
def test_a_single_stratum_and_a_rare_one_still_make_folds(findings):
    rows = made_up_rows(10, findings=findings)
    rows[0]["findings"] = ["Hernia"]
    assert {row["fold"] for row in with_folds(rows, 5, seed=0)} == {0, 1, 2, 3, 4}


def test_a_column_boxes_of_another_meaning_still_makes_folds():
    counted = with_folds([row | {"boxes": len(row["findings"])} for row in made_up_rows()])
    assert [row["fold"] for row in counted] == [row["fold"] for row in with_folds(made_up_rows())]


def test_one_patient_with_most_films_leaves_no_fold_empty():
    groups = ["many"] * 100 + list("abcd")
    assert len(set(assign_folds(groups, [0, 1] * 52, 5, seed=0))) == 5


def smooth_film(seed: int) -> np.ndarray:
    """A random film without fine detail, uint8 [256, 256]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))


def saved_again(film: np.ndarray) -> np.ndarray:
    """The film smaller, darker and as a JPEG, as another archive would have it."""
    buffer = io.BytesIO()
    darker = Image.fromarray((255 * (film / 255) ** 1.1).astype(np.uint8)).resize((150, 150))
    darker.save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer).resize((256, 256)))


def duplicates_among(films: list[np.ndarray], owners: list) -> list[tuple[int, int]]:
    thumbnails = [thumbnail(film) for film in films]
    return find_duplicates([difference_hash(film) for film in films], thumbnails.__getitem__, owners)


def test_copies_are_found_and_others_are_not():
    films = [smooth_film(seed) for seed in range(40)]
    films += [saved_again(films[7]), films[3], films[9][:, ::-1]]
    assert duplicates_among(films, list(range(43))) == [(3, 41), (7, 40)]


def test_copies_within_one_patient_are_not_looked_for():
    film = smooth_film(0)
    assert duplicates_among([film, film], ["a", "a"]) == []


def test_a_hash_alone_decides_nothing():
    first, second = smooth_film(0), smooth_film(1)
    thumbnails = [thumbnail(first), thumbnail(second)]
    assert find_duplicates([5, 5], thumbnails.__getitem__, ["a", "b"]) == []


def test_duplicates_are_found_across_blocks():
    film = thumbnail(smooth_film(0))
    hashes = np.random.default_rng(0).integers(0, 2**63, 1500).tolist()
    hashes[1400] = hashes[3]
    assert find_duplicates(hashes, lambda index: film, list(range(1500))) == [(3, 1400)]


def test_merged_groups_are_chained_and_named_after_the_first():
    assert merge_groups(list("edcba"), [(0, 1), (1, 4), (2, 2)]) == ["a", "a", "c", "b", "a"]
    assert merge_groups(list("ab"), []) == ["a", "b"]


def test_a_group_above_five_per_cent_is_refused():
    names = [f"p{number:03d}" for number in range(200)]
    chain = [(index, index + 1) for index in range(9)]
    assert merge_groups(names, chain)[:11] == ["p000"] * 10 + ["p010"]
    with pytest.raises(Refused, match="11 of 200 films, of 11 patients"):
        merge_groups(names, [*chain, (9, 10)])
    assert merge_groups(["p000"] * 50 + names[50:], [])[:50] == ["p000"] * 50  # one patient may have many films
    assert merge_groups(names[:20], chain)[0] == "p000"  # in a small set a pair is already much


@pytest.mark.parametrize("fold", range(5))
def test_splits_share_no_patient_and_lose_no_row(fold):
    rows = with_folds(made_up_rows(), 5, seed=0)
    training, validation, held_out = split_fold(rows, fold, seed=0)
    assert not patients(training) & patients(validation)
    assert not patients(training + validation) & patients(held_out)
    assert sorted(row["file_name"] for row in training + validation + held_out) == [row["file_name"] for row in rows]
    assert {row["fold"] for row in held_out} == {fold}
    assert len(patients(validation)) == round(0.1 * len(patients(training + validation)))


def test_validation_has_its_share_of_findings():
    rows = with_folds(made_up_rows(600), 5, seed=0)
    for fold in range(5):
        training, validation, _ = split_fold(rows, fold, seed=0)
        share = [np.mean([bool(row["findings"]) for row in part]) for part in (training, validation)]
        assert share[0] == pytest.approx(share[1], abs=0.08)


def test_split_depends_on_seed_and_fold_and_not_on_the_order_of_rows():
    rows = with_folds(made_up_rows(), 5, seed=0)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert split_fold(rows, 1, seed=0) == split_fold(shuffled, 1, seed=0)
    assert patients(split_fold(rows, 1, seed=0)[1]) != patients(split_fold(rows, 1, seed=1)[1])


def test_patients_tied_by_a_copy_stay_together_everywhere():
    rows = made_up_rows()
    for row in rows:
        number = int(row["patient_id"][1:])
        row["group"] = f"p{number - number % 3}"  # three patients each
    rows = with_folds(rows, 5, seed=0)
    assert len({(row["group"], row["fold"]) for row in rows}) == 40
    for fold in range(5):
        parts = split_fold(rows, fold, seed=0)
        groups = [{row["group"] for row in part} for part in parts]
        assert sum(map(len, groups)) == 40


def test_every_image_can_be_its_own_patient():
    rows = made_up_rows(patient_id=None)
    with pytest.raises(Refused, match="--group_by image"):
        with_folds(rows, 5, seed=0)
    rows = with_folds(rows, 5, seed=0, group_by="image")
    with pytest.raises(Refused, match="--group_by image"):
        split_fold(rows, 0, seed=0)
    training, validation, held_out = split_fold(rows, 0, seed=0, group_by="image")
    assert len(training) + len(validation) + len(held_out) == len(rows)


def test_copies_stay_together_where_every_image_is_its_own_patient():
    rows = made_up_rows(patient_id=None)
    for row in rows:
        row["group"] = rows[0]["file_name"] if row in rows[:9] else row["file_name"]
    assert len({row["fold"] for row in with_folds(rows, 5, seed=0, group_by="image")[:9]}) == 1


def test_folds_that_do_not_exist_are_refused():
    rows = with_folds(made_up_rows(), 3, seed=0)
    with pytest.raises(Refused, match="has folds 0, 1, 2"):
        split_fold(rows, 3, seed=0)
    with pytest.raises(Refused, match="no column fold"):
        split_fold(made_up_rows(), 0, seed=0)
    with pytest.raises(Refused, match="--group_by family"):
        split_fold(rows, 0, seed=0, group_by="family")


def test_two_patients_outside_the_fold_are_the_least():
    rows = [{**row, "fold": index} for index, row in enumerate(made_up_rows(3)[:3])]
    rows[0]["patient_id"], rows[1]["patient_id"], rows[2]["patient_id"] = "a", "b", "c"
    training, validation, held_out = split_fold(rows, 0, seed=0)
    assert [len(training), len(validation), len(held_out)] == [1, 1, 1]
    with pytest.raises(Refused, match="two at least"):
        split_fold(rows[:2], 0, seed=0)


def test_one_film_a_patient_is_drawn_and_as_many_patients_as_may_be() -> None:
    rows = [{"file_name": f"{i}.png", "patient_id": "many" if i < 8 else str(i)} for i in range(12)]
    drawn = draw_patients(rows, 9, seed=0)
    assert sorted(map(patient_of, drawn)) == ["10", "11", "8", "9", "many"]
    assert draw_patients(rows, 9, seed=0) == drawn != draw_patients(rows, 9, seed=1)
    assert [row["file_name"] for row in draw_patients(rows, 2, seed=0)] == [row["file_name"] for row in drawn[:2]]
    seven = draw_most_patients(rows, 7, seed=0)
    assert len(seven) == 7 and seven == sorted(seven, key=lambda row: int(row["file_name"][:-4]))
    assert len(set(map(patient_of, seven))) == 5
    assert draw_most_patients(rows, 50, seed=0) == rows
    assert patient_of({"file_name": "a", "patient_id": 3, "group": "g"}) == "g"
    assert patient_of({"file_name": "a"}) == "a"


def test_shuffled_captions_are_the_same_captions_on_other_films() -> None:
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}", "findings": [i]} for i in range(50)]
    shuffled = shuffle_captions(rows, seed=0)
    assert [row | {"text": ""} for row in shuffled] == [row | {"text": ""} for row in rows]
    assert sorted(row["text"] for row in shuffled) == sorted(row["text"] for row in rows)
    assert sum(row["text"] == other["text"] for row, other in zip(rows, shuffled, strict=True)) < 5
    assert shuffled == shuffle_captions(rows, seed=0) != shuffle_captions(rows, seed=1)


@pytest.mark.parametrize("group_by", ["patient_id", "image"])
def test_an_adapters_fold_is_known_in_the_set_that_it_was_trained_on_and_in_no_other(group_by: str) -> None:
    rows = made_up_rows()
    dealt = with_folds(rows, group_by=group_by)
    header = {"fold": 2, "data_hash": dataset_hash(dealt), "settings": {"group_by": group_by}}
    assert held_out_of(rows, header) == {row["file_name"] for row in dealt if row["fold"] == 2}
    assert held_out_of(rows[1:], header) == set()
    assert held_out_of([row | {"patient_id": None} for row in rows], header) == set()
    assert held_out_of(rows, {}) == set()
