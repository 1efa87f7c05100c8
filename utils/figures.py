"""From scores by film to figures: means with intervals by patient, gains paired by film, floors, ceilings, groups."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.metrics import bootstrap_interval, ms_ssim, mse, psnr, ssim
from utils.validation import HEADLINE, STRENGTHS

REBUILT = {"ssim": ssim, "psnr": psnr, "ms_ssim": ms_ssim}
METRICS = {**REBUILT, "mse": mse}
FREE_SAMPLES_NOTE = (
    "Not a measure of quality: a caption does not determine a film. Read it beside the random pair (two real films of "
    "different patients) and the mean training film, which beats honest samples because it is blurred."
)
LEAST_PATIENTS = 10  # of a group whose figures have an interval


def summarise(scores: dict[str, Tensor], patients: Sequence[str], levels: Sequence[int], seed: int) -> dict:
    """Return means with 95 % intervals: of each model, of the paired gain, and of the bounds.

    Args:
        scores: by name, one value a film, as `evaluate_fold` gathers them.
        patients: whose film it is.
        levels: timesteps of the noise-prediction error.
        seed: of the bootstrap.
    """

    def stat(values: Tensor) -> dict:
        return mean_with_interval(values, patients, seed)

    def compared(name: str) -> dict:
        adapter, base = scores[f"adapter/{name}"], scores[f"base/{name}"]
        return {"adapter": stat(adapter), "base": stat(base), "gain": stat(gain_of(name, adapter, base))}

    rebuilt = {}
    for strength in STRENGTHS:
        rebuilt[str(strength)] = {}
        for name in REBUILT:
            figures = compared(f"{name}/{strength}") | {"noisy": stat(scores[f"bound/{name}/noisy/{strength}"])}
            floor, ceiling = (scores[f"bound/{name}/{bound}"].mean().item() for bound in ("mean_film", "ceiling"))
            own_ceiling = scores.get(f"own_decoder/{name}/ceiling", scores[f"bound/{name}/ceiling"]).mean().item()
            for model, highest in (("adapter", ceiling), ("base", own_ceiling)):
                figures[f"{model}_normalised"] = (figures[model]["mean"] - floor) / (highest - floor)
            rebuilt[str(strength)][name] = figures
    return {
        "rebuilt": rebuilt,
        "bounds": {
            name: {bound: stat(scores[f"bound/{name}/{bound}"]) for bound in ("mean_film", "ceiling")}
            for name in REBUILT
        },
        "noise_prediction_mse": {str(level): compared(f"mse/{level}") for level in levels},
        "free_samples": {"note": FREE_SAMPLES_NOTE}
        | {
            name: {
                kind: stat(scores[f"free/{kind}/{name}"]) if f"free/{kind}/{name}" in scores else None
                for kind in ("generated", "random_pair", "mean_film")
            }
            for name in METRICS
        },
    }


def mean_with_interval(values: Tensor, patients: Sequence[str], seed: int) -> dict:
    """Return the mean of one value a film and its 95 % interval by patient, None where there is only one."""
    low, high = bootstrap_interval(values.tolist(), patients, seed)
    return {"mean": values.mean().item(), "interval": None if np.isnan(low) else [low, high]}


def summarise_decoder(scores: dict[str, Tensor], patients: Sequence[str], seed: int) -> dict:
    """Return what the adapted decoder did, beside the base's own: to the ceiling, and to the adapter's rebuilt films.

    Args:
        scores, patients, seed: as `summarise` takes them, with "own_decoder/...": the adapter with the base's decoder.
    """

    def compared(own: Tensor, adapted: Tensor) -> dict:
        pairs = {"own": own, "adapted": adapted, "gain": adapted - own}
        return {name: mean_with_interval(values, patients, seed) for name, values in pairs.items()}

    summary = {"ceiling": {}, "rebuilt": {str(strength): {} for strength in STRENGTHS}}
    for name in REBUILT:
        own, adapted = scores[f"own_decoder/{name}/ceiling"], scores[f"bound/{name}/ceiling"]
        summary["ceiling"][name] = compared(own, adapted)
        floor = scores[f"bound/{name}/mean_film"].mean().item()
        for strength in STRENGTHS:
            figures = compared(scores[f"own_decoder/{name}/{strength}"], scores[f"adapter/{name}/{strength}"])
            for decoder, ceiling in (("own", own), ("adapted", adapted)):
                share = (figures[decoder]["mean"] - floor) / (ceiling.mean().item() - floor)
                figures[f"{decoder}_normalised"] = share
            summary["rebuilt"][str(strength)][name] = figures
    return summary


def summarise_groups(
    scores: dict[str, Tensor],
    groups: dict[str, dict[str, list[int]]],
    patients: Sequence[str],
    levels: Sequence[int],
    seed: int,
) -> dict:
    """Return the main figures of each group of films, with counts.

    Args:
        scores, patients, levels, seed: as `summarise` takes them.
        groups: places of films by attribute and value.
    """
    by_film = {}
    for model in ("adapter", "base"):
        by_film[f"ssim/{model}"] = scores[f"{model}/ssim/{HEADLINE}"]
        by_film[f"mse/{model}"] = torch.stack([scores[f"{model}/mse/{level}"] for level in levels]).mean(dim=0)
    for name in ("ssim", "mse"):
        by_film[f"{name}/gain"] = gain_of(name, by_film[f"{name}/adapter"], by_film[f"{name}/base"])
    summary = {}
    for attribute, by_value in groups.items():
        summary[attribute] = {}
        for value, places in by_value.items():
            whose = [patients[place] for place in places]
            figures = {name: mean_with_interval(values[places], whose, seed) for name, values in by_film.items()}
            if len(set(whose)) < LEAST_PATIENTS:  # their spread says little of others'
                figures = {name: of | {"interval": None} for name, of in figures.items()}
            summary[attribute][value] = {"films": len(places), "patients": len(set(whose))} | figures
    return summary


def gain_of(name: str, adapter, base):
    """Return what the adapter gained over the base, positive where it is better: more SSIM and PSNR, less error."""
    return base - adapter if name.startswith("mse") else adapter - base
