"""Pictures, tables and HTML of runs and evaluations. No torch."""

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import write_bytes
from utils.runlog import precision_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 4  # pixels between films
LINE = 16  # height of a line of text in pixels
TITLES = {"ssim": "SSIM", "psnr": "PSNR, dB", "ms_ssim": "MS-SSIM", "mse": "MSE"}
DEFINITIONS = {
    "rebuilt": "A held-out film is noised to that share of the schedule, with noise that depends on the film alone, and "
    "denoised with its own caption in deterministic steps, without guidance.",
    "SSIM": "Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels, grey levels in [0, 1]; 1 is the same film.",
    "MS-SSIM": "The same over several scales (Wang et al. 2003), as many as fit the film.",
    "PSNR": "Peak signal-to-noise ratio of grey levels in dB; more is nearer.",
    "MSE": "Mean squared error: of the predicted noise or velocity at a timestep, of grey levels in [0, 1] for films.",
    "Frechet distance": "Between Gaussians fitted to the features of both sets (Heusel et al. 2017). Few films push it up.",
    "kernel distance": "Squared maximum mean discrepancy, cubic kernel, unbiased (Binkowski et al. 2018); 0 is equal.",
    "precision": "Share of generated films within reach of real ones (Kynkaanniemi et al. 2019).",
    "recall": "Share of real films within reach of generated ones.",
    "density": "How many real films reach a generated one, over five (Naeem et al. 2020); near 1 between equal sets.",
    "AUROC": "Area under the receiver operating characteristic: how often a film with the label is read above one without.",
    "coverage": "Share of real films that reach a generated one; near 0.97 between equal sets.",
}
SETS_OF_FOLDS = {  # what is measured of a fold's films as a set, by its place in `metrics.json`
    "distribution/generated/frechet": "Frechet distance: adapter",
    "distribution/base/frechet": "Frechet distance: base without LoRA",
    "distribution/real/frechet": "Frechet distance: other real films",
    "distribution/generated/kernel": "kernel distance: adapter",
    "distribution/base/kernel": "kernel distance: base without LoRA",
    "distribution/real/kernel": "kernel distance: other real films",
    "distribution/generated/precision": "precision: adapter",
    "distribution/generated/recall": "recall: adapter",
    "distribution/generated/density": "density: adapter",
    "distribution/generated/coverage": "coverage: adapter",
    "variety/one_caption/mean": "MS-SSIM among generated films of one caption",
    "variety/real_films_of_one_caption/mean": "MS-SSIM among real films of one caption",
    "variety/real_films/mean": "MS-SSIM among real films of any captions",
    "counterfactual/all/generated/mean": "finding read more strongly where asked for: adapter (chance 0.5)",
    "counterfactual/all/real/mean": "finding read more strongly where it is: real films",
    "memorisation/features/probability": "share nearer to training, in features (0.5 is expected)",
    "memorisation/pixels/probability": "share nearer to training, in pixels (0.5 is expected)",
    "memorisation/features/near_copies": "near copies of training films, in features",
    "memorisation/pixels/near_copies": "near copies of training films, in pixels",
    "memorisation/copies": "copies of training films",
    "memorisation/captions/probability": "captions of training recognised (0.5 is expected)",
}
KINDS = {"adapter": "adapter", "base": "base without LoRA", "gain": "gain over the base (positive is better)",
         "own_decoder": "adapter with the base's decoder", "generated": "generated", "random_pair": "two unrelated real films",
         "mean_film": "mean training film (floor)", "ceiling": "autoencoder's round trip (ceiling)"}  # fmt: skip
SMOOTHING = 25  # steps of the running mean in the loss curve


