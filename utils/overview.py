"""A finished set at a glance, as a page of one file: figures, who is in which fold, and films to look at."""

import io
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image

from utils.films import is_upsampled
from utils.report import contact_sheet, html_image, html_page, html_table

SHOWN = 24  # films
PER_ROW = 8
SIDE_PX = 160
MOST_FINDINGS = 15
LONGEST_NAME = 40
NOTE = "Films drawn by lot, as they will be trained on: is bright dense, the heart on the right of the picture, nothing cut off?"


def count(rows: list[dict], rejected: list[dict], num_duplicates: int, resolution: int) -> dict:
    """Return the figures of `dataset.json`."""
    folds = sorted({row["fold"] for row in rows} - {None})
    films_of_patient = Counter(row["patient_id"] for row in rows if row["patient_id"] is not None)
    films_with = defaultdict(lambda: [0] * len(folds))
    for row in rows:
        for finding in row["findings"] or ():
            if row["fold"] is not None:
                films_with[finding][row["fold"]] += 1
    return {
        "seen": len(rows) + len(rejected),
        "kept": len(rows),
        "rejected": tally(row["reason"] for row in rejected),
        "upsampled": sum(is_upsampled(row, resolution) for row in rows),
        "with_borders": sum(any(row["borders"]) for row in rows),
        "burned_in_text": sum(row["burned_in_text"] for row in rows),
        "geometry": tally(row["geometry"] for row in rows),
        "duplicates_across_patients": num_duplicates,
        "patients": len(films_of_patient) or None,
        "most_films_of_a_patient": max(films_of_patient.values(), default=None),
        "patients_per_fold": [len({row["patient_id"] for row in rows if row["fold"] == fold}) for fold in folds],
        "films_per_fold": [sum(row["fold"] == fold for row in rows) for fold in folds],
        "findings": tally(finding for row in rows for finding in row["findings"] or ()),
        "findings_per_fold": dict(sorted(films_with.items())),
        "views": tally(row["view"] or "unknown" for row in rows),
        "sexes": tally(row["sex"] or "unknown" for row in rows),
        "ages": spread([row["age"] for row in rows if row["age"] is not None]),
        "caption_words": spread([len(row["text"].split()) for row in rows]),
    }


