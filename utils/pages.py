"""The pages of an evaluated fold and of all folds: what is on them, in which order, and what each table means. No torch."""

import html
from collections.abc import Sequence
from pathlib import Path

from utils.files import write_bytes
from utils.release import in_words
from utils.report import (
    DEFINITIONS,
    against_table,
    alignment_table,
    decoder_table,
    distribution_table,
    films_over_folds_table,
    followed_table,
    free_samples_table,
    groups_table,
    halves_table,
    headline_table,
    html_definitions,
    html_page,
    html_picture,
    html_table,
    pairs_table,
    sets_over_folds_table,
    settings_table,
    tstr_over_folds_table,
    tstr_table,
    with_interval,
)

REBUILT_NOTE = (
    "A film is noised to a share of the schedule and denoised with its caption. Floors: that noisy film decoded as it is, and the "
    "mean training film; ceiling: the autoencoder's round trip; normalised: from the mean film (0) to the ceiling (1)."
)
FOLLOWED_NOTE = (
    "Followed: an encoder reads the prompted finding, on the prompted side, in a generated film. Chance: it reads the finding "
    "in films prompted with another one. Ceiling: it reads it in films of the set that show it, after the autoencoder. It "
    "saw neither these films nor this adapter, but learnt findings that the same program drew into other films; where it "
    "says yes is calibrated on the training films. Nodules and masses are read under one label, zones are not read. 95 % "
    "intervals over films (Wilson): of other noise, not of other captions, which come again and again."
)
DISTRIBUTION_NOTE = (
    "Distances of a set of films from the held-out ones, in features of an encoder; they compare with one another only. "
    "Frechet: between Gaussians fitted to both sets, biased upwards by few films, so that sets are of one size. Kernel: unbiased, "
    "0 between equal distributions of unrelated films, with its standard error by film. Precision: share of generated films within the reach of real "
    "ones; recall: the reverse; density and coverage: the same, less moved by stray films. Other real films: of "
    "training patients, as many of each as there are held-out ones, with captions of their own, mean and standard deviation of ten draws; a "
    "model that draws just what its captions say may come nearer. Beside those: "
    "how many times that mean, of the kernel distance, which is 0 there, how many standard deviations beyond it."
)
TOO_GOOD_NOTE = (
    "Generated films lie nearer to the held-out ones than other real films do, by more than three standard deviations, or are "
    "copies of them: too good to be true. Were the held-out films, or copies of them, among those trained on? Without copies it "
    "may be that captions say nearly all of a film: generated films have those of the held-out ones, other real films their own."
)
HALVES_NOTE = (
    "All patients are split in two ten times: distances from one half's real films to films generated from the other half's captions, "
    "and to the real films of those captions. +- is the standard deviation of these splits, which share films: no confidence "
    "interval. No model saw the patients whose captions it was given, but each saw films of other folds, which are in the real "
    "half: these distances flatter a run that memorises; those of single folds, further down, do not."
)
FOLDS_NOTE = (
    "Means over folds with 95 % intervals of Student's t, widened for the training films that folds share (Nadeau and Bengio 2003); "
    "over all films with 95 % intervals by patient, which hold the folds' models fixed. A gain is positive where the adapter is "
    "better, also in MSE."
)
SETS_NOTE = (
    "Each fold's films beside that fold's held-out ones, as its own page defines and bounds them; of as many films as a fold has, so that "
    "Frechet distances compare with one another here, not with those of all folds together."
)
GROUPS_NOTE = (
    "Intervals where ten patients or more are in a group. AUROC: mean over the findings that enough patients of the group have and have not, "
    "which may be others in another group. Kernel distance: from the group's held-out films to those generated from "
    "their captions, and to training patients' real films of the same group, with its standard error."
)
DECODER_NOTE = (
    "This run has a decoder fitted to radiographs. The adapter's figures and the ceiling are with it, the base's with its "
    "own; so the gains are of both. Where an encoder reads prompted findings the base's films are decoded with it, too; in all "
    "other tables with its own. Normalised: from the mean training film (0) to the round trip of the same decoder (1)."
)
ALIGNMENT_NOTE = (
    "Area under the ROC curve (0.5: chance) of linear probes, logistic regressions fitted on the training patients' real films, "
    "which read what is known of held-out films: in films generated from their captions, in the real films (the ceiling: no "
    "film need show more), and in generated films beside the captions of others (the floor; the middle 95 % of 200 shuffles). "
    "Within one view: only films of one known view are compared, as findings go with views. 95 % intervals by patient, none with fewer "
    "than 10 patients of a kind; one without width says that the kinds are apart, not that more films would be. Findings are the "
    "table's, whether a caption names them or not; man, AP, left and age are the caption's own words."
)
PAIRS_NOTE = (
    "Two captions of held-out films, as alike in view, sex and age as there are, one with findings and one without, drawn from "
    "the same noise: how often the finding is read more strongly where it was asked for (chance 0.5), and how often between "
    "the two real films. 95 % intervals (Wilson) over the patients with findings, or those without where they are fewer."
)
TSTR_NOTE = (
    "AUROC on held-out real films of classifiers that were fitted on so many real films of training patients, on as many "
    "generated from their captions, on both, and on the training films at hand, up to 10,000. Regularisation is the same for all, chosen by "
    "cross-validation within the training patients' real films."
)


