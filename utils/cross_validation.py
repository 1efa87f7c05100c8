"""The evaluations of all folds of a cross-validation, read, checked and put together; and two of them compared."""

import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t, wilcoxon

from utils.alignment import Asked, is_finding
from utils.figures import REBUILT, gain_of
from utils.files import read_jsonl, sha256_file
from utils.metrics import bootstrap_interval
from utils.refusal import Refused
from utils.release import DECODER_NAME, WEIGHTS_NAME
from utils.report import SETS_OF_FOLDS
from utils.validation import HEADLINE


def read_folds(out: Path) -> tuple[list[dict], list[list[dict]], list[Path]]:
    """Return the evaluations of all folds of one cross-validation: their figures, their films, and their folders.

    Raises:
        Refused: for fewer than two, for folds that were evaluated unlike, before they were trained anew, or that hold a film
            in common.
    """
    evaluations = sorted(out.glob("fold*/evaluation/metrics.json"))
    if len(evaluations) < 2:
        raise Refused(
            f"{len(evaluations)} evaluated folds in {out}; expected two or more: python evaluate.py --lora {out}/fold0"
        )
    for path in evaluations:
        if not all(
            path.with_name(name).is_file() for name in ("films.jsonl", "features.safetensors", "readings.jsonl")
        ):
            raise Refused(f"{path.parent} is not whole; evaluate that fold again")
    folds = [_read_figures(path) for path in evaluations]
    for name in ("base", "data_hash", "resolution", "settings", "sampling", "mixed_precision", "seed", "features"):
        if len({json.dumps(fold.get(name), sort_keys=True) for fold in folds}) > 1:
            raise Refused(f"the folds in {out} differ in {name}; evaluate them alike before they are averaged")
    for path, fold in zip(evaluations, folds, strict=True):
        for name, part in ((WEIGHTS_NAME, "adapter"), (DECODER_NAME, "vae_decoder")):
            file = path.parents[1] / name
            if part in fold and file.is_file() and sha256_file(file) != fold[part]["sha256"]:
                raise Refused(f"{path.parent} is of another {part} than the one beside it; evaluate that fold again")
        if "training_films" not in fold:
            raise Refused(f"{path.parent} is of an earlier version; evaluate that fold again")
    films_by_fold = [read_jsonl(path.with_name("films.jsonl")) for path in evaluations]
    films = [row for rows in films_by_fold for row in rows]
    if len({any(name.startswith("own_decoder/") for name in row) for row in films}) > 1:
        raise Refused(
            f"some folds in {out} have an adapted decoder and others none; evaluate them with --no_vae_decoder"
        )
    # A fold of a single patient has no pairs of films of different patients: what all films have is averaged
    shared = set.intersection(*map(set, films))
    films_by_fold = [[{name: row[name] for name in row if name in shared} for row in rows] for rows in films_by_fold]
    if len({row["file_name"] for row in films}) < len(films):
        numbers = [fold["fold"] for fold in folds]
        raise Refused(f"a film is held out in two of the folds {numbers}; they are not of one cross-validation")
    return folds, films_by_fold, [path.parent for path in evaluations]


