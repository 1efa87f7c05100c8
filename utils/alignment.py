"""Do films show what their captions say, and does a classifier learn from them what it learns from real ones?

Asked of any encoder's features by logistic regressions, which are fitted on the training patients' real films and read
the held-out patients' captions in films: generated from them, and real. What a caption asserts: the table's findings,
and of its own words sex, view, side and age. Nothing here was fitted on a film that is read.
"""

import re
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from utils.distances import auroc, weighted_auroc
from utils.folds import patient_of
from utils.metrics import bootstrap_interval
from utils.seeding import derive_seed

LEAST_FILMS, LEAST_PATIENTS = 8, 5  # with a label and as many without, in training and held out
STRENGTHS = (1e-3, 1e-2, 1e-1)  # inverse regularisation, of which cross-validation by patient takes one
RESAMPLES = 1000  # of patients, for intervals
SHUFFLES = 200  # of captions among films, for the floor
OLD = 60  # years
SIDE = "left, not right"
# What captions say in words of their own: yes, no. A caption with both or neither asserts nothing
CONTRASTS = {
    "man, not woman": (re.compile(r"\b(man|male|boy)\b", re.I), re.compile(r"\b(woman|female|girl)\b", re.I)),
    "AP, not PA": (re.compile(r"\bAP\b"), re.compile(r"\bPA\b")),
    SIDE: (re.compile(r"\bleft\b", re.I), re.compile(r"\bright\b", re.I)),
}
AGE_LABEL = f"{OLD} or older"
AGE = re.compile(r"\b(\d+)[- ]years?[- ]old\b", re.I)


def assertions(rows: Sequence[dict]) -> list[dict[str, bool]]:
    """Return what each film's caption asserts, by label: every finding of the table, and what the caption's words say.

    Args:
        rows: of `metadata.jsonl`. Without a column `findings` there are only the words.
    """
    findings = sorted({finding for row in rows for finding in row.get("findings") or []})
    asserted = []
    for row in rows:
        told = {finding: finding in row["findings"] for finding in findings} if row.get("findings") is not None else {}
        for label, (yes, no) in CONTRASTS.items():
            words = bool(yes.search(row["text"])), bool(no.search(row["text"]))
            if sum(words) == 1:
                told[label] = words[0]
        if years := AGE.search(row["text"]):
            told[AGE_LABEL] = int(years[1]) >= OLD
        asserted.append(told)
    return asserted


def is_finding(label: str) -> bool:
    return label not in CONTRASTS and label != AGE_LABEL


def fit_reader(
    features: np.ndarray,
    truth: np.ndarray,
    patients: Sequence[str],
    seed: int,
    strength: float | None = None,
    mirrored: bool = False,
) -> Pipeline:
    """Fit a logistic regression on standardised features.

    Args:
        features: [N, D].
        truth: bool [N].
        patients: whose films, [N]; cross-validation keeps those of one together.
        seed: of the cross-validation.
        strength: inverse regularisation; None takes the one of STRENGTHS with the best cross-validated AUROC.
        mirrored: features are those of a film less those of its mirror image: nothing is added to them, so that a film
            and its mirror image get opposite scores.
    """
    model = Pipeline(
        [
            ("scale", StandardScaler(with_mean=not mirrored)),
            ("regression", LogisticRegression(C=strength or 1.0, fit_intercept=not mirrored, max_iter=2000)),
        ]
    )
    if strength is not None:
        return model.fit(features, truth)
    folds = StratifiedGroupKFold(LEAST_PATIENTS, shuffle=True, random_state=seed % 2**32)
    search = GridSearchCV(model, {"regression__C": STRENGTHS}, scoring="roc_auc", cv=folds)
    return search.fit(features, truth, groups=np.asarray(patients)).best_estimator_


def readable_labels(*sets: tuple[Sequence[dict[str, bool]], Sequence[str]]) -> list[str]:
    """Return the labels that enough films and patients have, and as many have not, in every set of assertions."""
    kept = None
    for asserted, patients in sets:
        counts: dict[tuple[str, bool], list[str]] = {}
        for told, patient in zip(asserted, patients, strict=True):
            for label, value in told.items():
                counts.setdefault((label, value), []).append(patient)
        enough = {kind for kind, of in counts.items() if len(of) >= LEAST_FILMS and len(set(of)) >= LEAST_PATIENTS}
        here = {label for label, _ in enough if {(label, True), (label, False)} <= enough}
        kept = here if kept is None else kept & here
    return sorted(kept or ())