def contact_sheet(
    films: Sequence[Sequence[np.ndarray]], row_titles: Sequence[str], column_titles: Sequence[str], footer: str
) -> Image.Image:
    """Lay films out in rows, each under its title, with a heading over each column.

    Args:
        films: rows of grey films, uint8 [H, W] each, all of one size; rows may differ in length.
        row_titles: a text above each row, wrapped to the sheet's width.
        column_titles: a short text above each column.
        footer: the last line: what the picture shows and what it is not for.

    Returns:
        A grey image.
    """
    side = films[0][0].shape[0]
    columns = max(len(row) for row in films)
    width = max(columns * (side + GAP) + GAP, 360)
    font = ImageFont.load_default(size=12)
    letters = max(20, int(width / font.getlength("n")))
    titles = [textwrap.wrap(title, letters) for title in row_titles]
    foot = textwrap.wrap(footer, letters)
    height = LINE * (1 + sum(map(len, titles)) + len(foot)) + len(films) * (side + 2 * GAP) + GAP
    sheet = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        draw.text((GAP + column * (side + GAP), 1), title, fill=0, font=font)
    top = LINE
    for row, lines in zip(films, titles, strict=True):
        for line in lines:
            draw.text((GAP, top), line, fill=0, font=font)
            top += LINE
        for column, film in enumerate(row):
            sheet.paste(Image.fromarray(film), (GAP + column * (side + GAP), top + GAP))
        top += side + 2 * GAP
    for line in foot:
        draw.text((GAP, top), line, fill=0, font=font)
        top += LINE
    return sheet


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure of matplotlib's as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    write_bytes(path, buffer.getvalue())


def draw_curves(path: Path, steps: Sequence[dict], validations: Sequence[dict]) -> None:
    """Draw a run as four curves: loss, SSIM between its bounds, change of the error by noise level, gradient and rate.

    Args:
        path: of the PNG.
        steps: rows of `log.jsonl`, possibly none yet.
        validations: rows of `validation.jsonl`; the first holds the bounds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    loss, ssim, error, gradient = figure.subplots(2, 2).ravel()

    numbers = [row["step"] for row in steps]
    losses = np.array([row["loss"] for row in steps], dtype=float)
    loss.plot(numbers, losses, color="0.8", linewidth=0.8)
    if len(losses) >= SMOOTHING:
        smooth = np.convolve(losses, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
        loss.plot(numbers[SMOOTHING - 1 :], smooth, color="C0", label=f"mean of {SMOOTHING} steps")
        loss.legend()
    loss.set(title="Training loss (weighted by timestep)", xlabel="step")

    bounds, baseline = validations[0]["bounds"]["ssim"], validations[0]["ssim"]
    at = [row["step"] for row in validations]
    ssim.plot(at, [row["ssim"] for row in validations], "o-", label="rebuilt from half the noise")
    for name, value, style in (
        ("autoencoder's round trip (ceiling)", bounds["ceiling"], "g--"),
        ("base without LoRA", baseline, "k:"),
        ("mean training film (floor)", bounds["mean_film"], "r--"),
    ):
        ssim.plot([0, max(at[-1], 1)], [value, value], style, linewidth=1, label=name)
    ssim.set(title="SSIM of validation films", xlabel="step")
    ssim.legend(fontsize=8)

    for level, base in validations[0]["mse_by_timestep"].items():
        change = [100 * (row["mse_by_timestep"][level] / base - 1) for row in validations]
        error.plot(at, change, label=f"t = {level}")
    error.set(title="Error of the prediction against the base, %", xlabel="step")
    error.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    norms = [np.nan if row["grad_norm"] is None else row["grad_norm"] for row in steps]
    lines = gradient.plot(numbers, norms, color="C1", linewidth=0.8, label="gradient norm before clipping")
    lines += gradient.twinx().plot(numbers, [row["lr"] for row in steps], color="C2", label="learning rate")
    gradient.set(title="Gradient norm (left) and learning rate (right)", xlabel="step")
    gradient.legend(handles=lines, fontsize=8, loc="lower center")

    save_figure(path, figure)


def draw_noise_levels(path: Path, metrics: dict) -> None:
    """Draw an evaluation by noise level: error of the predicted noise, and SSIM of rebuilt films between its bounds.

    Args:
        path: of the PNG.
        metrics: content of `metrics.json`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    error, ssim = figure.subplots(1, 2)
    levels, strengths = metrics["noise_prediction_mse"], metrics["rebuilt"]
    for model, label in (("adapter", "adapter"), ("base", "base without LoRA")):
        means = np.array([level[model]["mean"] for level in levels.values()])
        error.plot([int(level) for level in levels], means, "o-", label=label)
        stats = [strength["ssim"][model] for strength in strengths.values()]
        means = np.array([stat["mean"] for stat in stats])
        ends = np.array([stat["interval"] or [stat["mean"]] * 2 for stat in stats]).T
        ssim.errorbar([float(s) for s in strengths], means, np.abs(ends - means), fmt="o-", capsize=3, label=label)
    error.set(title="Error of the predicted noise or velocity (MSE)", xlabel="timestep", yscale="log")
    error.legend()
    for name, label, style in (("ceiling", "autoencoder's round trip", "g--"), ("mean_film", "mean film", "r--")):
        ssim.axhline(metrics["bounds"]["ssim"][name]["mean"], linestyle="--", color=style[0], linewidth=1, label=label)
    ssim.set(title="SSIM of rebuilt films, 95 % by patient", xlabel="strength (share of the noise schedule)")
    ssim.legend(fontsize=8)
    save_figure(path, figure)