def in_short(gain: dict, distribution: dict, alignment: dict, verdicts: Sequence[str]) -> list[str]:
    """Return what an evaluation found, a question and its answer each, beside what bounds it.

    Args:
        gain: `mean` and `interval` of the SSIM, over the base's, of films rebuilt from half the noise.
        distribution, alignment: as in `metrics.json` or `summary.json`.
        verdicts: of the memorisation audit, one a fold.
    """
    low, high = gain["interval"] or (0.0, 0.0)
    answer = "yes" if low > 0 else "no, worse" if high < 0 else "not shown"
    said = [
        f"Does it rebuild films of unknown patients better than the base? {answer.capitalize()}: from half the noise SSIM gains "
        f"{with_interval(gain, 4)}."
    ]
    if "films" in distribution:
        kinds = {"generated": "Kernel distance", "base": "the base's", "real": "real films in their place"}
        distances = []
        for kind, name in kinds.items():
            if kind in distribution:  # with the spread that the tables have
                of = distribution[kind]
                spread = distribution.get(f"{kind}_sd", {"kernel": of["kernel_error"]})["kernel"]
                distances.append(f"{name} {of['kernel']:.2f}" + ("" if spread is None else f" +- {spread:.2f}"))
        warning = " Too good to be true: see below." if is_too_good(distribution) else ""
        said.append(f"How near are generated films, as a set, to real ones? {', '.join(distances)}.{warning}")
    if alignment.get("mean"):
        read = {kind: with_interval(alignment["mean"][kind], 2) for kind in ("generated", "real", "shuffled")}
        said.append(
            f"Do they show the findings of their captions? AUROC {read['generated']}; the real films {read['real']}, captions "
            f"shuffled {read['shuffled']}."
        )
    said.append(f"Do they repeat training films? The audit says: {', '.join(dict.fromkeys(verdicts))}.")
    return said


def report_fold(metrics: dict) -> tuple[dict[str, tuple[tuple[list[str], list[list[str]]], str]], list[str]]:
    """Return what is worth a table, by title: the table and what it means; and what is said in sentences."""
    tables, space = {}, f"Features: {metrics['features_note']}."
    if "prompt_followed" in metrics:
        tables["Are prompts followed?"] = followed_table(metrics), FOLLOWED_NOTE
    if "labels" in metrics["alignment"]:
        tables["Do films show what their captions say?"] = (
            alignment_table(metrics["alignment"]),
            f"{ALIGNMENT_NOTE} {space}",
        )
    if metrics["counterfactual"]:
        tables["The same noise, with the finding and without"] = pairs_table(metrics["counterfactual"]), PAIRS_NOTE
    if "vae_decoder" in metrics:
        tables["The adapted decoder"] = decoder_table(metrics), DECODER_NOTE
    tables["Films rebuilt, and noise predicted"] = headline_table(metrics), REBUILT_NOTE
    too_good = [TOO_GOOD_NOTE] if is_too_good(metrics["distribution"]) else []
    if "films" in metrics["distribution"]:
        note = " ".join([*too_good, DISTRIBUTION_NOTE, space])
        tables["Generated films as a set"] = distribution_table(metrics), note
    if metrics["tstr"]:
        tables["Trained on generated films, tested on real ones"] = tstr_table(metrics["tstr"]), f"{TSTR_NOTE} {space}"
    if metrics["by_group"]:
        tables["For whom"] = groups_table(metrics), GROUPS_NOTE
    tables["Free samples, film by film"] = free_samples_table(metrics), metrics["free_samples"]["note"]
    return tables, [variety_in_words(metrics), in_words(metrics["memorisation"]), *too_good]


def is_too_good(distribution: dict) -> bool:
    """Return whether generated films are nearer to held-out ones than real films can be; of several folds together it is not known.

    Args:
        distribution: as in `metrics.json` or `summary.json`.
    """
    return "generated" in distribution.get("too_good", ()) or distribution.get("copies", 0) > 0


