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
        than two of them; `too_good`, the names of sets that lie nearer than real films do by more than three of those.
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
        "too_good": too_good,
    }  # fmt: skip


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


def compare_halves(real: Tensor, generated: Tensor, patients: Sequence[str], seed: int) -> dict | None:
    """Compare out-of-fold films with the real films of all folds, of which none are left over for a floor.

    Ten times the patients are split in two. One half is the reference; the other's real films are the floor, and those
    generated from its captions are what is asked about, all of one size. No model saw the patients whose captions it was
    given, but it saw those of other folds, who are in the reference: this figure would flatter one that memorises.

    Args:
        real, generated: features, [N, D] each: row by row of one caption.
        patients: of the real films, [N].
        seed: of the splits.

    Returns:
        `films` and `features`, the size of a half and the number D; `generated` and `real`, the mean of each of
        `set_figures` over the splits, and their standard deviations as `generated_sd` and `real_sd`. None for halves of
        fewer than three films.
    """
    generator = np.random.default_rng(derive_seed(seed, "halves"))
    patients = np.asarray(patients)
    names = np.unique(patients)
    draws: dict[str, list[dict]] = {"generated": [], "real": []}
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
        draws["generated"].append(set_figures(real[one], generated[other]))
    summary: dict = {"films": size, "features": real.shape[1]}
    for kind, figures in draws.items():
        summary |= dict(zip((kind, f"{kind}_sd"), _mean_and_spread(figures), strict=True))
    return summary


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
