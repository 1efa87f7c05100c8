"""The page of an evaluated fold: what is on it, in which order, and what each table means. No torch."""

import html
from collections.abc import Sequence
from pathlib import Path

from utils.files import write_bytes
from utils.release import in_words
from utils.report import (
    DEFINITIONS,
    alignment_table,
    decoder_table,
    distribution_table,
    followed_table,
    groups_table,
    headline_table,
    html_definitions,
    html_page,
    html_picture,
    html_table,
    pairs_table,
    settings_table,
    tstr_table,
    with_interval,
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
    "training patients, as many of each as there are held-out ones, mean and standard deviation of ten draws."
)
TOO_GOOD_NOTE = (
    "Generated films lie nearer to the held-out ones than other real films do, by more than three standard deviations: "
    "too good to be true. Were the held-out films, or copies of them, among those trained on?"
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
    tables["Films rebuilt, and noise predicted"] = headline_table(metrics), metrics["free_samples"]["note"]
    if "films" in metrics["distribution"]:
        too_good = [TOO_GOOD_NOTE] if "generated" in metrics["distribution"]["too_good"] else []
        note = " ".join([*too_good, DISTRIBUTION_NOTE, space])
        tables["Generated films as a set"] = distribution_table(metrics), note
    if metrics["tstr"]:
        tables["Trained on generated films, tested on real ones"] = tstr_table(metrics["tstr"]), f"{TSTR_NOTE} {space}"
    if metrics["by_group"]:
        tables["For whom"] = groups_table(metrics), ""
    said = [variety_in_words(metrics), in_words(metrics["memorisation"])]
    if "films" in metrics["distribution"] and "generated" in metrics["distribution"]["too_good"]:
        said.append(TOO_GOOD_NOTE)
    return tables, said


def write_fold_page(output_dir: Path, metrics: dict, tables: dict, said: Sequence[str], terms: Sequence[str]) -> None:
    """Write report.html: the pictures first, then the tables, then how it was measured.

    Args:
        tables, said: as `report_fold` returns them.
        terms: licences of base and films.
    """
    pictures = ["films", *(["findings"] if "prompt_followed" in metrics else []), "noise_levels"]
    parts = ["<p>Shows films and captions of the set: if they are of patients, not to be shared.</p>"]
    parts += [html_picture(output_dir / f"{name}.png") for name in pictures]
    for title, (table, note) in tables.items():
        parts += [f"<h2>{title}</h2>", html_table(*table, DEFINITIONS), f"<p>{html.escape(note)}</p>"]
    parts += ["<h2>Variety and memorisation</h2>", *(f"<p>{html.escape(text)}</p>" for text in said)]
    parts.append(html_picture(output_dir / "nearest.png"))
    parts += ["<h2>What the figures mean</h2>", html_definitions(DEFINITIONS)]
    parts += ["<h2>Settings, data and terms</h2>", html_table(*settings_table(metrics, terms))]
    title = f"Fold {metrics['fold']}: {metrics['films']} held-out films of {metrics['patients']} patients"
    write_bytes(output_dir / "report.html", html_page(title, parts).encode())


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