def draw_folds(path: Path, summary: dict, strength: float) -> None:
    """Draw a cross-validation: SSIM of rebuilt films by fold between its bounds, and AUROC of what captions assert.

    Args:
        path: of the PNG.
        summary: content of `summary.json`.
        strength: that films were rebuilt from.
    """
    from matplotlib.figure import Figure

    labels = summary["alignment"].get("labels", {})
    figure = Figure(figsize=(12, max(4, 1 + 0.45 * len(labels))), layout="constrained")
    ssim, auroc = figure.subplots(1, 2) if labels else (figure.subplots(), None)
    places = np.arange(len(summary["folds"]))
    for name, label, style in (
        ("bound/ssim/ceiling", "autoencoder's round trip (ceiling)", "g_"), (f"adapter/ssim/{strength}", "adapter", "C0o"),
        (f"base/ssim/{strength}", "base without LoRA", "C1s"), ("bound/ssim/mean_film", "mean training film (floor)", "r_"),
    ):  # fmt: skip
        ssim.plot(
            places, summary["figures"][name]["by_fold"], style, markersize=12 if "_" in style else 7, label=label
        )
    ssim.set(title=f"SSIM of films rebuilt from strength {strength}", xticks=places)
    ssim.set_xticklabels([f"fold {number}" for number in summary["folds"]])
    ssim.legend(fontsize=8)
    for row, figures in enumerate(reversed(list(labels.values()))):
        low, high = figures["shuffled"]["interval"]
        auroc.barh(
            row, high - low, left=low, height=0.7, color="0.9", label="captions shuffled (floor)" if row == 0 else None
        )
        for shift, (kind, label, style) in zip((0.2, 0.0, -0.2), (
            ("real", "the real films (ceiling)", "g^"), ("generated", "adapter", "C0o"), ("base", "base without LoRA", "C1s")
        ), strict=True):  # fmt: skip
            mean, ends = figures[kind]["mean"], figures[kind]["interval"] or [figures[kind]["mean"]] * 2
            reach = [[max(0, mean - ends[0])], [max(0, ends[1] - mean)]]
            auroc.errorbar(mean, row + shift, xerr=reach, fmt=style, capsize=2, label=label if row == 0 else None)
    if labels:
        auroc.set(title="AUROC of what captions assert, 95 % by patient", yticks=range(len(labels)))
        auroc.set_yticklabels(list(reversed(labels)))
        auroc.axvline(0.5, color="0.5", linewidth=0.8)
        auroc.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(path, figure)


def with_interval(stat: dict | None, digits: int) -> str:
    """Return "0.76 [0.75, 0.77]" for a `mean` and its `interval`, the mean alone where that is None, "" for None."""
    if stat is None or stat["mean"] is None:
        return ""
    between = " [{:.{d}f}, {:.{d}f}]".format(*stat["interval"], d=digits) if stat.get("interval") else ""
    return f"{stat['mean']:.{digits}f}{between}"


