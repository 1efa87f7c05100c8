"""Reading prompted findings: thresholds, sides, chance. Hermetic, with readings made up."""

import math

import pytest
import torch

from utils.features import FINDING_LABELS, Extracted
from utils.findings import (
    FindingPrompt,
    calibrate,
    choose_prompts,
    follow_rates,
    has_readable_boxes,
    other_side,
    reader_rates,
    shown_labels,
    shows,
    single_findings,
)


def reading(*films: dict[str, float]) -> Extracted:
    """What an encoder would have read: probabilities by label, 0.1 for the others."""
    probabilities = torch.full((len(films), len(FINDING_LABELS)), 0.1)
    for i, film in enumerate(films):
        for label, probability in film.items():
            probabilities[i, FINDING_LABELS.index(label)] = probability
    return Extracted(torch.zeros(len(films), 2), torch.zeros(len(films), 3), probabilities)


def row(text: str, *boxes: tuple[str, str | None]) -> dict:
    return {"text": text, "boxes": [{"finding": finding, "side": side} for finding, side in boxes]}


LEFT, RIGHT = "left pleural effusion", "right pleural effusion"


def test_the_side_has_to_be_right() -> None:
    thresholds = dict.fromkeys(FINDING_LABELS, 0.5)
    read = reading({LEFT: 0.9}, {RIGHT: 0.9}, {LEFT: 0.8, RIGHT: 0.9}, {LEFT: 0.4}, {"cardiomegaly": 0.6})
    assert shows(read, LEFT, thresholds).tolist() == [True, False, False, False, False]
    assert shows(read, RIGHT, thresholds).tolist() == [False, True, True, False, False]
    assert shows(read, "cardiomegaly", thresholds).tolist() == [False, False, False, False, True]
    assert other_side("left nodule or mass") == "right nodule or mass"
    assert other_side("cardiomegaly") is None


def test_thresholds_lie_halfway_and_are_shared_by_the_sides() -> None:
    read = reading({LEFT: 0.3}, {RIGHT: 0.3}, {LEFT: 0.2}, {}, {"cardiomegaly": 0.9})
    thresholds = calibrate(read, [{LEFT}, {RIGHT}, set(), set(), {"cardiomegaly"}])
    halfway = math.sqrt((0.3 / 0.7) * (0.1 / 0.9))  # of the odds: the mean of the log-odds
    assert thresholds[LEFT] == thresholds[RIGHT] == pytest.approx(halfway / (1 + halfway))
    assert thresholds["cardiomegaly"] == pytest.approx(0.5), "halfway in log-odds between 0.1 and 0.9"
    assert "left pacemaker" not in thresholds, "no film shows one"


def test_one_odd_film_does_not_move_a_threshold() -> None:
    """At the edges of the kinds, or halfway between them, it would: 0.31 to 0.98 for three sets of the same findings."""
    shown = [{LEFT}] * 9 + [set()] * 9
    without = calibrate(reading(*[{LEFT: 0.99}] * 9, *[{}] * 9), shown)
    with_odd_ones = calibrate(reading(*[{LEFT: 0.99}] * 8, {LEFT: 0.01}, {LEFT: 0.999}, *[{}] * 8), shown)
    assert with_odd_ones == without


def test_thresholds_are_numbers_where_probabilities_are_certain() -> None:
    certain = calibrate(reading({LEFT: 1.0}, {LEFT: 1.0}, {LEFT: 0.0}), [{LEFT}, {LEFT}, set()])
    assert 0 < certain[LEFT] < 1


def test_only_boxes_that_the_encoder_can_read_are_read() -> None:
    assert has_readable_boxes(row("a", ("nodule", "left"))) and has_readable_boxes(row("normal"))
    for boxes in (None, "[]", [[0, 0, 10, 10]], [{"finding": "nodule"}], [{"finding": "fracture", "side": "left"}]):
        assert not has_readable_boxes({"text": "a", "boxes": boxes})
    assert not has_readable_boxes({"text": "a"})


def test_prompts_name_one_finding_and_are_shared_out_evenly() -> None:
    rows = [
        row("a", ("nodule", "left")), row("b"), row("c", ("mass", "left")), row("d", ("cardiomegaly", None)),
        row("e", ("nodule", "right"), ("cardiomegaly", None)),
    ]  # fmt: skip
    candidates = single_findings(rows)
    assert [(p.caption, p.finding, p.label, p.row) for p in candidates] == [
        ("a", "nodule", "left nodule or mass", 0),
        ("c", "mass", "left nodule or mass", 2),
        ("d", "cardiomegaly", "cardiomegaly", 3),
    ]
    chosen = choose_prompts(candidates, 5)
    assert [p.caption for p in chosen] == ["d", "d", "d", "a", "c", "a"]
    assert choose_prompts([], 5) == []
    assert shown_labels(rows[4]) == {"right nodule or mass", "cardiomegaly"}


def test_chance_is_what_is_read_unasked() -> None:
    def prompt(label: str) -> FindingPrompt:
        return FindingPrompt(f"caption of {label}", "pleural effusion" if "effusion" in label else label, label, 0)

    prompts = [prompt(LEFT), prompt(LEFT), prompt(RIGHT), prompt("cardiomegaly")]
    read = reading({LEFT: 0.9}, {}, {LEFT: 0.9}, {RIGHT: 0.9, "cardiomegaly": 0.9})
    rates = follow_rates(read, prompts, dict.fromkeys(FINDING_LABELS, 0.5))
    effusion = rates["pleural effusion"]
    assert effusion["films"] == 3
    assert effusion["followed"] == pytest.approx(1 / 3)
    # Left is read in one of the two films not asked for it, right in one of the three
    assert effusion["chance"] == pytest.approx(2 / 5)
    assert effusion["interval"][0] <= effusion["followed"] <= effusion["interval"][1]
    low, high = rates["cardiomegaly"].pop("interval")
    assert rates["cardiomegaly"] == {"films": 1, "followed": 1.0, "chance": 0.0}
    assert low == pytest.approx(1 / (1 + 1.96**2), abs=1e-3) and high == 1, "one film says little"
    alone = follow_rates(read.at(torch.tensor([0, 1])), prompts[:2], dict.fromkeys(FINDING_LABELS, 0.5))
    assert alone["pleural effusion"]["chance"] is None, "no film was asked for anything else"


def test_the_reader_is_calibrated_on_other_folds_than_it_is_tried_on() -> None:
    """In fold 1 all probabilities lie lower: the threshold of fold 0 misses them, and only that one may be used."""
    rows = [row(str(i), ("cardiomegaly", None)) if i % 2 else row(str(i)) for i in range(8)]
    folds = [0] * 4 + [1] * 4
    levels = [0.5, 0.8, 0.5, 0.9, 0.2, 0.4, 0.2, 0.45]
    read = reading(*({"cardiomegaly": level} for level in levels))
    rates = reader_rates(read, rows, folds)
    assert rates["cardiomegaly"]["films"] == 4
    assert rates["cardiomegaly"]["followed"] == 0.5, "fold 0 by fold 1's threshold, 0.4; fold 1 by fold 0's, 0.8"
