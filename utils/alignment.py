"""Do films show what their captions say, and does a classifier learn from them what it learns from real ones?

Asked of any encoder's features by linear probes, logistic regressions that are fitted on the training patients' real films
and applied to films generated from held-out captions, and to the real films of those captions. What is asked about: the
table's findings, and what captions say in words of sex, view, side and age. No probe was fitted on a held-out patient; what
the encoder itself has seen, its `FilmSpace.note` says.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from utils.captions import VIEW_NAMES
from utils.distances import weighted_auroc
from utils.films import view_named
from utils.folds import patient_of
from utils.metadata import SEXES
from utils.seeding import derive_seed

LEAST_FILMS = 8  # with a label and as many without, among training films and among held-out ones
CV_FOLDS = 5  # of the training patients, to choose the regularisation
LEAST_FOR_INTERVAL = 10  # patients with and without: the spread of fewer says little of others'
REGULARISATION = (1e-3, 1e-2, 1e-1)  # C of the regression, of which cross-validation takes one
RESAMPLES = 1000  # of patients
SHUFFLES = 200  # of captions among films, for the floor
OLD = 60  # years
SIDE, VIEW = "left, not right", "AP, not PA"
AGE_LABEL = f"{OLD} or older"
AGE = re.compile(r"\b(\d+)[- ]years?[- ]old\b", re.I)
DENIED = re.compile(r"\b(no|not|without)\b", re.I)
SENTENCES = re.compile(r"(?<=[.;!?])\s+")
# What captions say in words of their own: yes, no, and the column of the table that has to agree where there is one
CONTRASTS = {
    "man, not woman": (re.compile(r"\b(man|male|boy)\b", re.I), re.compile(r"\b(woman|female|girl)\b", re.I), ("sex", "M", "F")),
    VIEW: (re.compile(r"\bAP\b"), re.compile(r"\bPA\b"), ("view", "AP", "PA")),
    SIDE: (re.compile(r"\bleft\b", re.I), re.compile(r"\bright\b", re.I), None),
}  # fmt: skip


def assertions(rows: Sequence[dict]) -> list[dict[str, bool]]:
    """Return what is asked about each film, by label: every finding of the table, and what its caption's words say.

    A caption that says both or neither of a contrast says nothing about it; sides in sentences that deny something are
    not heard.

    Args:
        rows: of `metadata.jsonl`. Without a column `findings` there are only the words.
    """
    findings = sorted({finding for row in rows for finding in row.get("findings") or []})
    asserted = []
    for row in rows:
        told = {finding: finding in row["findings"] for finding in findings} if row.get("findings") is not None else {}
        affirmed = " ".join(part for part in SENTENCES.split(row["text"]) if not DENIED.search(part))
        sex = str(row.get("sex") or "").strip().upper()
        cells = {"view": view_named(row.get("view")), "sex": SEXES.get(sex, sex) or None}
        for label, (yes, no, column) in CONTRASTS.items():
            text = affirmed if label == SIDE else row["text"]
            words = bool(yes.search(text)), bool(no.search(text))
            if sum(words) == 1 and (column is None or cells[column[0]] in (None, column[1 if words[0] else 2])):
                told[label] = words[0]
        if years := AGE.search(row["text"]):
            told[AGE_LABEL] = int(years[1]) >= OLD
        asserted.append(told)
    return asserted


def views_of(rows: Sequence[dict], asserted: Sequence[dict[str, bool]]) -> list[str | None]:
    """Return each film's view: the table's, else as its caption says, None where neither does.

    Args:
        rows: of `metadata.jsonl`.
        asserted: of them, from `assertions`.
    """
    said = {True: "AP", False: "PA", None: None}
    return [
        VIEW_NAMES.get(view_named(row.get("view")), said[told.get(VIEW)])
        for row, told in zip(rows, asserted, strict=True)
    ]


def is_finding(label: str) -> bool:
    """Return whether a label is one of the table's findings, not of the caption's own words."""
    return label not in CONTRASTS and label != AGE_LABEL


def fit_probe(
    features: np.ndarray,
    truth: np.ndarray,
    patients: Sequence[str],
    seed: int,
    regularisation: float | None = None,
    mirrored: bool = False,
) -> Pipeline:
    """Fit a logistic regression on standardised features.

    Args:
        features: [N, D].
        truth: bool [N].
        patients: whose films, [N]; cross-validation keeps those of one together.
        seed: of the cross-validation.
        regularisation: C; None takes the one of REGULARISATION with the best cross-validated AUROC.
        mirrored: features are those of a film less those of its mirror image: nothing is added to them, so that a film
            and its mirror image get opposite scores.
    """
    model = Pipeline(
        [
            ("scale", StandardScaler(with_mean=not mirrored)),
            ("regression", LogisticRegression(C=regularisation or 1.0, fit_intercept=not mirrored, max_iter=2000)),
        ]
    )
    if regularisation is not None:
        return model.fit(features, truth)
    folds = StratifiedGroupKFold(CV_FOLDS, shuffle=True, random_state=seed % 2**32)
    search = GridSearchCV(model, {"regression__C": REGULARISATION}, scoring="roc_auc", cv=folds)
    return search.fit(features, truth, groups=np.asarray(patients)).best_estimator_


def labels_in_all(*sets: tuple[Sequence[dict[str, bool]], Sequence[str]]) -> list[str]:
    """Return the labels that enough films, of enough patients, have and as many have not, in every set.

    Args:
        sets: assertions of N films, and whose films they are, [N].
    """
    kept = None
    for asserted, patients in sets:
        of: dict[tuple[str, bool], list[str]] = {}
        for told, patient in zip(asserted, patients, strict=True):
            for label, value in told.items():
                of.setdefault((label, value), []).append(patient)
        enough = {kind for kind, whose in of.items() if len(whose) >= LEAST_FILMS and len(set(whose)) >= CV_FOLDS}
        here = {label for label, _ in enough if {(label, True), (label, False)} <= enough}
        kept = here if kept is None else kept & here
    return sorted(kept or ())


class LinearProbes:
    """A linear probe a label, fitted on the training patients' real films.

    Args:
        rows: of the training films.
        held_out_rows: of the films that will be read: a label has a probe only where both sets can carry it.
        features: what films are read from, [.., D], by kind of film: "training" and "held_out", rows as above; for `tstr`
            also "known_real" and "known", real training films and those generated from their captions; any other kind
            that `read` is to be asked of.
        mirrored: the same of their mirror images; {} where sides are not asked about.
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
        labels = labels_in_all((self.asserted, self.patients), held_out)
        self.by_label = {label: self._fit(label, "training", self.asserted, self.patients) for label in labels}

    def _of(self, label: str, kind: str) -> np.ndarray:
        return self.sided[kind] if label == SIDE else self.features[kind]

    def _fit(
        self,
        label: str,
        kind: str,
        asserted: Sequence[dict[str, bool]],
        patients: Sequence[str],
        regularisation: float | None = None,
    ) -> Pipeline:
        told = [i for i, of in enumerate(asserted) if label in of]
        truth = np.array([asserted[i][label] for i in told])
        return fit_probe(
            self._of(label, kind)[told], truth, [patients[i] for i in told],
            derive_seed(self.seed, "probes", label), regularisation, mirrored=label == SIDE,
        )  # fmt: skip

    def read(self, kind: str) -> dict[str, np.ndarray]:
        """Return the log-odds of each label in films of one kind, float64 [N]."""
        return {label: model.decision_function(self._of(label, kind)) for label, model in self.by_label.items()}

    def tstr(self, known: Sequence[dict], held_out_rows: Sequence[dict]) -> dict:
        """Train on synthetic films and test on real ones: probes fitted on generated films read real held-out ones.

        Args:
            known: rows of training films, M, one a patient, from whose captions films were generated.
            held_out_rows: of the films that are read.

        Returns:
            `films`, M, and `training_films`, of which `all_real` is; by label, and as `mean` over `Asked.findings`, AUROC with its
            95 % interval by patient: `real` and `synthetic` from M films, `both` from 2 M, `all_real` from all training
            films. Labels that too few of the M captions assert are left out. {} where there is none.
        """
        asserted, patients = assertions(known), [patient_of(row) for row in known]
        kinds = {"real": "known_real", "synthetic": "known", "both": "both"}
        for features in (self.features, self.sided):
            if "known" in features:
                features["both"] = np.concatenate([features["known_real"], features["known"]])
        scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in (*kinds, "all_real")}
        for label in labels_in_all((asserted, patients)):
            if label not in self.by_label:
                continue
            probe, films = self.by_label[label], self._of(label, "held_out")
            scores["all_real"][label] = probe.decision_function(films)
            for name, kind in kinds.items():
                times = 2 if name == "both" else 1
                model = self._fit(label, kind, asserted * times, patients * times, probe["regression"].C)
                scores[name][label] = model.decision_function(films)
        if not scores["real"]:
            return {}
        truth = Asked(assertions(held_out_rows), [patient_of(row) for row in held_out_rows], seed=self.seed)
        labels = {label: {name: truth.auroc(of, label) for name, of in scores.items()} for label in scores["real"]}
        mean = {name: truth.mean_auroc(of) for name, of in scores.items()}
        return {"films": len(known), "training_films": len(self.patients), "labels": labels, "mean": mean}