def _read_figures(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({error}); evaluate that fold again") from error


def read_readings(folders: Sequence[Path]) -> list[dict]:
    """Return the rows of `readings.jsonl` of all folds, each with the place of its fold as `fold`."""
    return [
        row | {"fold": fold} for fold, folder in enumerate(folders) for row in read_jsonl(folder / "readings.jsonl")
    ]


def asked_of(readings: Sequence[dict], seed: int) -> Asked:
    """Return the films of all folds and what is asked about them."""
    columns = ([row[name] for row in readings] for name in ("asserted", "patient_id", "fold", "view"))
    return Asked(*columns, seed)


def columns_of(readings: Sequence[dict], kind: str) -> dict[str, np.ndarray]:
    """Return the log-odds of one kind of films by label, [N], NaN in folds whose films could not carry a probe of it."""
    labels = sorted({label for row in readings for label in row[kind]})
    return {label: np.array([row[kind].get(label, math.nan) for row in readings]) for label in labels}


def held_out_to_training(folds: Sequence[dict]) -> float:
    """Return how many films folds hold out for one that they train on, the mean over folds; content of `metrics.json` each."""
    return statistics.fmean(fold["films"] / fold["training_films"] for fold in folds)


def over_folds(values: Sequence[float], test_to_train: float) -> dict:
    """Return `mean`, `sd`, 95 % `interval` and the values themselves as `by_fold` of a figure of each fold.

    Folds share most of their training films, so that their figures are more alike than those of other data would be: the
    interval is Student's t with the variance of Nadeau and Bengio (2003, Machine Learning 52, eq. 8),
    s^2 (1 / K + n_held_out / n_training).

    Args:
        values: of K folds, two or more.
        test_to_train: n_held_out / n_training, from `held_out_to_training`.
    """
    mean, sd, count = statistics.fmean(values), statistics.stdev(values), len(values)
    reach = float(t.ppf(0.975, count - 1)) * sd * (1 / count + test_to_train) ** 0.5
    return {"mean": mean, "sd": sd, "interval": [mean - reach, mean + reach], "by_fold": list(values)}


def sets_over_folds(folds: Sequence[dict]) -> dict[str, dict]:
    """Return what was measured of each fold's films as a set, over folds, by its place in `metrics.json` (SETS_OF_FOLDS).

    Args:
        folds: their `metrics.json`. A figure that one of them lacks is left out.
    """

    def of_fold(metrics: dict | None, place: str) -> float | None:
        for key in place.split("/"):
            metrics = (metrics or {}).get(key)
        return metrics

    by_place = {place: [of_fold(fold, place) for fold in folds] for place in SETS_OF_FOLDS}
    ratio = held_out_to_training(folds)
    return {place: over_folds(values, ratio) for place, values in by_place.items() if None not in values}


def tstr_over_folds(folds: Sequence[dict]) -> dict | None:
    """Return what `LinearProbes.tstr` found, over folds, as the mean over the findings of all of them.

    Args:
        folds: their `metrics.json`.

    Returns:
        `findings`, their names, and by kind of film what `over_folds` returns. None where folds share no finding.
    """
    parts, ratio = [fold["tstr"] for fold in folds], held_out_to_training(folds)
    findings = [label for label in parts[0].get("labels", {}) if is_finding(label)]
    findings = [label for label in findings if all(label in part.get("labels", {}) for part in parts)]
    if not findings:
        return None
    spread: dict = {"findings": findings}
    for kind in parts[0]["labels"][findings[0]]:
        values = [statistics.fmean(part["labels"][label][kind]["mean"] for label in findings) for part in parts]
        spread[kind] = over_folds(values, ratio)
    return spread


def with_gains(films: Sequence[dict]) -> dict[str, list[float]]:
    """Return every figure by film as a column, with the gain of the adapter over the base beside both."""
    columns = {name: [row[name] for row in films] for name in films[0] if name not in ("file_name", "patient_id")}
    for name in [name.removeprefix("adapter/") for name in columns if name.startswith("adapter/")]:
        pairs = zip(columns[f"adapter/{name}"], columns[f"base/{name}"], strict=True)
        columns[f"gain/{name}"] = [gain_of(name, *pair) for pair in pairs]
    return columns


def unlike_figures(one: dict, other: dict) -> tuple[tuple[str, ...], str]:
    """Return which figures of films mean something else in two evaluations, such as ("mse",), and why; () and "" for none.

    Args:
        one, other: `metrics.json` of a fold of each.
    """
    rescaled = {fold["settings"].get("rescale_betas_zero_snr", False) for fold in (one, other)}
    predicted = {
        (fold["base"], fold["predicts"], fold["settings"]["revision"], fold["settings"]["variant"])
        for fold in (one, other)
    }
    if len(rescaled) > 1:
        return (
            "mse",
            *REBUILT,
        ), "their noise schedules differ (rescale_betas_zero_snr), so a timestep is another noise level"
    if len(predicted) > 1:
        return ("mse",), "the two predict something else (base, revision, variant or prediction_type)"
    return (), ""


def same_readings(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Return whether real films are read alike in two evaluations, by label [N]: else their probes differ."""
    return one.keys() == other.keys() and all(
        np.allclose(of, other[label], rtol=1e-4, atol=1e-4, equal_nan=True) for label, of in one.items()
    )


def compare_runs(films: Sequence[dict], others: Sequence[dict], unlike: Collection[str], seed: int) -> dict:
    """Compare two cross-validations film by film: does the first do better than the second, on the same patients?

    Args:
        films, others: rows of `films.jsonl` of all folds.
        unlike: figures to leave out, from `unlike_figures`.
        seed: of the bootstrap.

    Returns:
        `films` and `patients` in both; by figure of the adapter the mean `gain` of the first over the second, positive
        where it is better, and its 95 % `interval` by patient; of SSIM rebuilt from half the noise, the one figure that
        is tested, also `p`, of Wilcoxon's signed-rank test over the patients' means, two-sided, None where none differs.

    Raises:
        Refused: where the second scored other films.
    """
    other_of = {row["file_name"]: row for row in others}
    if other_of.keys() != {row["file_name"] for row in films}:
        raise Refused(
            "the two cross-validations scored other films; train and evaluate both on the same set, folds and --max_films"
        )
    if films[0].keys() != others[0].keys():
        raise Refused("one of the two has an adapted decoder, the other none; evaluate both with --no_vae_decoder")
    patients = [row["patient_id"] for row in films]
    _, whose = np.unique(patients, return_inverse=True)
    record: dict = {"films": len(films), "patients": int(whose.max()) + 1, "figures": {}}
    for name in [name for name in films[0] if name.startswith("adapter/")]:
        metric = name.removeprefix("adapter/")
        if metric.split("/")[0] in unlike:
            continue
        gains = [gain_of(metric, row[name], other_of[row["file_name"]][name]) for row in films]
        by_patient = np.bincount(whose, weights=gains) / np.bincount(whose)
        low, high = bootstrap_interval(gains, patients, seed)
        record["figures"][metric] = {
            "gain": statistics.fmean(gains), "interval": None if np.isnan(low) else [low, high],
        }  # fmt: skip
        if metric == f"ssim/{HEADLINE}":
            record["figures"][metric]["p"] = float(wilcoxon(by_patient).pvalue) if by_patient.any() else None
    return record