class Readers:
    """A reader a label, fitted on the training patients' real films.

    Args:
        rows: of the training films, N.
        held_out_rows: of the films that will be read: a label has a reader only where both sets can carry it.
        features: what films are read from, [.., D], by kind of film: "training" and "held_out", rows as above; for `use`
            also "known_real" and "known", real training films and those generated from their captions.
        mirrored: the same of their mirror images.
        seed: of the cross-validations.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        held_out_rows: Sequence[dict],
        features: dict[str, Tensor],
        mirrored: dict[str, Tensor],
        seed: int,
    ):
        self.features = {kind: of.double().numpy() for kind, of in features.items()}
        self.sided = {kind: self.features[kind] - of.double().numpy() for kind, of in mirrored.items()}
        self.patients = [patient_of(row) for row in rows]
        self.asserted, self.seed = assertions(rows), seed
        held_out = assertions(held_out_rows), [patient_of(row) for row in held_out_rows]
        self.labels = readable_labels((self.asserted, self.patients), held_out)
        self.by_label = {label: self._fit(label, "training", self.asserted, self.patients) for label in self.labels}

    def _of(self, label: str, kind: str) -> np.ndarray:
        return self.sided[kind] if label == SIDE else self.features[kind]

    def _fit(self, label, kind, asserted, patients, strength=None) -> Pipeline:
        told = [i for i, of in enumerate(asserted) if label in of]
        truth = np.array([asserted[i][label] for i in told])
        return fit_reader(
            self._of(label, kind)[told], truth, [patients[i] for i in told],
            derive_seed(self.seed, "readers", label), strength, mirrored=label == SIDE,
        )  # fmt: skip

    def read(self, kind: str) -> dict[str, np.ndarray]:
        """Return the log-odds of each label in films of one kind, float64 [N]."""
        return {label: model.decision_function(self._of(label, kind)) for label, model in self.by_label.items()}

    def use(self, known: Sequence[dict], held_out_rows: Sequence[dict]) -> dict:
        """Return how well readers fitted on generated films read real held-out ones, beside readers fitted on real films.

        Args:
            known: rows of training films, M, one a patient, from whose captions films were generated.
            held_out_rows: of the films that are read.

        Returns:
            `films`, M; by label, and as `mean` over findings, AUROC with its 95 % interval by patient: `real` and
            `synthetic` from M films, `both` from 2 M, `all_real` from all training films. Labels that too few of the M
            captions assert are left out. {} where there is none.
        """
        asserted, patients = assertions(known), [patient_of(row) for row in known]
        truth, whose = assertions(held_out_rows), [patient_of(row) for row in held_out_rows]
        scores: dict[str, dict[str, np.ndarray]] = {"real": {}, "synthetic": {}, "both": {}, "all_real": {}}
        self.features["both"] = np.concatenate([self.features["known_real"], self.features["known"]])
        if "known" in self.sided:
            self.sided["both"] = np.concatenate([self.sided["known_real"], self.sided["known"]])
        for label in readable_labels((asserted, patients)):
            if label not in self.by_label:
                continue
            strength = self.by_label[label]["regression"].C
            for name, kind, times in (("real", "known_real", 1), ("synthetic", "known", 1), ("both", "both", 2)):
                model = self._fit(label, kind, asserted * times, patients * times, strength)
                scores[name][label] = model.decision_function(self._of(label, "held_out"))
            scores["all_real"][label] = self.by_label[label].decision_function(self._of(label, "held_out"))
        if not scores["real"]:
            return {}
        labels = {
            label: {name: _area(of[label], truth, label, whose, self.seed) for name, of in scores.items()}
            for label in scores["real"]
        }
        mean = {name: _mean_area(of, truth, whose, self.seed) for name, of in scores.items()}
        return {"films": len(known), "labels": labels, "mean": mean}


def agreement(
    asserted: Sequence[dict[str, bool]],
    scores: dict[str, dict[str, np.ndarray]],
    patients: Sequence[str],
    is_new: Sequence[bool],
    seed: int,
) -> dict:
    """Return how well films show what their captions assert: AUROC of the readers' log-odds.

    Args:
        asserted: by the captions of N films.
        scores: log-odds by kind of film and label, [N]: of films "generated" by the adapter and by the "base" from
            these captions, and of the "real" films whose captions they are, the ceiling.
        patients: [N].
        is_new: captions that training never saw, [N].
        seed: of the bootstrap and the shuffles.

    Returns:
        By label, and as `mean` over the findings (None without one): by kind the AUROC as `mean`, with its 95 %
        `interval` by patient; `shuffled`, the floor: the same of generated films beside the captions of others, the mean
        of 200 shuffles and the middle 95 % of them; `new_captions`: generated films whose caption is new, None where too
        few assert it. By label also the numbers `films`, `positive` and `new`. {} without labels.
    """
    whose, labels = list(patients), list(scores["generated"])
    if not labels:
        return {}
    orders = [np.random.default_rng(derive_seed(seed, "shuffle", i)).permutation(len(whose)) for i in range(SHUFFLES)]
    new = [i for i, flag in enumerate(is_new) if flag]
    told_new, new_patients = [asserted[i] for i in new], [whose[i] for i in new]
    readable_new = [label for label in readable_labels((told_new, new_patients)) if label in labels]
    of_new = {label: scores["generated"][label][new] for label in readable_new}
    by_label, shuffled = {}, {}
    for label in labels:
        told, truth = _told(asserted, label)
        shuffled[label] = [roc_auc_score(truth, scores["generated"][label][order][told]) for order in orders]
        by_label[label] = {
            "films": len(told), "positive": int(truth.sum()), "new": sum(label in of for of in told_new),
            **{kind: _area(of[label], asserted, label, whose, seed) for kind, of in scores.items()},
            "shuffled": _middle(shuffled[label]),
            "new_captions": _area(of_new[label], told_new, label, new_patients, seed) if label in of_new else None,
        }  # fmt: skip
    findings = [label for label in labels if is_finding(label)]
    mean = None
    if findings:
        mean = {kind: _mean_area(of, asserted, whose, seed) for kind, of in scores.items()}
        mean["shuffled"] = _middle(np.mean([shuffled[label] for label in findings], axis=0))
        mean["new_captions"] = _mean_area(of_new, told_new, new_patients, seed)
    return {"labels": by_label, "mean": mean}


def agreement_gain(
    asserted: Sequence[dict[str, bool]],
    one: dict[str, np.ndarray],
    other: dict[str, np.ndarray],
    patients: Sequence[str],
    seed: int,
) -> dict:
    """Return by how much the AUROC of one set of generated films exceeds that of another, film by film of one caption.

    Args:
        asserted: by the captions, N.
        one, other: log-odds by label, [N].
        patients: [N].
        seed: of the bootstrap.

    Returns:
        By label of both, and as `mean over findings` where there are any: `gain` and its 95 % `interval` by patient, None
        for a single one; the same patients are drawn for both sets and all labels.
    """
    areas = {label: (_resampled(one, asserted, label, patients, seed), _resampled(other, asserted, label, patients, seed))
             for label in one if label in other}  # fmt: skip
    gains = {label: [first - second for first, second in zip(*pair, strict=True)] for label, pair in areas.items()}
    findings = [gain for label, gain in gains.items() if is_finding(label)]
    if findings:
        parts = zip(*findings, strict=True)
        gains = {"mean over findings": [np.mean(part, axis=0) for part in parts]} | gains
    return {
        label: {"gain": float(gain), "interval": None if np.isnan(resampled).all() else _ends(resampled)}
        for label, (gain, resampled) in gains.items()
    }


def counterparts(rows: Sequence[dict], most: int, seed: int) -> list[tuple[int, int]]:
    """Return pairs of films, one with findings, the other of another patient and without any, as alike as there is.

    Alike is the same view before the same sex before a near age, as far as the table says. Captions of a pair then
    differ in little but the findings.

    Args:
        rows: of `metadata.jsonl`.
        most: pairs, one a film with findings, drawn by seed.

    Returns:
        Places in `rows`: (with findings, without).
    """
    order = np.random.default_rng(derive_seed(seed, "counterparts")).permutation(len(rows)).tolist()
    without = [i for i in order if rows[i].get("findings") == []]
    pairs = []
    for i in (i for i in order if rows[i].get("findings")):
        if candidates := [j for j in without if patient_of(rows[j]) != patient_of(rows[i])]:
            pairs.append((i, min(candidates, key=lambda j: _unlike(rows[i], rows[j]))))
    return sorted(pairs[:most])


def _unlike(row: dict, other: dict) -> tuple[bool, bool, float]:
    ages = [of.get("age") for of in (row, other)]
    apart = abs(ages[0] - ages[1]) if all(isinstance(age, int | float) for age in ages) else 0.0
    return row.get("view") != other.get("view"), row.get("sex") != other.get("sex"), apart


def compare_pairs(
    rows: Sequence[dict],
    pairs: Sequence[tuple[int, int]],
    read: dict[str, dict[str, np.ndarray]],
    seed: int,
) -> dict:
    """Return how often a finding is read more strongly in the film that was asked for it than in its counterpart.

    Args:
        rows: of the held-out films, N.
        pairs: P, of `counterparts`.
        read: log-odds by label: "generated" from the first caption of each pair and "counterpart" from the second,
            from the same noise, [P]; "real" films, [N].

    Returns:
        By finding, and over all as `all`: `pairs`; `generated` and `real`, the share with its 95 % interval by
        patient, ties counted half. Chance is 0.5. {} where nothing can be read.
    """
    values: dict[str, dict[str, list[float]]] = {}
    patients: dict[str, list[str]] = {}
    for place, (i, j) in enumerate(pairs):
        for label in [finding for finding in rows[i]["findings"] if finding in read["real"]]:
            apart = {
                "generated": read["generated"][label][place] - read["counterpart"][label][place],
                "real": read["real"][label][i] - read["real"][label][j],
            }
            for name in (label, "all"):
                patients.setdefault(name, []).append(patient_of(rows[i]))
                for kind, difference in apart.items():
                    values.setdefault(name, {}).setdefault(kind, []).append((np.sign(difference) + 1) / 2)
    return {
        name: {"pairs": len(patients[name])} | {kind: _share(of, patients[name], seed) for kind, of in by_kind.items()}
        for name, by_kind in sorted(values.items())
    }


def _told(asserted: Sequence[dict[str, bool]], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the films whose caption asserts or denies a label, and which it is."""
    told = np.array([i for i, of in enumerate(asserted) if label in of], dtype=int)
    return told, np.array([asserted[i][label] for i in told], dtype=bool)