def headline_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what a reader wants first."""

    rows = []
    for strength, by_metric in metrics["rebuilt"].items():
        for name, digits in (("ssim", 4), ("psnr", 2), ("ms_ssim", 4)):
            figures, bounds = by_metric[name], metrics["bounds"][name]
            parts = [figures[kind] for kind in ("adapter", "base", "gain", "noisy")] + [
                bounds["mean_film"],
                bounds["ceiling"],
            ]
            shares = [f"{figures[f'{kind}_normalised']:.3f}" for kind in ("adapter", "base")]
            rows.append([
                f"rebuilt from {strength}: {TITLES[name]}", *(with_interval(part, digits) for part in parts), *shares
            ])  # fmt: skip
    for level, figures in metrics["noise_prediction_mse"].items():
        parts = figures["adapter"], figures["base"], figures["gain"]
        rows.append([f"prediction at t = {level}: MSE", *(with_interval(part, 4) for part in parts), *[""] * 5])
    heads = [
        "", "adapter", "base without LoRA", "gain, paired by film (positive is better)", "floor: the noisy film itself",
        "floor: mean film", "ceiling: autoencoder", "normalised: adapter", "normalised: base",
    ]  # fmt: skip
    return heads, rows


def free_samples_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of how like the film of its caption a generated film is; `metrics` as in `metrics.json`."""
    kinds = ("generated", "random_pair", "mean_film")
    rows = [
        [TITLES[name], *(with_interval(metrics["free_samples"][name][kind], digits) for kind in kinds)]
        for name, digits in (("ssim", 4), ("psnr", 2), ("ms_ssim", 4), ("mse", 4))
    ]
    heads = [
        "with the real film",
        "film generated from its caption",
        "another patient's real film",
        "mean training film",
    ]
    return heads, rows


def decoder_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what an adapted decoder did to the adapter's films; `metrics` as in `metrics.json`."""

    part = metrics["vae_decoder"]
    parts = {"round trip": part["ceiling"]}
    parts |= {f"rebuilt from {strength}": figures for strength, figures in part["rebuilt"].items()}
    rows = []
    for title, by_metric in parts.items():
        for name, digits in (("ssim", 4), ("psnr", 2), ("ms_ssim", 4)):
            figures = by_metric[name]
            shares = [
                f"{figures[key]:.3f}" if key in figures else "" for key in ("own_normalised", "adapted_normalised")
            ]
            cells = [with_interval(figures[key], digits) for key in ("own", "adapted", "gain")]
            rows.append([f"{title}: {TITLES[name]}", *cells, *shares])
    heads = [
        "adapter with", "the base's decoder", "the adapted decoder", "gain, paired by film", "normalised, base's decoder",
        "normalised, adapted decoder",
    ]  # fmt: skip
    return heads, rows


def followed_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of how often prompts are followed, by finding; `metrics` as in `metrics.json`."""

    def show(rates: dict | None) -> str:
        if rates is None:
            return ""
        return "{:.2f} [{:.2f}, {:.2f}]".format(rates["followed"], *rates["interval"])

    def chance(rates: dict | None) -> str:
        return "" if rates is None or rates["chance"] is None else f"{rates['chance']:.2f}"

    part = metrics["prompt_followed"]
    rows = []
    for finding, adapter in part["adapter"].items():
        base, reader, ceiling = (part[name].get(finding) for name in ("base", "reader", "reader_after_round_trip"))
        share = f"{adapter['followed'] / ceiling['followed']:.0%}" if ceiling and ceiling["followed"] else ""
        rows.append([
            finding, str(adapter["films"]), show(base), chance(base), show(adapter), chance(adapter),
            share, show(ceiling), show(reader), str(ceiling["films"]) if ceiling else "",
        ])  # fmt: skip
    heads = [
        "prompted finding and side", "generated films", "followed: base without LoRA", "its chance",
        "followed: adapter", "its chance", "adapter, of the ceiling", "ceiling: films of the set after the autoencoder",
        "films of the set as they are", "films of the set",
    ]  # fmt: skip
    return heads, rows


def distribution_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of how far sets of films are from the held-out ones; `metrics` as in `metrics.json`."""
    part = metrics["distribution"]
    films = part["films"]

    def show(value: float | None, spread: float | None = None) -> str:
        if value is None:
            return "too few films"
        digits = 2 if abs(value) >= 10 else 3
        return f"{value:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")

    rows = []
    for name, title in distance_titles(films).items():
        cells = []
        for films_of in ("generated", "base", "real", "mean_film"):
            spread = part["real_sd"][name] if films_of == "real" else None
            if name == "kernel" and films_of != "real":
                spread = part[films_of]["kernel_error"]
            cells.append(show(part[films_of][name], spread))
        rows.append([title, *cells[:3], in_relation(name, part["relative"]["generated"][name]), cells[3]])
    heads = [
        f"{films} films a set, {part['features']} features of {part['encoder']}", "adapter", "base without LoRA",
        "other real films in their place", "adapter, beside those", "the mean film alone",
    ]  # fmt: skip
    return heads, rows