def write_fold_page(
    output_dir: Path, metrics: dict, short: Sequence[str], tables: dict, said: Sequence[str], curves: Path
) -> None:
    """Write report.html: what was found, the pictures, then the tables, then how it was measured.

    Args:
        short: as `in_short` returns it.
        tables, said: as `report_fold` returns them.
        curves: the picture that training drew, where it is there.
    """
    pictures = [output_dir / f"{name}.png" for name in ("films", "findings", "noise_levels")]
    if "prompt_followed" not in metrics:
        pictures.remove(output_dir / "findings.png")
    parts = [
        "<p>Shows films and captions of the set: if they are of patients, not to be shared.</p>",
        _html_list(short),
    ]
    parts += [html_picture(path) for path in (*pictures, curves) if path != curves or path.is_file()]
    parts += _html_tables(tables)
    parts += ["<h2>Variety and memorisation</h2>", *(f"<p>{html.escape(text)}</p>" for text in said)]
    parts += [
        html_picture(output_dir / "nearest.png"),
        "<p>captions.txt, beside this page, names captions of training that move the prediction further than in the base.</p>",
    ]
    title = f"Fold {metrics['fold']}: {metrics['films']} held-out films of {metrics['patients']} patients"
    write_bytes(output_dir / "report.html", html_page(title, parts + _html_ends([metrics])).encode())


def report_folds(record: dict, features_note: str, strength: float) -> dict[str, tuple[tuple, str]]:
    """Return what is worth a table of all folds, by title: the table and what it means.

    Args:
        record: content of `summary.json`.
        features_note: what the feature space is.
        strength: that films were rebuilt from for the first table.
    """
    space = f"Features: {features_note}."
    names = [
        f"{kind}/{metric}/{strength}" for metric in ("ssim", "psnr", "ms_ssim") for kind in ("adapter", "base", "gain")
    ]
    names += [
        f"bound/{metric}/{bound}" for metric in ("ssim", "psnr", "ms_ssim") for bound in ("mean_film", "ceiling")
    ]
    has_own_decoder = any(name.startswith("own_decoder/") for name in record["figures"])
    note = f"{FOLDS_NOTE} {DECODER_NOTE}" if has_own_decoder else FOLDS_NOTE
    tables: dict = {"Films rebuilt from half the noise": (films_over_folds_table(record, names), note)}
    if "films" in record["distribution"]:
        tables["Generated films of all folds as a set"] = (
            halves_table(record["distribution"]),
            f"{HALVES_NOTE} {space}",
        )
    if "labels" in record["alignment"]:
        tables["Do films show what their captions say?"] = (
            alignment_table(record["alignment"]),
            f"{ALIGNMENT_NOTE} {space}",
        )
    if record["tstr"]:
        table = tstr_over_folds_table(record["tstr"], record["folds"])
        tables["Trained on generated films, tested on real ones"] = table, f"{TSTR_NOTE} {space}"
    tables["Each fold's films as a set"] = sets_over_folds_table(record), SETS_NOTE
    if record["by_group"]:
        tables["For whom"] = groups_table(record), GROUPS_NOTE
    if "against" in record:
        left_out = [f"Not compared: {reason}." for reason in record["against"]["left_out"]]
        tables["Against another cross-validation"] = against_table(record["against"]), " ".join(left_out)
    return tables


def write_folds_page(
    output_dir: Path, title: str, record: dict, short: Sequence[str], tables: dict, folds: Sequence[dict]
) -> None:
    """Write report.html of all folds, without any film of a patient.

    Args:
        title: the page's.
        record: content of `summary.json`.
        short: as `in_short` returns it.
        tables: as `report_folds` returns them.
        folds: content of each fold's `metrics.json`.
    """
    everything = films_over_folds_table(record, list(record["figures"])), folds[0]["free_samples"]["note"]
    parts = [_html_list(short), html_picture(output_dir / "folds.png")]
    parts += _html_tables(tables | {"All figures by film": everything})
    write_bytes(output_dir / "report.html", html_page(title, parts + _html_ends(folds)).encode())


def _html_list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _html_tables(tables: dict[str, tuple[tuple, str]]) -> list[str]:
    return [
        f"<h2>{title}</h2>{html_table(*table, DEFINITIONS)}<p>{html.escape(note)}</p>"
        for title, (table, note) in tables.items()
    ]


def _html_ends(folds: Sequence[dict]) -> list[str]:
    """Return what both pages end with."""
    definitions = ["<h2>What the figures mean</h2>", html_definitions(DEFINITIONS)]
    return [*definitions, "<h2>Settings, data and terms</h2>", html_table(*settings_table(folds))]


def variety_in_words(metrics: dict) -> str:
    """Return how alike films of one caption are, beside real films, as a sentence."""
    part = metrics["variety"]
    kinds = {
        "one_caption": "generated films of one caption", "real_films_of_one_caption": "real films of one of these",
        "real_films": "real films of different patients and, mostly, captions",
    }  # fmt: skip
    said = []
    for kind, name in kinds.items():
        if part[kind] is not None:
            said.append(f"{with_interval(part[kind], 3)} between {name} ({part[kind]['pairs']} pairs)")
    return f"Variety: MS-SSIM over {part['scales']} scales is {', '.join(said)}. Higher means more alike."