def tally(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, by name."""
    return dict(sorted(Counter(values).items()))


def spread(values: Sequence[int]) -> list[int] | None:
    """Return least, greatest and median of some numbers, None where there are none."""
    return [min(values), max(values), round(statistics.median(values))] if values else None


def overview_page(output_dir: Path, record: dict, rows: Sequence[dict]) -> str:
    """Return the page: `record` is that of `dataset.json`, `rows` are those of `metadata.jsonl`."""
    sources = [part["name"] for part in record["sources"]]
    return html_page(
        f"{' and '.join(sources)}: {len(rows)} films",
        [
            html_table(["", ""], [[name, value] for name, value in summary_lines(record["counts"])]),
            html_image("the set in figures", draw_counts(record["counts"], rows)),
            html_table(*fold_table(record["counts"])),
            f"<p>{NOTE}</p>",
            html_image("films", draw_films(output_dir, rows, record["settings"]["seed"])),
        ],
    )


def summary_lines(counts: dict) -> list[tuple[str, str]]:
    """Return what a person wants to see of `counts` in `dataset.json`, as names and values."""
    lengths, ages = counts["caption_words"], counts["ages"]
    unknown = "not known: no folds; train with --group_by image if each image is its own"
    return [
        ("films seen", str(counts["seen"])),
        ("kept", str(counts["kept"])),
        ("rejected", listed(counts["rejected"])),
        ("upsampled", str(counts["upsampled"])),
        ("borders cut off", str(counts["with_borders"])),
        ("text burned in", str(counts["burned_in_text"])),
        (
            "patients",
            f"{counts['patients']}, {counts['most_films_of_a_patient']} films at most"
            if counts["patients"]
            else unknown,
        ),
        ("films per fold", " ".join(map(str, counts["films_per_fold"])) or "none"),
        ("views", listed(counts["views"])),
        ("sexes", listed(counts["sexes"])),
        ("age in years", "not known" if not ages else "{} to {}, median {}".format(*ages)),
        ("findings", listed(dict(sorted(counts["findings"].items(), key=lambda item: -item[1])[:MOST_FINDINGS]))),
        ("words of a caption", "{} to {}, median {}".format(*lengths)),
        ("copies across patients", str(counts["duplicates_across_patients"])),
    ]


def listed(numbers: dict[str, int]) -> str:
    """Return "PA 12, AP 3"."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none"


def fold_table(counts: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the folds: films, patients, and the share of each of the commoner findings."""
    findings = sorted(counts["findings_per_fold"], key=lambda name: -sum(counts["findings_per_fold"][name]))
    findings = findings[:MOST_FINDINGS]
    rows = []
    for fold, films in enumerate(counts["films_per_fold"]):
        shares = (counts["findings_per_fold"][name][fold] / films for name in findings)
        rows.append(
            [str(fold), str(films), str(counts["patients_per_fold"][fold]), *(f"{share:.1%}" for share in shares)]
        )
    return ["fold", "films", "patients", *findings], rows


def draw_counts(counts: dict, rows: Sequence[dict]) -> bytes:
    """Return a PNG of the set in six charts: views, ages, findings, folds, caption lengths, reasons of rejection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    views, ages, findings, folds, captions, rejected = figure.subplots(2, 3).ravel()

    pairs = Counter((row["view"] or "unknown", row["sex"] or "unknown") for row in rows)
    names, floor = list(counts["views"]), np.zeros(len(counts["views"]))
    for sex in counts["sexes"]:
        heights = np.array([pairs[name, sex] for name in names])
        views.bar(names, heights, bottom=floor, label=sex)
        floor = floor + heights
    views.set_title("Films by view and sex")
    views.legend()

    known = [row["age"] for row in rows if row["age"] is not None]
    if known:
        ages.hist(known, bins=range(0, max(known) + 6, 5))
    ages.set(title=f"Age, known of {len(known)} films", xlabel="years")

    common = sorted(counts["findings"].items(), key=lambda item: item[1])[-MOST_FINDINGS:]
    names = [shorten(name, LONGEST_NAME).replace("$", r"\$") for name, _ in common]  # no formulas
    findings.barh(names, [number for _, number in common])
    findings.set_title("Films by finding")

    sick = np.array(
        [
            sum(bool(row["findings"]) for row in rows if row["fold"] == fold)
            for fold in range(len(counts["films_per_fold"]))
        ]
    )
    folds.bar(range(len(sick)), np.array(counts["films_per_fold"]) - sick, label="none known")
    folds.bar(range(len(sick)), sick, bottom=np.array(counts["films_per_fold"]) - sick, label="with findings")
    folds.set(title="Films by fold", xlabel="fold", xticks=range(len(sick)))
    folds.legend(loc="lower right")

    captions.hist([len(row["text"].split()) for row in rows], bins=30)
    captions.set(title="Length of captions", xlabel="words")

    reasons = sorted(counts["rejected"].items(), key=lambda item: item[1])
    rejected.barh([reason for reason, _ in reasons], [number for _, number in reasons], color="C3")
    rejected.set_title(f"{sum(counts['rejected'].values())} films rejected, by reason")

    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font lacks: the table beside the picture has them
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def draw_films(output_dir: Path, rows: Sequence[dict], seed: int) -> bytes:
    """Return a PNG of some films, drawn by lot."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(rows))[:SHOWN])
    films = []
    for place in chosen:
        with Image.open(output_dir / rows[place]["file_name"]) as image:
            films.append(np.asarray(image.convert("L").resize((SIDE_PX, SIDE_PX))))
    in_rows = [films[start : start + PER_ROW] for start in range(0, len(films), PER_ROW)]
    names = [
        "; ".join(
            f"{rows[place]['source_id']}: {rows[place]['text'][:80]}" for place in chosen[start : start + PER_ROW]
        )
        for start in range(0, len(films), PER_ROW)
    ]
    buffer = io.BytesIO()
    contact_sheet(in_rows, names, [], "Real films of patients where the source is one: not to be passed on.").save(
        buffer, "PNG"
    )
    return buffer.getvalue()