def halves_table(part: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of pooled out-of-fold distances; `part` as `realism.compare_halves` returns it."""

    def show(kind: str, name: str) -> str:
        value, spread = part[kind][name], part[f"{kind}_sd"][name]
        return "too few films" if value is None else f"{value:.3f} +- {spread:.3f}"

    rows = []
    for name, title in distance_titles(part["films"]).items():
        beside = in_relation(name, part["relative"]["generated"][name])
        rows.append([title, *(show(kind, name) for kind in ("generated", "base", "real")), beside])
    heads = [
        f"all folds: {part['films']} films a half, {part['features']} features of {part['encoder']}",
        "adapter, out of fold", "base without LoRA", "real films of the same captions", "adapter, beside those",
    ]  # fmt: skip
    return heads, rows


def in_relation(name: str, value: float | None) -> str:
    """Return what `realism.relative_to` says of a figure, in words."""
    if value is None:
        return ""
    return f"{value:+.1f} standard deviations" if name == "kernel" else f"{value:.2f} times"


def against_table(part: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of a comparison of two cross-validations; `part` as in `summary.json`."""
    rows = []
    of_captions = {f"AUROC of captions: {label}": figures for label, figures in part["alignment"].items()}
    for name, figures in (part["figures"] | of_captions).items():
        between = " [{:.4f}, {:.4f}]".format(*figures["interval"]) if figures["interval"] else ""
        p = f"{figures['p']:.2g}" if figures.get("p") is not None else ""
        rows.append([name, f"{figures['gain']:.4f}{between}", p])
    heads = [
        f"against {part['folder']}: {part['films']} films, {part['patients']} patients",
        "gain, paired by film (positive: the first is better)", "p (Wilcoxon, by patient; not of another training run)",
    ]  # fmt: skip
    return heads, rows


def distance_titles(films: int) -> dict[str, str]:
    """Return the names of what `realism.set_figures` measures of sets of so many films."""
    names = {"frechet": f"Frechet distance (FD-{films})", "kernel": "kernel distance"}
    return names | {name: name for name in ("precision", "recall", "density", "coverage")}


def groups_table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the main figures by group of films; `metrics` as in `metrics.json`."""

    rows = []
    for attribute, by_value in metrics["by_group"].items():
        for value, figures in by_value.items():
            rows.append([
                f"{attribute}: {value}", str(figures["films"]), str(figures["patients"]),
                *(with_interval(figures[name], 4) for name in ("ssim/adapter", "ssim/gain", "mse/adapter", "mse/gain")),
                *(with_interval(figures["auroc"][kind], 2) for kind in ("generated", "real")),
            ])  # fmt: skip
            for distance in figures.get("kernel", {}).values():
                rows[-1].append("{mean:.2f} +- {error:.2f}".format(**distance) if distance else "")
    heads = [
        "films of", "films", "patients", "SSIM, rebuilt from half the noise", "gain over the base",
        "MSE of the prediction, all levels", "gain over the base", "AUROC, mean over findings: adapter", "ceiling: real films",
        "kernel distance: adapter", "other real films of the group",
    ]  # fmt: skip
    heads = heads[: max(map(len, rows), default=0)]
    return heads, rows


def within_view(figures: dict, otherwise: str = "views not known, or one") -> list[str]:
    part = figures["within_view"]
    return [with_interval(part[kind], 2) if part else otherwise for kind in ("generated", "real")]


def alignment_table(part: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what is read in films of what captions assert; `part` as `alignment.agreement` returns it."""
    kinds = ("generated", "base", "real", "shuffled", "new_captions")
    rows = []
    for label, figures in part["labels"].items():
        counts = f"{figures['positive']} of {figures['films']}"
        rows.append([label, counts, *(with_interval(figures[kind], 2) for kind in kinds[:4])])
        rows[-1].append(with_interval(figures["new_captions"], 2) or f"too few of {figures['new']}")
        rows[-1] += within_view(figures)
    if part["mean"]:
        count = f"{part['mean']['generated']['findings']} findings"
        cells = [with_interval(part["mean"][kind], 2) for kind in kinds]
        few = ("too few of known view",) if any(of["within_view"] for of in part["labels"].values()) else ()
        rows.insert(0, ["mean over findings", count, *cells, *within_view(part["mean"], *few)])
    heads = [
        "AUROC of what is known of the film", "held-out captions", "adapter", "base without LoRA",
        "ceiling: the real films", "floor: captions shuffled", "adapter, captions that training never saw",
        "adapter, within one view", "ceiling, within one view",
    ]  # fmt: skip
    return heads, rows


def pairs_table(part: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of pairs with and without a finding; `part` as `alignment.compare_pairs` returns it."""
    rows = [
        ["all findings" if name == "all" else name, str(figures["pairs"]), str(figures["counterparts"]),
         *(with_interval(figures[kind], 2) for kind in ("generated", "real"))]
        for name, figures in part.items()
    ]  # fmt: skip
    heads = [
        "read more strongly where asked for", "pairs", "of so many captions without", "adapter",
        "ceiling: between the real films",
    ]  # fmt: skip
    return heads, rows


def tstr_table(part: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of probes fitted on generated and on real films; `part` as `LinearProbes.tstr` returns it."""
    kinds = ("synthetic", "real", "both", "all_real")
    rows = [[label, *(with_interval(figures[kind], 2) for kind in kinds)] for label, figures in part["labels"].items()]
    if part["mean"]["real"]:
        rows.insert(0, ["mean over findings", *(with_interval(part["mean"][kind], 2) for kind in kinds)])
    heads = [
        "AUROC on held-out real films", f"fitted on films generated from {part['films']} captions of training",
        f"on the {part['films']} real films", "on both", f"on {part['training_films']} films of training",
    ]  # fmt: skip
    return heads, rows


def tstr_over_folds_table(part: dict, folds: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the means over findings, over folds.

    Args:
        part: `tstr` of `summary.json`.
        folds: their numbers.
    """
    titles = {
        "synthetic": "generated films", "real": "as many real films", "both": "both", "all_real": "all real films of training",
    }  # fmt: skip
    rows = [
        [title, f"{part[kind]['sd']:.3f}", with_interval(part[kind], 3), *(f"{v:.3f}" for v in part[kind]["by_fold"])]
        for kind, title in titles.items()
    ]
    heads = ["fitted on", "sd", f"AUROC on held-out real films, mean over {', '.join(part['findings'])} and folds"]
    return [*heads, *(f"fold {number}" for number in folds)], rows


def films_over_folds_table(record: dict, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of figures by film, over folds and pooled.

    Args:
        record: content of `summary.json`.
        names: of its `figures`.
    """
    rows = []
    for name in names:
        row = record["figures"][name]
        low, high = row["pooled_interval"]
        values = [f"{value:.4f}" for value in row["by_fold"]]
        rows.append([
            figure_title(name), with_interval(row, 4), f"{row['sd']:.4f}", *values, f"{row['pooled']:.4f} [{low:.4f}, {high:.4f}]"
        ])  # fmt: skip
    return ["", "mean of folds [95 %]", "sd", *_fold_heads(record), "all films [95 % by patient]"], rows


def sets_over_folds_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what each fold's films are as a set; `record` as in `summary.json`."""
    rows = [
        [
            SETS_OF_FOLDS[place],
            with_interval(row, 3),
            f"{row['sd']:.3f}",
            *(f"{value:.3f}" for value in row["by_fold"]),
        ]
        for place, row in record["sets"].items()
    ]
    rows.append(["memorisation audit", "", "", *record["verdicts"]])
    return ["", "mean of folds [95 %]", "sd", *_fold_heads(record)], rows


def _fold_heads(record: dict) -> list[str]:
    return [f"fold {number}" for number in record["folds"]]


def figure_title(name: str) -> str:
    """Return "SSIM, rebuilt from 0.5: adapter" for "adapter/ssim/0.5", and so on for all columns of `films.jsonl`."""
    part, metric, *rest = name.split("/")
    if part == "free":
        return f"{TITLES[rest[0]]}, with the real film of its caption: {KINDS[metric]}"
    if part == "bound" and rest[0] == "noisy":
        return f"{TITLES[metric]}, noisy film of strength {rest[1]} itself (floor)"
    if part == "bound":
        return f"{TITLES[metric]}: {KINDS[rest[0]]}"
    if rest[0] == "ceiling":
        return f"{TITLES[metric]}: round trip with the base's decoder"
    at = f"of the prediction at t = {rest[0]}" if metric == "mse" else f", rebuilt from {rest[0]}"
    return f"{TITLES[metric]}{' ' if metric == 'mse' else ''}{at}: {KINDS[part]}"


def settings_table(folds: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of what was measured, with what, and under which terms.

    Args:
        folds: content of `metrics.json` of one fold or several that were evaluated alike.
    """
    metrics, settings = folds[0], folds[0]["settings"]
    counts = [sum(fold[name] for fold in folds) for name in ("films", "patients")]
    chosen = ("lora_targets", "rank", "text_encoder_rank", "lora_alpha", "learning_rate", "text_encoder_lr",
              "films_a_step", "max_train_steps", "max_train_samples", "snr_gamma", "caption_dropout", "shuffle_captions",
              "use_ema")  # fmt: skip
    rows = [
        ["base model", metrics["base"]],
        *(
            [f"adapter of fold {fold['fold']}", f"step {fold['adapter']['step']}, SHA-256 {fold['adapter']['sha256']}"]
            for fold in folds
        ),
        ["films", f"{counts[0]} held-out of {counts[1]} patients, {metrics['resolution']} px"],
        ["data", f"SHA-256 {metrics['data_hash']}"],
        ["sampling", ", ".join(f"{name} {value}" for name, value in metrics["sampling"].items())],
        ["arithmetic", precision_name(metrics["mixed_precision"])],
        ["feature space", metrics["features"]],
        ["seed", str(metrics["seed"])],
        ["training", ", ".join(f"{name} {settings[name]}" for name in chosen if name in settings)],
        ["versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())],
        *(["terms", text] for text in metrics["terms"]),
    ]
    return ["measured", "how"], rows


def html_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], definitions: Mapping[str, str] | None = None
) -> str:
    """Return a table as HTML; every cell is text, not markup.

    Args:
        heads, rows: its cells.
        definitions: what the figure means that a row's first cell names, shown where the pointer rests on it.
    """
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for row in rows:
        cells = [html.escape(cell) for cell in row]
        named = [name for name in definitions or {} if name in row[0]]
        meant = [definitions[name] for name in named if not any(name != other and name in other for other in named)]
        if meant:
            cells[0] = f'<abbr title="{html.escape(" ".join(meant))}">{cells[0]}</abbr>'
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def html_definitions(definitions: Mapping[str, str]) -> str:
    """Return what figures mean as a list, for where no pointer rests on anything: phones and paper."""
    return (
        "<dl>"
        + "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(t)}</dd>" for n, t in definitions.items())
        + "</dl>"
    )


def html_picture(path: Path) -> str:
    """Return a PNG file as an HTML element that holds it, so that a page can be sent as one file."""
    return html_image(path.stem, path.read_bytes())


def html_image(name: str, png: bytes) -> str:
    """Return a PNG as an HTML element that holds it."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a page of its own from pieces of HTML under a heading."""
    style = (
        "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{display:block;max-width:100%}"
        "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:1em 0}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}dt{font-weight:bold}td{overflow-wrap:anywhere}"
        "@media print{body{max-width:none}table{display:table}img,tr{break-inside:avoid}}"
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>For research and teaching. Not for diagnosis.</p>\n{body}\n</body></html>\n"
    )