@dataclass(frozen=True)
class Asked:
    """Films and what is asked about them, to be scored by area under the ROC curve.

    Of films of several folds only those of one fold are compared with one another, as each fold has probes and a model of its
    own: the area is the mean over folds, weighed by their numbers of pairs.

    Attributes:
        asserted: by label, of N films; films without a label are not asked.
        patients: whose they are, [N].
        folds: which fold they are of, [N]; None: all of one.
        views: of what view they are, [N], None where that is not known; None: of no film.
        seed: of the bootstrap, which draws the same patients for whatever is scored.
    """

    asserted: Sequence[dict[str, bool]]
    patients: Sequence[str]
    folds: Sequence[int] | None = None
    views: Sequence[str | None] | None = None
    seed: int = 0

    def areas(self, scores: dict[str, np.ndarray], label: str) -> tuple[float, np.ndarray]:
        """Return the AUROC of a label and that of RESAMPLES draws of as many patients; NaN where one kind is missing.

        Args:
            scores: log-odds by label, [N]; NaN where a film's fold has no probe.
        """
        _, whose = np.unique(np.asarray(self.patients), return_inverse=True)
        count = whose.max() + 1
        drawn = np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        areas = self._areas(scores, label, np.concatenate([np.ones_like(drawn[:1]), drawn])[:, whose])
        return float(areas[0]), areas[1:]

    def _areas(self, scores: dict[str, np.ndarray], label: str, weights: np.ndarray) -> np.ndarray:
        """Return the AUROC under weightings of the films, [R, N] -> [R]."""
        told, truth = self.told(label, scores)
        concordant, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for fold in np.unique(self._folds[told]):
            here = self._folds[told] == fold
            of_fold, labels = weights[:, told[here]], truth[here]
            num_pairs = of_fold[:, labels].sum(axis=1) * of_fold[:, ~labels].sum(axis=1)
            areas = weighted_auroc(scores[label][told[here]], labels, of_fold)
            concordant += np.where(num_pairs > 0, num_pairs * areas, 0)
            pairs += num_pairs
        with np.errstate(invalid="ignore"):
            return concordant / pairs

    @property
    def _folds(self) -> np.ndarray:
        return np.zeros(len(self.patients), dtype=int) if self.folds is None else np.asarray(self.folds)

    def within_view(self) -> "Asked | None":
        """Return the same films, each compared only with those of its view, and not at all where that is not known.

        None where there are not two views.
        """
        views = self.views or [None] * len(self.patients)
        if len(set(views) - {None}) < 2:
            return None
        strata = list(zip(self._folds.tolist(), views, strict=True))
        places = {stratum: place for place, stratum in enumerate(sorted(set(strata), key=str))}
        asserted = [of if view else {} for of, view in zip(self.asserted, views, strict=True)]
        return replace(self, asserted=asserted, folds=[places[stratum] for stratum in strata])

    def of(self, places: Sequence[int]) -> "Asked":
        """Return some of the films."""
        columns = (self.asserted, self.patients, self.folds, self.views)
        return Asked(*(None if of is None else [of[i] for i in places] for of in columns), self.seed)

    def told(self, label: str, scores: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of the films that are asked about a label and scored, and the answers."""
        asked = [i for i, of in enumerate(self.asserted) if label in of and not np.isnan(scores[label][i])]
        return np.array(asked, dtype=int), np.array([self.asserted[i][label] for i in asked], dtype=bool)

    def has_interval(self, label: str, scores: dict[str, np.ndarray]) -> bool:
        told, truth = self.told(label, scores)
        return all(
            len({self.patients[i] for i in told[truth == value]}) >= LEAST_FOR_INTERVAL for value in (True, False)
        )

    def auroc(self, scores: dict[str, np.ndarray], label: str) -> dict:
        """Return the AUROC as `mean` and its 95 % `interval`, None where few patients are of one kind, or no films compare."""
        area, resampled = self.areas(scores, label)
        if np.isnan(area):
            return {"mean": None, "interval": None}
        return {"mean": area, "interval": _ends(resampled) if self.has_interval(label, scores) else None}

    def findings(self, scores: dict[str, np.ndarray]) -> list[str]:
        """Return the findings that enough patients have and have not, over which means are taken."""
        return [label for label in scores if is_finding(label) and self.has_interval(label, scores)]

    def mean_auroc(self, scores: dict[str, np.ndarray]) -> dict | None:
        """Return the mean over `findings`, its interval, and their number; None without one.

        `mean` and `interval` are None where films of one of them do not compare, as where it goes with the view.
        """
        findings = self.findings(scores)
        if not findings:
            return None
        areas, resampled = zip(*(self.areas(scores, label) for label in findings), strict=True)
        if np.isnan(areas).any():
            return {"mean": None, "interval": None, "findings": len(findings)}
        return {
            "mean": float(np.mean(areas)), "interval": _ends(np.mean(resampled, axis=0)), "findings": len(findings)
        }  # fmt: skip

    def shuffled(self, scores: dict[str, np.ndarray]) -> tuple[dict[str, dict], dict | None]:
        """Return the floor by label, and of the mean over findings: films beside the captions of others of their fold.

        Each as `mean` of SHUFFLES shuffles and, as `interval`, the middle 95 % of them.
        """
        folds, alone = self._folds, np.ones((1, len(self.patients)), dtype=int)
        generator = np.random.default_rng(derive_seed(self.seed, "shuffle"))
        areas: dict[str, list[float]] = {label: [] for label in scores}
        for _ in range(SHUFFLES):
            order = np.arange(len(folds))
            for fold in np.unique(folds):
                here = np.flatnonzero(folds == fold)
                order[here] = generator.permutation(here)
            for label, of in scores.items():
                areas[label].append(self._areas({label: of[order]}, label, alone)[0])
        by_label = {label: {"mean": float(np.nanmean(of)), "interval": _ends(of)} for label, of in areas.items()}
        findings = [areas[label] for label in self.findings(scores)]
        means = np.mean(findings, axis=0) if findings else None
        return by_label, {"mean": float(np.nanmean(means)), "interval": _ends(means)} if findings else None


def agreement(asked: Asked, scores: dict[str, dict[str, np.ndarray]], is_new: Sequence[bool]) -> dict:
    """Return how well films show what their captions assert: AUROC of the probes' log-odds.

    Args:
        asked: N films and their captions.
        scores: log-odds by kind of film and label, [N]: of films "generated" by the adapter and by the "base" from
            these captions, and of the "real" films whose captions they are, the ceiling.
        is_new: captions that training never saw, [N].

    Returns:
        By label, and as `mean` over `Asked.findings` (None without one): by kind the AUROC, as `Asked.auroc` has it;
        `shuffled`, the floor of generated films; `new_captions`: generated films whose caption is new, None where too few
        assert it; `within_view`: "generated" and "real" films compared with those of the same view only, as findings go with
        views, None where there are not two. Of the mean these two are also None where too few films are left of any finding.
        By label also the numbers `films`, `positive` and `new`. {} without labels.
    """
    labels = list(scores["generated"])
    if not labels:
        return {}
    new = [i for i, flag in enumerate(is_new) if flag]
    asked_new = asked.of(new)
    readable = set(labels_in_all((asked_new.asserted, asked_new.patients)))
    of_new = {label: of[new] for label, of in scores["generated"].items() if label in readable}
    floors, floor = asked.shuffled(scores["generated"])
    of_view = asked.within_view()
    by_label = {}
    for label in labels:
        told, truth = asked.told(label, scores["generated"])
        by_label[label] = {
            "films": len(told), "positive": int(truth.sum()), "new": int(np.isin(told, new).sum()),
            **{kind: asked.auroc(of, label) for kind, of in scores.items()}, "shuffled": floors[label],
            "new_captions": asked_new.auroc(of_new, label) if label in of_new else None,
            "within_view": of_view and {kind: of_view.auroc(scores[kind], label) for kind in ("generated", "real")},
        }  # fmt: skip
    mean = None
    if floor is not None:
        mean = {kind: asked.mean_auroc(of) for kind, of in scores.items()} | {"shuffled": floor}
        complete = asked_new.findings(of_new) == asked.findings(scores["generated"])
        mean["new_captions"] = asked_new.mean_auroc(of_new) if complete else None
        complete = of_view and of_view.findings(scores["real"]) == asked.findings(scores["real"])
        mean["within_view"] = (
            {kind: of_view.mean_auroc(scores[kind]) for kind in ("generated", "real")} if complete else None
        )
    return {"labels": by_label, "mean": mean}


def agreement_by_group(
    asked: Asked, scores: dict[str, dict[str, np.ndarray]], groups: dict[str, dict[str, list[int]]]
) -> dict[str, dict[str, dict]]:
    """Return for whom films show what their captions assert: by attribute, value and kind of film `Asked.mean_auroc`.

    Args:
        asked, scores: as `agreement` takes them.
        groups: places of films by attribute and value.
    """

    def of_group(places: list[int]) -> dict:
        part = asked.of(places)
        return {
            kind: part.mean_auroc({label: of[places] for label, of in by_label.items()})
            for kind, by_label in scores.items()
        }

    return {name: {value: of_group(places) for value, places in of.items()} for name, of in groups.items()}


def agreement_gain(asked: Asked, one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict:
    """Return by how much the AUROC of one set of generated films exceeds that of another, film by film of one caption.

    Args:
        asked: N films and their captions.
        one, other: log-odds by label, [N].

    Returns:
        By label of both, and as `mean over findings` over `Asked.findings` where there are any: `gain` and its 95 %
        `interval` by patient, None where few are of one kind; the same patients are drawn for both sets and all labels.
    """
    common = [label for label in one if label in other]
    gains = {
        label: [
            first - second for first, second in zip(asked.areas(one, label), asked.areas(other, label), strict=True)
        ]
        for label in common
    }
    gains = {label: of for label, of in gains.items() if not np.isnan(of[0])}  # films that compare, of both kinds
    common, certain = list(gains), {label: asked.has_interval(label, one) for label in gains}
    if findings := asked.findings({label: one[label] for label in common}):
        mean = [np.mean(part, axis=0) for part in zip(*(gains[label] for label in findings), strict=True)]
        gains = {"mean over findings": mean} | gains
        certain["mean over findings"] = True
    return {
        label: {"gain": float(gain), "interval": _ends(resampled) if certain[label] else None}
        for label, (gain, resampled) in gains.items()
    }


def counterparts(rows: Sequence[dict], most: int, seed: int) -> list[tuple[int, int]]:
    """Return pairs of films, one with findings, the other of another patient and without any, as alike as there is.

    Alike is the same view before the same sex, as far as the table says; among those the films that were taken least often
    come first, then those of a near age. Captions of a pair then differ in little but the findings.

    Args:
        rows: of `metadata.jsonl`.
        most: pairs, one a film with findings, drawn by seed.

    Returns:
        Places in `rows`: (with findings, without).
    """
    order = np.random.default_rng(derive_seed(seed, "counterparts")).permutation(len(rows)).tolist()
    without = [i for i in order if rows[i].get("findings") == []]
    taken: Counter[int] = Counter()

    def unlike(i: int, j: int) -> tuple[bool, bool, int, float]:
        row, other = rows[i], rows[j]
        ages = [of.get("age") for of in (row, other)]
        apart = abs(ages[0] - ages[1]) if all(isinstance(age, int | float) for age in ages) else 0.0
        return row.get("view") != other.get("view"), row.get("sex") != other.get("sex"), taken[j], apart

    pairs = []
    for i in [i for i in order if rows[i].get("findings")][:most]:
        if candidates := [j for j in without if patient_of(rows[j]) != patient_of(rows[i])]:
            pairs.append((i, min(candidates, key=lambda j: unlike(i, j))))
            taken[pairs[-1][1]] += 1
    return sorted(pairs)


def compare_pairs(
    rows: Sequence[dict], pairs: Sequence[tuple[int, int]], read: dict[str, dict[str, np.ndarray]]
) -> dict:
    """Return how often a finding is read more strongly in the film that was asked for it than in its counterpart.

    Args:
        rows: of the held-out films, N.
        pairs: P, of `counterparts`.
        read: log-odds by label: "generated" from the first caption of each pair and "counterpart" from the second,
            from the same noise, [P]; "real" films, [N].

    Returns:
        By finding, and over all as `all`: `pairs`, and the number of films without findings in them, `counterparts`;
        `generated` and `real`, the share as `mean`, ties counted half, and its 95 % `interval` (Wilson 1927, over the
        patients of either side, of which there are fewer: pairs share films without findings). Of a pair with several findings
        `all` takes their mean. Chance is 0.5. {} where nothing can be read.
    """
    values: dict[str, list[tuple[int, float, float]]] = {}  # by finding: pair, share of generated, share of real
    for place, (i, j) in enumerate(pairs):
        for label in [finding for finding in rows[i]["findings"] if finding in read["real"]]:
            generated = read["generated"][label][place] - read["counterpart"][label][place]
            real = read["real"][label][i] - read["real"][label][j]
            shares = tuple((float(np.sign(apart)) + 1) / 2 for apart in (generated, real))
            values.setdefault(label, []).append((place, *shares))
    if not values:
        return {}
    everything = [part for of in values.values() for part in of]
    by_pair = {
        place: np.mean([part[1:] for part in everything if part[0] == place], axis=0) for place, *_ in everything
    }
    values = {"all": [(place, *shares) for place, shares in sorted(by_pair.items())]} | dict(sorted(values.items()))
    figures = {}
    for name, of in values.items():
        places = [place for place, *_ in of]
        patients = min(len({patient_of(rows[pairs[place][side]]) for place in places}) for side in (0, 1))
        figures[name] = {"pairs": len(of), "counterparts": len({pairs[place][1] for place in places})}
        for column, kind in ((1, "generated"), (2, "real")):
            share = float(np.mean([part[column] for part in of]))
            figures[name][kind] = {"mean": share, "interval": wilson(share, patients)}
    return figures


def wilson(share: float, count: int) -> list[float]:
    """Return the 95 % interval of a share of so many independent draws (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def _ends(values: Sequence[float]) -> list[float]:
    return [float(end) for end in np.nanquantile(values, [0.025, 0.975])]
