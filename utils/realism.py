"""Are generated films, as a set, like real ones? Distances beside what real films score in their place, and variety."""

import statistics
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from utils.distances import frechet_distance, kernel_distance, precision_recall
from utils.metrics import bootstrap_interval, in_batches, ms_ssim
from utils.seeding import derive_seed

NEIGHBOURS = 5  # that span a ball of precision and recall
FLOOR_DRAWS = 10  # sets of other real films
LEAST_PATIENTS = 10  # of a group whose distance says something


def set_figures(reference: Tensor, films: Tensor) -> dict[str, float | None]:
    """Return every distance of a set of films from a real set of equal size.

    Args:
        reference, films: features, [N, D] each: distances of unequal sets do not compare.

    Returns:
        `frechet` (None for as many features as films, or more, whose covariance is singular), `kernel` and its standard
        error `kernel_error`, `precision`, `recall`, `density` and `coverage` (None for few films).
    """
    if len(reference) != len(films):
        raise ValueError(f"sets of {len(reference)} and {len(films)} films; expected two of one size")
    kernel, error = kernel_distance(reference, films)
    neighbours = dict.fromkeys(("precision", "recall", "density", "coverage"))
    if len(reference) > NEIGHBOURS:
        neighbours = precision_recall(reference, films, NEIGHBOURS)
    frechet = frechet_distance(reference, films) if len(reference) > reference.shape[1] else None
    return {"frechet": frechet, "kernel": kernel, "kernel_error": error, **neighbours}


def compare_sets(
    reference: Tensor,
    patients: Sequence[str],
    sets: dict[str, Tensor],
    pool: Tensor,
    pool_patients: Sequence[str],
    seed: int,
) -> dict | None:
    """Compare sets of films with held-out films, and with them, as the floor, other real films in their place.

    All sets are brought to one size, which leaves out films by chance. For the floor as many films of as many patients as
    the reference has are drawn from the pool, ten times: films of one patient are alike.

    Args:
        reference, patients: features of the held-out films and whose they are, [N, D] and [N].
        sets: features of others by name, [N, D] each.
        pool, pool_patients: features and patients of real films of yet other patients, [M, D] and [M].
        seed: of the draws.

    Returns:
        `films` and `features`, the numbers N and D; by name what `set_figures` returns; `real`, the mean of each figure
        over the draws, and as `real_sd` the standard deviation of sets with no film in common, None from a pool of less
        than two of them; `relative`, by name the figures beside those; `too_good`, the names of sets that lie nearer than real films do by more than three of those.
        None for fewer than three films.
    """
    size = min(map(len, (reference, pool, *sets.values())))
    if size < 3:
        return None
    generator = np.random.default_rng(derive_seed(seed, "floor"))
    kept, *of_sets = (np.sort(generator.permutation(len(films))[:size]) for films in (reference, *sets.values()))
    num_patients = len({patients[place] for place in kept})
    reference = reference[kept]
    sets = {name: films[places] for (name, films), places in zip(sets.items(), of_sets, strict=True)}
    draws = []
    for _ in range(FLOOR_DRAWS):
        places = _draw_alike(pool_patients, num_patients, size, generator)
        draws.append(set_figures(reference, pool[places]))
    real, real_sd = _mean_and_spread(draws)
    figures = {name: set_figures(reference, films) for name, films in sets.items()}
    too_good = []
    if len(pool) >= 2 * size:
        overlap = (1 - size / len(pool)) ** 0.5  # draws without replacement spread that much less
        real_sd = {name: None if sd is None else sd / overlap for name, sd in real_sd.items()}
        distance = "kernel" if real["frechet"] is None else "frechet"
        nearest = real[distance] - 3 * real_sd[distance]
        too_good = [name for name, of in figures.items() if of[distance] < nearest]
    else:
        real_sd = dict.fromkeys(real_sd)
    return {
        "films": size, "features": reference.shape[1], **figures, "real": real, "real_sd": real_sd,
        "relative": {name: relative_to(of, real, real_sd) for name, of in figures.items()}, "too_good": too_good,
    }  # fmt: skip


def relative_to(figures: dict, real: dict, real_sd: dict) -> dict[str, float | None]:
    """Return a set's figures relative to those of real films in its place: 1 is as good.

    But for the kernel distance, which is 0 between real films: how many of their standard deviations it lies beyond. None
    where either is None, or would be divided by 0.
    """

    def relative(name: str) -> float | None:
        value, of_real, spread = figures[name], real[name], real_sd[name]
        if name == "kernel":
            return (value - of_real) / spread if spread else None
        return value / of_real if value is not None and of_real else None

    return {name: relative(name) for name in real if name != "kernel_error"}