def _area(scores: np.ndarray, asserted: Sequence[dict], label: str, patients: Sequence[str], seed: int) -> dict:
    """Return an AUROC as `mean` and its 95 % `interval` by patient, None for a single one."""
    told, truth = _told(asserted, label)
    area, ends = auroc(scores[told], truth, [patients[i] for i in told], seed)
    return {"mean": area, "interval": None if np.isnan(ends).any() else list(ends)}


def _mean_area(
    scores: dict[str, np.ndarray],
    asserted: Sequence[dict],
    patients: Sequence[str],
    seed: int,
) -> dict | None:
    """Return the mean AUROC over findings and its interval, from the same resampled patients for all; None without any."""
    findings = [label for label in scores if is_finding(label)]
    if not findings:
        return None
    areas, resampled = zip(*(_resampled(scores, asserted, label, patients, seed) for label in findings), strict=True)
    return {"mean": float(np.mean(areas)), "interval": _ends(np.mean(resampled, axis=0))}


def _resampled(
    scores: dict[str, np.ndarray], asserted: Sequence[dict], label: str, patients: Sequence[str], seed: int
) -> tuple[float, np.ndarray]:
    """Return an AUROC, and as many more of patients drawn anew, the same whatever the label; NaN for one patient."""
    told, truth = _told(asserted, label)
    _, whose = np.unique(np.asarray(patients), return_inverse=True)
    count = whose.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    areas = (
        weighted_auroc(scores[label][told], truth, drawn[:, whose[told]]) if count > 1 else np.full(RESAMPLES, np.nan)
    )
    return float(roc_auc_score(truth, scores[label][told])), areas


def _middle(values: Sequence[float]) -> dict:
    return {"mean": float(np.mean(values)), "interval": _ends(values)}


def _ends(values: Sequence[float]) -> list[float]:
    return [float(end) for end in np.nanquantile(values, [0.025, 0.975])]


def _share(values: Sequence[float], patients: Sequence[str], seed: int) -> dict:
    ends = bootstrap_interval(values, patients, seed)
    return {"mean": float(np.mean(values)), "interval": None if np.isnan(ends).any() else list(ends)}
