"""What captions assert and films show: known answers, floors and ceilings. Features are drawn, no model runs."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from utils.alignment import (
    AGE_LABEL,
    SIDE,
    Asked,
    LinearProbes,
    agreement,
    agreement_gain,
    assertions,
    compare_pairs,
    counterparts,
    fit_probe,
    labels_in_all,
    views_of,
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


def probes_of(training: list[dict], held_out: list[dict], **more: torch.Tensor) -> LinearProbes:
    features = {"training": features_of(training, 1), "held_out": features_of(held_out, 2)} | more
    return LinearProbes(training, held_out, features, {}, seed=0)


def test_captions_assert_findings_and_what_their_words_say() -> None:
    rows = [
        {"text": "AP chest radiograph of a 71-year-old woman. Left effusion.", "findings": ["effusion"]},
        {"text": "PA chest radiograph of a 59 year old male.", "findings": []},
        {"text": "Chest radiograph. Left and right effusions; a leftover. Human. APPARENT."},
        {"text": "PA view of a man. No left effusion. Right nodule. AP diameter as before.", "view": "PA", "sex": "F"},
        {"text": "The AP diameter is large.", "view": "PA"},
        {"text": "PA view of a man.", "view": "p.a.", "sex": "male"},
    ]
    first, second, third, fourth, fifth, sixth = assertions(rows)
    assert first == {"effusion": True, "man, not woman": False, "AP, not PA": True, SIDE: True, AGE_LABEL: True}
    assert second == {"effusion": False, "man, not woman": True, "AP, not PA": False, AGE_LABEL: False}
    assert third == {}, "both sides are no side, and words within words none"
    assert fourth == {SIDE: False}, "what is denied is on no side, and what the table contradicts is not said"
    assert fifth == {}
    assert sixth == {"man, not woman": True, "AP, not PA": False}, (
        "tables of one's own write views and sexes as they like"
    )


def test_labels_need_films_and_patients_with_and_without() -> None:
    told = [{"a": i < 8, "b": i < 7, "c": i < 8} for i in range(16)]
    assert labels_in_all((told, [str(i) for i in range(16)])) == ["a", "c"]
    assert labels_in_all((told, ["one"] * 8 + ["another"] * 8)) == []
    assert labels_in_all((told, [str(i) for i in range(16)]), (told[:15], [str(i) for i in range(15)])) == []


def test_films_that_show_their_captions_reach_the_ceiling_and_others_the_floor() -> None:
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    patients, asserted = [patient_of(row) for row in held_out], assertions(held_out)
    deaf = features_of(rows_of(120, "h", 3), 4)  # films of other captions
    probes = probes_of(training, held_out, generated=features_of(held_out, 5), base=deaf)
    assert list(probes.by_label) == ["AP, not PA", "effusion", "mass"]
    scores = {
        kind: probes.read(name) for kind, name in (("generated", "generated"), ("base", "base"), ("real", "held_out"))
    }
    is_new = [i % 2 == 0 for i in range(120)]
    asked = Asked(asserted, patients)
    found = agreement(asked, scores, is_new)
    assert set(found["labels"]) == set(probes.by_label)
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
    few = agreement(asked, scores, [i < 9 for i in range(120)])
    assert few["labels"]["mass"]["new_captions"] is None
    assert few["mean"]["new_captions"] is None, "a mean over fewer findings is another figure"
    assert agreement(asked, {"generated": {}, "base": {}, "real": {}}, is_new) == {}


def test_folds_are_scored_each_by_itself() -> None:
    """Probes of two folds may differ by any offset, and findings be oftener in one: neither is agreement."""
    generator = np.random.default_rng(0)
    folds = np.repeat([0, 1], 150)
    truth = generator.random(300) < np.where(folds == 0, 0.2, 0.6)
    asserted, patients = [{"mass": bool(value)} for value in truth], [str(i) for i in range(300)]
    asked = Asked(asserted, patients, folds.tolist())
    deaf, told = generator.normal(size=300), truth + generator.normal(size=300)
    for scores, expected in ((deaf, 0.5), (told, 0.76)):
        shifted = scores + np.where(folds == 1, 3.0, 0.0)
        by_fold = [roc_auc_score(truth[folds == fold], scores[folds == fold]) for fold in (0, 1)]
        pairs = [truth[folds == fold].sum() * (~truth[folds == fold]).sum() for fold in (0, 1)]
        found = asked.auroc({"mass": shifted}, "mass")
        assert found["mean"] == pytest.approx(np.average(by_fold, weights=pairs))
        assert found["interval"][0] < expected < found["interval"][1]
        assert found == asked.auroc({"mass": scores}, "mass")
    floor, _ = asked.shuffled({"mass": deaf + 3.0 * folds})
    assert floor["mass"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert Asked(asserted, patients).auroc({"mass": deaf + 3.0 * folds}, "mass")["mean"] > 0.6
    views = ["AP" if fold else "PA" for fold in folds]
    sorted_by_view = Asked(
        [of | {"AP, not PA": bool(fold)} for of, fold in zip(asserted, folds, strict=True)], patients, views=views
    ).within_view()
    assert sorted_by_view.auroc({"mass": deaf + 3.0 * folds}, "mass") == asked.auroc({"mass": deaf}, "mass")
    alone = sorted_by_view.auroc({"AP, not PA": deaf}, "AP, not PA")
    assert alone == {"mean": None, "interval": None}, "nothing to compare"
    for one_at_most in (None, [None] * 300, ["AP"] * 300, ["AP", None] * 150):
        assert Asked(asserted, patients, views=one_at_most).within_view() is None
    some = Asked(asserted, patients, views=[view if i % 2 else None for i, view in enumerate(views)]).within_view()
    half = Asked(asserted[1::2], patients[1::2], views=views[1::2]).within_view()
    assert some.auroc({"mass": deaf}, "mass")["mean"] == half.auroc({"mass": deaf[1::2]}, "mass")["mean"]
    unread = np.where(folds == 1, np.nan, deaf)
    assert asked.auroc({"mass": unread}, "mass")["mean"] == pytest.approx(roc_auc_score(truth[:150], deaf[:150]))


def test_a_finding_that_goes_with_the_view_cannot_be_compared_within_one() -> None:
    """All AP films show pneumonia, no PA film does, as in many a case-control set: there is no figure, and no NaN."""
    asserted = [{"pneumonia": i % 2 == 0, "edema": i % 4 < 2} for i in range(80)]
    scores = {label: np.array([of[label] + i / 80 for i, of in enumerate(asserted)]) for label in asserted[0]}
    views = ["AP" if of["pneumonia"] else "PA" for of in asserted]
    asked = Asked(asserted, [str(i) for i in range(80)], views=views)
    found = agreement(asked, {"generated": scores, "base": scores, "real": scores}, [True] * 80)
    json.dumps(found, allow_nan=False)
    assert found["labels"]["edema"]["within_view"]["generated"]["mean"] > 0.9
    assert found["labels"]["pneumonia"]["within_view"]["generated"] == {"mean": None, "interval": None}
    assert found["mean"]["within_view"]["generated"] == {"mean": None, "interval": None, "findings": 2}
    assert found["mean"]["generated"]["mean"] > 0.9


def test_a_films_view_is_the_tables_or_its_captions() -> None:
    rows = [
        {"text": "AP chest radiograph.", "view": None}, {"text": "Chest radiograph.", "view": "PA"}, {"text": "Chest."},
        {"text": "Chest radiograph.", "view": "FRONTAL"}, {"text": "Chest radiograph.", "view": "LL"},
    ]  # fmt: skip
    assert views_of(rows, assertions(rows)) == ["AP", "PA", None, None, "Lateral"]


def test_few_patients_of_a_kind_have_no_interval() -> None:
    asserted = [{"mass": i < 9} for i in range(40)]
    scores = {"mass": np.arange(40.0)}
    assert Asked(asserted, [str(i) for i in range(40)]).auroc(scores, "mass") == {"mean": 0.0, "interval": None}
    assert Asked(asserted, [str(i) for i in range(40)]).mean_auroc(scores) is None
    scores["effusion"] = -scores["mass"]
    both = [of | {"effusion": i < 20} for i, of in enumerate(asserted)]
    assert Asked(both, [str(i) for i in range(40)]).mean_auroc(scores)["findings"] == 1


def test_the_gain_of_one_set_over_another_is_paired() -> None:
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    probes = probes_of(
        training, held_out, generated=features_of(held_out, 5), base=features_of(rows_of(120, "h", 3), 4)
    )
    one, other = probes.read("generated"), probes.read("base")
    asked = Asked(assertions(held_out), [patient_of(row) for row in held_out])
    assert all(of == {"gain": 0.0, "interval": [0.0, 0.0]} for of in agreement_gain(asked, one, one).values())
    gains = agreement_gain(asked, one, other)
    assert list(gains) == ["mean over findings", "AP, not PA", "effusion", "mass"]
    assert gains["mean over findings"]["gain"] == pytest.approx(
        (gains["effusion"]["gain"] + gains["mass"]["gain"]) / 2
    )
    assert gains["mean over findings"]["interval"][0] > 0.2
    reverse = agreement_gain(asked, other, one)
    assert reverse["mass"]["gain"] == pytest.approx(-gains["mass"]["gain"])


def test_a_mirrored_film_is_read_for_the_other_side() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(60) < 0.5
    features = generator.normal(size=(60, 4)) + np.where(truth, 1.0, -1.0)[:, None]
    probe = fit_probe(features, truth, [str(i) for i in range(60)], seed=0, mirrored=True)
    np.testing.assert_allclose(probe.decision_function(-features), -probe.decision_function(features))
    assert probe["regression"].intercept_ == 0


def test_sides_are_read_from_a_film_less_its_mirror_image() -> None:
    rows = [
        {"file_name": f"{i}", "patient_id": f"{i}", "text": f"{'Left' if i % 2 else 'Right'} effusion."}
        for i in range(40)
    ]
    side = torch.tensor([1.0 if i % 2 else -1.0 for i in range(40)])
    plain, mirrored = {}, {}
    for seed, kind in enumerate(("training", "held_out")):
        plain[kind] = 5 * torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
        mirrored[kind] = (
            plain[kind] - 2 * side[:, None] + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(9))
        )
    probes = LinearProbes(rows, rows, plain, mirrored, seed=0)
    assert list(probes.by_label) == [SIDE]
    assert ((probes.read("held_out")[SIDE] > 0) == (side.numpy() > 0)).all()


def test_classifiers_learn_from_generated_films_what_those_show() -> None:
    """Generated films without what their captions say teach nothing, however real they look."""
    training, held_out = rows_of(200, "t", 1), rows_of(120, "h", 2)
    known = training[::2]
    real = features_of(training, 1)[::2]
    for generated, low, high in ((features_of(known, 7), 0.85, 1.0), (features_of(rows_of(100, "x", 9), 8), 0.2, 0.7)):
        part = probes_of(training, held_out, known=generated, known_real=real).tstr(known, held_out)
        assert part["films"] == 100
        for figures in (part["mean"], part["labels"]["effusion"]):
            assert low <= figures["synthetic"]["mean"] <= high
            assert figures["real"]["mean"] > 0.85
            assert figures["all_real"]["interval"][0] > 0.8
    assert probes_of(training, held_out, known=real[:4], known_real=real[:4]).tstr(known[:4], held_out) == {}


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
    another = {"patient_id": "a", "findings": ["mass"], "view": "AP", "sex": "F", "age": 60}
    assert {j for _, j in counterparts([*rows, another], 10, seed=0)} == {3, 4}, "none is taken twice before all are"
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
    part = compare_pairs(rows, pairs, read)
    assert set(part) == {"all", "mass"}
    assert part["mass"] == part["all"]
    assert part["mass"]["pairs"] == 4
    assert part["mass"]["generated"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert part["mass"]["real"]["mean"] == 1.0
    assert part["mass"]["real"]["interval"] == pytest.approx(
        list(binomtest(4, 4).proportion_ci(method="wilson")), abs=1e-4
    )
    assert compare_pairs(rows, pairs, {kind: {} for kind in read}) == {}
    for row in rows[4:]:
        row["patient_id"] = "one healthy patient"
    few = compare_pairs(rows, pairs, read)["mass"]["real"]["interval"]
    assert few == pytest.approx(list(binomtest(1, 1).proportion_ci(method="wilson")), abs=1e-4)
    rows[0]["findings"] = ["mass", "nodule"]
    for kind, low in (("generated", 0.0), ("counterpart", 1.0), ("real", 0.0)):
        read[kind]["nodule"] = np.full(8, low)
    part = compare_pairs(rows, pairs, read)
    assert (part["nodule"]["pairs"], part["all"]["pairs"], part["all"]["counterparts"]) == (1, 4, 4)
    assert part["all"]["generated"]["mean"] == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
