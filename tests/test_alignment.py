"""What captions assert and films show: known answers, floors and ceilings. Features are drawn, no model runs."""

import numpy as np
import pytest
import torch

from utils.alignment import (
    AGE_LABEL,
    SIDE,
    Readers,
    agreement,
    agreement_gain,
    assertions,
    compare_pairs,
    counterparts,
    fit_reader,
    readable_labels,
)
from utils.folds import patient_of


def rows_of(count: int, prefix: str, seed: int = 0) -> list[dict]:
    """Films of two a patient; a third shows an effusion, a third a mass, apart from one another."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        findings = [name for name in ("effusion", "mass") if generator.random() < 1 / 3]
        view = generator.choice(["AP", "PA"])
        rows.append(
            {
                "file_name": f"{prefix}{i}.png", "patient_id": f"{prefix}{i // 2}", "findings": findings, "view": view, "sex": "M", "age": 40 + i % 3,
                "text": f"{view} chest radiograph. {' and '.join(findings) or 'No finding'}.",
            }
        )  # fmt: skip
    return rows


def features_of(rows: list[dict], seed: int, noise: float = 0.5) -> torch.Tensor:
    """Eight features, of which the first three say what the caption asserts."""
    told = torch.tensor([[of["effusion"], of["mass"], of["AP, not PA"]] for of in assertions(rows)]).float()
    rest = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(seed))
    return torch.cat([told + noise * rest[:, :3], rest[:, 3:]], dim=1)


def readers_of(training: list[dict], held_out: list[dict], **more: torch.Tensor) -> Readers:
    features = {"training": features_of(training, 1), "held_out": features_of(held_out, 2)} | more
    return Readers(training, held_out, features, {}, seed=0)


def test_captions_assert_findings_and_what_their_words_say() -> None:
    rows = [
        {"text": "AP chest radiograph of a 71-year-old woman. Left effusion.", "findings": ["effusion"]},
        {"text": "PA chest radiograph of a 59 year old male.", "findings": []},
        {"text": "Chest radiograph. Left and right effusions; a leftover. Human. APPARENT."},
    ]
    first, second, third = assertions(rows)
    assert first == {"effusion": True, "man, not woman": False, "AP, not PA": True, SIDE: True, AGE_LABEL: True}
    assert second == {"effusion": False, "man, not woman": True, "AP, not PA": False, AGE_LABEL: False}
    assert third == {}, "both sides are no side, and words within words none"


def test_labels_need_films_and_patients_with_and_without() -> None:
    told = [{"a": i < 8, "b": i < 7, "c": i < 8} for i in range(16)]
    assert readable_labels((told, [str(i) for i in range(16)])) == ["a", "c"]
    assert readable_labels((told, ["one"] * 8 + ["another"] * 8)) == []
    assert readable_labels((told, [str(i) for i in range(16)]), (told[:15], [str(i) for i in range(15)])) == []


def test_films_that_show_their_captions_reach_the_ceiling_and_others_the_floor() -> None:
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    patients, asserted = [patient_of(row) for row in held_out], assertions(held_out)
    deaf = features_of(rows_of(120, "h", 3), 4)  # films of other captions
    readers = readers_of(training, held_out, generated=features_of(held_out, 5), base=deaf)
    assert readers.labels == ["AP, not PA", "effusion", "mass"]
    scores = {
        kind: readers.read(name) for kind, name in (("generated", "generated"), ("base", "base"), ("real", "held_out"))
    }
    is_new = [i % 2 == 0 for i in range(120)]
    found = agreement(asserted, scores, patients, is_new, seed=0)
    assert set(found["labels"]) == set(readers.labels)
    for figures in (*found["labels"].values(), found["mean"]):
        low, high = figures["generated"]["interval"]
        assert 0.8 < low <= figures["generated"]["mean"] <= high
        assert abs(figures["generated"]["mean"] - figures["real"]["mean"]) < 0.12
        for floor in (figures["shuffled"], figures["base"]):
            assert floor["interval"][0] < 0.5 < floor["interval"][1]
        assert figures["new_captions"]["mean"] > 0.8
    assert found["labels"]["mass"]["films"] == 120
    assert found["labels"]["mass"]["positive"] == sum("mass" in row["findings"] for row in held_out)
    assert found["labels"]["mass"]["new"] == 60
    few = agreement(asserted, scores, patients, [i < 9 for i in range(120)], seed=0)
    assert few["labels"]["mass"]["new_captions"] is None
    assert agreement(asserted, {"generated": {}, "base": {}, "real": {}}, patients, is_new, seed=0) == {}


def test_the_gain_of_one_set_over_another_is_paired() -> None:
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    patients, asserted = [patient_of(row) for row in held_out], assertions(held_out)
    readers = readers_of(
        training, held_out, generated=features_of(held_out, 5), base=features_of(rows_of(120, "h", 3), 4)
    )
    one, other = readers.read("generated"), readers.read("base")
    assert all(
        of == {"gain": 0.0, "interval": [0.0, 0.0]} for of in agreement_gain(asserted, one, one, patients, 0).values()
    )
    gains = agreement_gain(asserted, one, other, patients, 0)
    assert list(gains) == ["mean over findings", "AP, not PA", "effusion", "mass"]
    assert gains["mean over findings"]["gain"] == pytest.approx(
        (gains["effusion"]["gain"] + gains["mass"]["gain"]) / 2
    )
    assert gains["mean over findings"]["interval"][0] > 0.2
    reverse = agreement_gain(asserted, other, one, patients, 0)
    assert reverse["mass"]["gain"] == pytest.approx(-gains["mass"]["gain"])


def test_a_mirrored_film_is_read_for_the_other_side() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(60) < 0.5
    features = generator.normal(size=(60, 4)) + np.where(truth, 1.0, -1.0)[:, None]
    reader = fit_reader(features, truth, [str(i) for i in range(60)], seed=0, mirrored=True)
    np.testing.assert_allclose(reader.decision_function(-features), -reader.decision_function(features))
    assert reader["regression"].intercept_ == 0


def test_sides_are_read_from_a_film_less_its_mirror_image() -> None:
    rows = [
        {"file_name": f"{i}", "patient_id": f"{i}", "text": f"{'Left' if i % 2 else 'Right'} effusion."}
        for i in range(40)
    ]
    plain = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    side = torch.tensor([1.0 if i % 2 else -1.0 for i in range(40)])
    mirrored = plain - 2 * side[:, None]
    kinds = ("training", "held_out")
    readers = Readers(rows, rows, dict.fromkeys(kinds, plain), dict.fromkeys(kinds, mirrored), seed=0)
    assert readers.labels == [SIDE]
    assert ((readers.read("held_out")[SIDE] > 0) == (side.numpy() > 0)).all()


def test_classifiers_learn_from_generated_films_what_those_show() -> None:
    """Generated films without what their captions say teach nothing, however real they look."""
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    known = training[::2]
    real = features_of(training, 1)[::2]
    for generated, low, high in ((features_of(known, 7), 0.85, 1.0), (features_of(rows_of(100, "x", 9), 8), 0.2, 0.7)):
        part = readers_of(training, held_out, known=generated, known_real=real).use(known, held_out)
        assert part["films"] == 100
        for figures in (part["mean"], part["labels"]["effusion"]):
            assert low <= figures["synthetic"]["mean"] <= high
            assert figures["real"]["mean"] > 0.85
            assert figures["all_real"]["interval"][0] > 0.8
    assert readers_of(training, held_out, known=real[:4], known_real=real[:4]).use(known[:4], held_out) == {}


def test_counterparts_are_of_other_patients_and_as_alike_as_there_are() -> None:
    rows = [
        {"patient_id": "a", "findings": ["mass"], "view": "AP", "sex": "F", "age": 60},
        {"patient_id": "a", "findings": [], "view": "AP", "sex": "F", "age": 60},
        {"patient_id": "b", "findings": [], "view": "PA", "sex": "F", "age": 60},
        {"patient_id": "c", "findings": [], "view": "AP", "sex": "F", "age": 20},
        {"patient_id": "d", "findings": [], "view": "AP", "sex": "F", "age": 50},
        {"patient_id": "e", "findings": [], "view": "AP", "sex": "M", "age": 60},
        {"patient_id": "f"},
    ]
    assert counterparts(rows, 10, seed=0) == [(0, 4)]
    assert counterparts(rows, 0, seed=0) == []
    assert counterparts(rows[:2], 10, seed=0) == []


def test_of_pairs_the_film_with_the_finding_is_read_more_strongly() -> None:
    rows = [{"patient_id": f"p{i}", "findings": ["mass"] if i < 4 else []} for i in range(8)]
    pairs = [(i, i + 4) for i in range(4)]
    read = {
        "generated": {"mass": np.array([1.0, 1.0, 1.0, 0.0])},
        "counterpart": {"mass": np.array([0.0, 0.0, 1.0, 1.0])},
        "real": {"mass": np.array([1.0] * 4 + [0.0] * 4)},
    }
    part = compare_pairs(rows, pairs, read, seed=0)
    assert set(part) == {"all", "mass"}
    assert part["mass"] == part["all"]
    assert part["mass"]["pairs"] == 4
    assert part["mass"]["generated"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert part["mass"]["real"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert compare_pairs(rows, pairs, {kind: {} for kind in read}, seed=0) == {}
