"""Is the prompted finding in the film, and on the prompted side? Read from films alone, by the bundled encoder.

For sets whose table has a column `boxes` (the demo set, whose findings were drawn in): thresholds are calibrated on
films of the table, the reader's own hit rate on others of them is the ceiling, and the share of films that show
a finding though they were prompted with another one is chance. Nodules and masses are read under one label, and zones
are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from utils.features import FINDING_LABELS, Extracted, finding_label


@dataclass(frozen=True)
class FindingPrompt:
    """A caption that names one finding: what a film generated from it is read for.

    Attributes:
        caption: the whole text.
        finding: name in the table, such as "nodule"; figures are grouped by it.
        label: the one of FINDING_LABELS that it is read under, side included, such as "left nodule or mass".
        row: place of the film that the caption was written for.
    """

    caption: str
    finding: str
    label: str
    row: int


def has_readable_boxes(row: dict) -> bool:
    """Return whether a row of the table says what the film shows in terms that the encoder reads."""
    boxes = row.get("boxes")
    return isinstance(boxes, list) and all(
        isinstance(box, dict)
        and {"finding", "side"} <= set(box)
        and finding_label(box["finding"], box["side"]) in FINDING_LABELS
        for box in boxes
    )


def shown_labels(row: dict) -> set[str]:
    """Return which of FINDING_LABELS a film of the table shows."""
    return {finding_label(box["finding"], box["side"]) for box in row["boxes"]}


def single_findings(rows: Sequence[dict]) -> list[FindingPrompt]:
    """Return the captions of the films that show exactly one finding, in the order of the table."""
    return [
        FindingPrompt(row["text"], box["finding"], finding_label(box["finding"], box["side"]), place)
        for place, row in enumerate(rows)
        if len(row["boxes"]) == 1
        for box in row["boxes"]
    ]


def choose_prompts(candidates: Sequence[FindingPrompt], count: int) -> list[FindingPrompt]:
    """Return at least `count` prompts, equally many a label; captions repeat, in turn, where there are too few."""
    by_label = {}
    for prompt in candidates:
        by_label.setdefault(prompt.label, []).append(prompt)
    each = -(-count // max(1, len(by_label)))
    return [by_label[label][i % len(by_label[label])] for label in sorted(by_label) for i in range(each)]


def calibrate(read: Extracted, shown: Sequence[set[str]]) -> dict[str, float]:
    """Return the probability from which each label counts as there: halfway between films that show it and that do not.

    Halfway between the medians of the two kinds, in log-odds. Where the kinds are far apart, a threshold at the edge of
    either, or halfway between the edges, would be an accident of one film. The sides of a finding share one threshold,
    so that neither is favoured.

    Args:
        read: of N films.
        shown: what each of them shows, [N].

    Returns:
        By label; those that no film or every film shows are left out.
    """
    thresholds = {}
    for label in FINDING_LABELS:
        sides = [other for other in FINDING_LABELS if without_side(other) == without_side(label)]
        there = torch.cat([torch.tensor([side in labels for labels in shown]) for side in sides])
        if there.all() or not there.any():
            continue
        log_odds = torch.logit(torch.cat([read.finding(side) for side in sides]).double(), eps=1e-6)
        halfway = (log_odds[there].quantile(0.5) + log_odds[~there].quantile(0.5)) / 2
        thresholds[label] = halfway.sigmoid().item()
    return thresholds


def without_side(label: str) -> str:
    """Return "nodule or mass" for "left nodule or mass"."""
    return label.removeprefix("right ").removeprefix("left ")


def other_side(label: str) -> str | None:
    """Return the same finding on the other side, None for one that has no side."""
    for side, other in (("right ", "left "), ("left ", "right ")):
        if label.startswith(side):
            return other + without_side(label)
    return None


def shows(read: Extracted, label: str, thresholds: dict[str, float]) -> Tensor:
    """Return which films show a finding on its side, bool [N]: above the threshold, and above the other side."""
    found = read.finding(label) >= thresholds[label]
    opposite = other_side(label)
    return found if opposite is None else found & (read.finding(label) > read.finding(opposite))


def follow_rates(read: Extracted, prompts: Sequence[FindingPrompt], thresholds: dict[str, float]) -> dict[str, dict]:
    """Return how many films show what they were prompted with, and how many show it unasked.

    Args:
        read: of N films.
        prompts: of each film, [N].
        thresholds: from `calibrate`.

    Returns:
        By finding: `films`, `followed` and its 95 % `interval` (Wilson 1927, over films), and `chance`, the share of
        films prompted with another finding, or with this one on the other side, that show it all the same; None
        where there is no such film.
    """
    rates = {}
    labels = np.array([prompt.label for prompt in prompts])
    found = {label: shows(read, label, thresholds).numpy() for label in sorted(set(labels)) if label in thresholds}
    for finding in dict.fromkeys(prompt.finding for prompt in prompts):
        mine = [i for i, prompt in enumerate(prompts) if prompt.finding == finding and prompt.label in found]
        if not mine:
            continue
        hits = [float(found[prompts[i].label][i]) for i in mine]
        unasked = [found[label][labels != label] for label in sorted({prompts[i].label for i in mine})]
        interval = binomtest(int(sum(hits)), len(hits)).proportion_ci(method="wilson")
        rates[finding] = {
            "films": len(mine),
            "followed": float(np.mean(hits)),
            "interval": [float(interval.low), float(interval.high)],
            "chance": float(np.mean(np.concatenate(unasked))) if sum(map(len, unasked)) else None,
        }
    return rates


def reader_rates(read: Extracted, rows: Sequence[dict], folds: Sequence[int]) -> dict[str, dict]:
    """Return how often the reader finds what the table's own films show: no film can follow its prompt more often.

    Thresholds for the films of a fold are calibrated on the other folds.

    Args:
        read: of the table's films, [N].
        rows: of the table, [N].
        folds: of each film, [N].

    Returns:
        As `follow_rates`, over films with exactly one finding.
    """
    decided = torch.zeros(len(rows), len(FINDING_LABELS))
    folds = np.asarray(folds)
    shown = [shown_labels(row) for row in rows]
    for fold in sorted(set(folds.tolist())):
        here, there = (torch.from_numpy(np.flatnonzero(part)) for part in (folds == fold, folds != fold))
        thresholds = calibrate(read.at(there), [shown[i] for i in there.tolist()])
        for label in thresholds:
            decided[here, FINDING_LABELS.index(label)] = shows(read.at(here), label, thresholds).float()
    prompts = single_findings(rows)
    places = torch.tensor([prompt.row for prompt in prompts])
    decisions = replace(read, finding_probabilities=decided).at(places)
    return follow_rates(decisions, prompts, dict.fromkeys(FINDING_LABELS, 0.5))