def distances_by_group(
    films: dict[str, Tensor],
    groups: dict[str, dict[str, list[int]]],
    patients: Sequence[str],
    pool: Tensor,
    pool_groups: dict[str, dict[str, list[int]]],
) -> dict[str, dict[str, dict]]:
    """Return how near films of a group are to its held-out ones, beside other real films of that group.

    Args:
        films: features of films "held_out" and "generated", [N, D], row by row of one caption.
        groups: places of those films by attribute and value.
        patients: of the held-out films, [N].
        pool: features of real films of other patients, [M, D].
        pool_groups: places of those.

    Returns:
        By attribute and value `generated` and `real`, the kernel distance as `mean` with its standard error as `error`; None for
        groups of fewer than LEAST_PATIENTS patients or films of the pool.
    """

    def distance(one: Tensor, other: Tensor) -> dict | None:
        if len(other) < LEAST_PATIENTS:
            return None
        return dict(zip(("mean", "error"), kernel_distance(one, other), strict=True))

    def of_group(attribute: str, value: str, places: list[int]) -> dict:
        if len({patients[place] for place in places}) < LEAST_PATIENTS:
            return {"generated": None, "real": None}
        held_out, others = films["held_out"][places], pool[pool_groups.get(attribute, {}).get(value, [])]
        return {"generated": distance(held_out, films["generated"][places]), "real": distance(held_out, others)}

    return {
        attribute: {value: of_group(attribute, value, places) for value, places in by_value.items()}
        for attribute, by_value in groups.items()
    }


def _draw_alike(patients: Sequence[str], num_patients: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return places of `size` films: one of each of so many patients, then more of theirs, then of others where these are few."""
    names, whose = np.unique(np.asarray(patients), return_inverse=True)
    rank = generator.permutation(len(names))[whose]  # by film, of its patient
    order = generator.permutation(len(whose))
    is_first = np.zeros(len(whose), dtype=bool)
    is_first[order[np.unique(whose[order], return_index=True)[1]]] = True
    chosen = rank < num_patients
    turn = np.where(chosen, np.where(is_first, -2, -1), rank)  # before all ranks, which begin at 0
    return np.sort(order[np.argsort(turn[order], kind="stable")[:size]])


def compare_halves(real: Tensor, sets: dict[str, Tensor], patients: Sequence[str], seed: int) -> dict | None:
    """Compare out-of-fold films with the real films of all folds, of which none are left over for a floor.

    Ten times the patients are split in two. One half is the reference; the other's real films are the floor, and films
    generated from its captions are what is asked about, all of one size. No model saw the patients whose captions it was
    given, but it saw those of other folds, who are in the reference: this figure would flatter one that memorises.

    Args:
        real: features, [N, D].
        sets: of films generated from the captions of those, row by row, by name, [N, D] each.
        patients: of the real films, [N].
        seed: of the splits.

    Returns:
        `films` and `features`, the size of a half and the number D; by name of a set, and as `real`, the mean of each of
        `set_figures` over the splits, and as `generated_sd`, say, their standard deviations, of splits that share films;
        `relative`, as `compare_sets` has it. None for halves of fewer than three films.
    """
    generator = np.random.default_rng(derive_seed(seed, "halves"))
    patients = np.asarray(patients)
    names = np.unique(patients)
    draws: dict[str, list[dict]] = {name: [] for name in ("real", *sets)}
    splits = []
    for _ in range(FLOOR_DRAWS):
        first = np.isin(patients, generator.permutation(names)[: len(names) // 2])
        splits.append((np.flatnonzero(first), np.flatnonzero(~first)))
    size = min(len(half) for split in splits for half in split)
    if size < 3:
        return None
    for split in splits:
        one, other = (np.sort(generator.permutation(half)[:size]) for half in split)
        draws["real"].append(set_figures(real[one], real[other]))
        for name, films in sets.items():
            draws[name].append(set_figures(real[one], films[other]))
    summary: dict = {"films": size, "features": real.shape[1]}
    for kind, figures in draws.items():
        summary |= dict(zip((kind, f"{kind}_sd"), _mean_and_spread(figures), strict=True))
    relative = {name: relative_to(summary[name], summary["real"], summary["real_sd"]) for name in sets}
    return summary | {"relative": relative}


def _mean_and_spread(draws: Sequence[dict[str, float | None]]) -> tuple[dict, dict]:
    """Return mean and standard deviation of each figure over draws, None where it is None in one of them."""
    of_draws = {name: [draw[name] for draw in draws] for name in draws[0]}
    return tuple(
        {name: None if None in values else statistic(values) for name, values in of_draws.items()}
        for statistic in (statistics.fmean, statistics.stdev)
    )


def pair_similarity(films: Tensor, others: Tensor, groups: Sequence[str], seed: int) -> dict:
    """Return the mean MS-SSIM of pairs of films and its 95 % interval: the lower, the more they vary.

    Args:
        films, others: uint8 [P, H, W] each.
        groups: what makes pairs alike, such as their prompt or patient, [P]: each counts once, whatever its number of pairs.
        seed: of the bootstrap over groups.

    Returns:
        `mean`, in [0, 1], its `interval`, None for a single group, and the numbers of `pairs` and `groups`.
    """
    values = in_batches(ms_ssim, films, others).double().numpy()
    names, whose = np.unique(np.asarray(groups), return_inverse=True)
    of_groups = (np.bincount(whose, weights=values) / np.bincount(whose)).tolist()
    low, high = bootstrap_interval(of_groups, names.tolist(), seed)
    return {
        "mean": statistics.fmean(of_groups), "interval": None if np.isnan(low) else [low, high],
        "pairs": len(values), "groups": len(names),
    }  # fmt: skip
