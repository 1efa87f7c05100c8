"""Distances between sets of films, by their features: Frechet, kernel, nearest neighbours, and AUROC of a reading.

Features are rows, float [N, D], of whatever encoder made both sets. A distance means nothing by itself: it is read
beside the same distance between two halves of the real films, as many on each side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from utils.refusal import Refused

NEIGHBOURS_KEPT = 20  # so that after any half of the films is left out one is nearly always among them
EXACT = "donot_use_mm_for_euclid_dist"  # by matrix products a copy would not lie at exactly 0
CHUNK = 256  # rows and columns of a matrix of distances or kernels at a time, and films in float64


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets (Heusel et al. 2017, arXiv:1706.08500).

    |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64. With S = R^T R from the QR decomposition of the
    centred features, the eigenvalues of S_a S_b are the squared singular values of R_a R_b^T: no matrix square root,
    hence no imaginary part to drop and no ridge to add. The estimate is biased upwards, the more the fewer the films.

    Args:
        a, b: features, [N, D] and [M, D].

    Raises:
        Refused: with D films or fewer in a set, whose covariance would be singular.
    """
    a, b = (features.double() for features in _as_features(a, b))
    num_features = a.shape[1]
    if min(len(a), len(b)) <= num_features:
        raise Refused(
            f"{len(a)} and {len(b)} films for a Frechet distance over {num_features} features; expected more films "
            "than features in both sets; take more films, or the kernel distance, which needs only a few"
        )
    roots = [torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]  # [D, D]
    between_means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    traces = sum(root.square().sum() for root in roots)
    return max(0.0, (between_means + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()).item())


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the kernel distance of two sets and its standard error (Binkowski et al. 2018, arXiv:1801.01401).

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x y / D + 1)^3, over all films
    rather than over random subsets of them: it may be negative, and its mean over equal distributions is 0 whatever
    the number of films. The standard error is the jackknife's over the films of both sets, taken as independent;
    between equal distributions it is too large rather than too small (Efron and Stein 1981).

    Args:
        a, b: features, [N, D] and [M, D], three films at least each.
    """
    a, b = _as_features(a, b)
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise Refused(f"{n} and {m} films for a kernel distance; expected at least 3 in both sets")
    within_a, within_b = _kernel_sums(a, a) - _kernel_diagonal(a), _kernel_sums(b, b) - _kernel_diagonal(b)
    of_a, of_b = _kernel_sums(a, b), _kernel_sums(b, a)  # [N], [M]: each film's kernel with all of the other set
    sum_a, sum_b, across = within_a.sum(), within_b.sum(), of_a.sum()
    mean_a, mean_b = sum_a / (n * (n - 1)), sum_b / (m * (m - 1))
    without_a = (sum_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b - 2 * (across - of_a) / ((n - 1) * m)
    without_b = mean_a + (sum_b - 2 * within_b) / ((m - 1) * (m - 2)) - 2 * (across - of_b) / (n * (m - 1))
    variance = (n - 1) * without_a.var(unbiased=False) + (m - 1) * without_b.var(unbiased=False)
    return (mean_a + mean_b - 2 * across / (n * m)).item(), variance.sqrt().item()


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of each row of the kernel matrix [N, M], [N]."""
    from torchmetrics.image.kid import poly_kernel  # here, since generate.py wants neighbours alone

    return torch.cat([_blocks(poly_kernel, rows, b).sum(dim=1) for rows in a.split(CHUNK)])


def _kernel_diagonal(a: Tensor) -> Tensor:
    return torch.cat([(rows.double().square().mean(dim=1) + 1) ** 3 for rows in a.split(CHUNK)])


def nearest_neighbours(query: Tensor, reference: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance of each row of `query` to the nearest of `reference`, and its index.

    Args:
        query, reference: features, [N, D] and [M, D].
        groups: of rows of one and the same set, int [N]; the nearest of another group is looked for.

    Returns:
        float64 [N] and int64 [N]; of equally near ones the first. Infinite where there is no other group.
    """
    query, reference = _as_features(query, reference)
    found = []
    for start, rows in zip(range(0, len(query), CHUNK), query.split(CHUNK), strict=True):
        distances = _distances(rows, reference)
        if groups is not None:
            distances.masked_fill_(groups[start : start + CHUNK, None] == groups, torch.inf)
        found.append(distances.min(dim=1))
    return torch.cat([nearest.values for nearest in found]), torch.cat([nearest.indices for nearest in found])


def precision_recall(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Return how much of one set lies within the other: precision, recall, density and coverage.

    Balls about the films of a set reach to their k-th nearest neighbour in it, which lies outside. Precision and recall are the shares of
    generated films within a ball about a real one, and the reverse (Kynkaanniemi et al. 2019, arXiv:1904.06991).
    Density is the number of real balls about a generated film over k, coverage the share of real balls that hold a
    generated film (Naeem et al. 2020, arXiv:2002.09797). Between equal distributions density is near 1 and coverage
    near 1 - 2^-k; the other two depend on the number of films.

    Args:
        real, generated: features, [N, D] and [M, D], more than k films each.
        k: neighbours that span a ball.
    """
    real, generated = _as_features(real, generated)
    if min(len(real), len(generated)) <= k:
        raise Refused(
            f"{len(real)} and {len(generated)} films for balls of {k} neighbours; expected more than {k} each"
        )
    of_real, of_generated = _radii(real, k), _radii(generated, k)
    balls = torch.zeros(len(generated))  # about real films, that hold it
    within, covered = [], []
    for rows, radii in zip(real.split(CHUNK), of_real.split(CHUNK), strict=True):
        distances = _distances(rows, generated)  # [n, M]
        inside = distances < radii[:, None]
        balls += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        within.append((distances < of_generated).any(dim=1))
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": torch.cat(within).double().mean().item(),
        "density": balls.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each film to its k-th nearest neighbour but itself, [N]."""
    return torch.cat([_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(CHUNK)])


@dataclass(frozen=True)
class Memorisation:
    """How often a generated film lies nearer to a training film than to one that the model never saw.

    Attributes:
        probability: share of generated films nearer to training, ties counted half. 0.5: no sign of memorisation.
        interval: its 95 % interval over generated films and over real ones, within [0, 1].
        num_generated: films asked about.
        num_references: training films, and as many held-out films, that it was asked of.
    """

    probability: float
    interval: tuple[float, float]
    num_generated: int
    num_references: int


def memorisation(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    seed: int,
    train_patients: Sequence[str] | None = None,
    held_out_patients: Sequence[str] | None = None,
) -> Memorisation:
    """Compare the distances of generated films to training films and to held-out films.

    As many of each are asked, by chance, one film a patient: the nearest of more films is nearer, and so is the nearest
    of as many films of more patients.

    Args:
        generated, train, held_out: features, [N, D] each with its own N.
        seed: of that choice and of the bootstrap.
        train_patients, held_out_patients: whose film it is, [N]; without them every film is its own patient.
    """
    if not min(len(generated), len(train), len(held_out)):
        raise Refused("no generated, training or held-out film: memorisation cannot be asked about")
    chance = np.random.default_rng(seed)
    orders = [chance.permutation(len(films)) for films in (train, held_out)]
    firsts = [
        order if patients is None else order[np.unique(np.asarray(patients)[order], return_index=True)[1]]
        for order, patients in zip(orders, (train_patients, held_out_patients), strict=True)
    ]
    size = min(map(len, firsts))
    kept = [torch.from_numpy(np.sort(chance.permutation(first)[:size])) for first in firsts]
    to_train, to_held_out = (
        _sorted_neighbours(generated, part[places]) for part, places in zip((train, held_out), kept, strict=True)
    )
    probability = float(_share_nearer(to_train[0][:, 0], to_held_out[0][:, 0]).mean())
    error = _half_sample_error(to_train, to_held_out, size, chance)
    return Memorisation(
        probability=probability,
        interval=(max(0.0, probability - 1.96 * error), min(1.0, probability + 1.96 * error)),
        num_generated=len(generated),
        num_references=size,
    )


def _sorted_neighbours(query: Tensor, reference: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and places of the nearest NEIGHBOURS_KEPT of `reference` to each row, nearest first, [N, NEIGHBOURS_KEPT]."""
    query, reference = _as_features(query, reference)
    count = min(NEIGHBOURS_KEPT, len(reference))
    found = [_distances(rows, reference).topk(count, dim=1, largest=False) for rows in query.split(CHUNK)]
    return torch.cat([near.values for near in found]).numpy(), torch.cat([near.indices for near in found]).numpy()


def _share_nearer(to_train: np.ndarray, to_held_out: np.ndarray) -> np.ndarray:
    """Return 1 where a film is nearer to training, 0 where it is not, and a half where it is as near to both."""
    return (to_train < to_held_out) + 0.5 * (to_train == to_held_out)


def _half_sample_error(
    to_train: tuple[np.ndarray, np.ndarray],
    to_held_out: tuple[np.ndarray, np.ndarray],
    size: int,
    chance: np.random.Generator,
    num_resamples: int = 500,
) -> float:
    """Return the standard error of the share nearer to training: generated films drawn anew, and half of the real ones.

    Which real films there are moves the share, too, and a bootstrap of them would give each film itself for a neighbour
    twice. A half of them drawn without replacement spreads about the whole as the whole about the truth (the delete-half
    jackknife, Shao and Wu 1989).
    """
    shares = []
    for _ in range(num_resamples):
        distances = []
        for near, places in (to_train, to_held_out):
            kept = np.zeros(size, dtype=bool)
            kept[chance.permutation(size)[: (size + 1) // 2]] = True
            first = kept[places].argmax(axis=1)  # at most one in 2^NEIGHBOURS_KEPT films has no neighbour left
            distances.append(near[np.arange(len(near)), first])
        drawn = chance.integers(len(distances[0]), size=len(distances[0]))
        shares.append(_share_nearer(*distances)[drawn].mean())
    return float(np.std(shares, ddof=1))


def auroc(
    scores: Sequence[float],
    labels: Sequence[bool],
    groups: Sequence[str],
    seed: int,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, tuple[float, float]]:
    """Return the area under the ROC curve and its percentile bootstrap interval, resampling patients.

    Args:
        scores: one number a film, higher where the finding is more likely.
        labels: whether it is there.
        groups: the patient of each film; films of one patient are drawn together.
        seed: of the resampling.
        num_resamples: draws of as many patients as there are; those without both labels are left out.
        level: probability mass of the interval.

    Returns:
        The area, NaN where one label is missing, and lower and upper end, NaN also for a single patient.
    """
    from sklearn.metrics import roc_auc_score  # here, since generate.py wants neighbours alone

    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    nothing = float("nan"), float("nan")
    if labels.all() or not labels.any():
        return float("nan"), nothing
    area = float(roc_auc_score(labels, scores))
    _, patient = np.unique(np.asarray(groups), return_inverse=True)
    num_patients = patient.max() + 1
    if num_patients < 2:
        return area, nothing
    chance = np.random.default_rng(seed)
    counts = chance.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_resamples)
    areas = weighted_auroc(scores, labels, counts[:, patient])
    lower, upper = np.nanquantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return area, (float(lower), float(upper))


def weighted_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve for many weightings of the same films, NaN without weight on both labels.

    The probability that a positive scores above a negative, ties counted half (Hanley and McNeil 1982). scikit-learn
    sorts anew for every weighting, at 2 ms each.

    Args:
        scores: float [N].
        labels: bool [N].
        weights: [R, N], how often each film counts in each weighting.

    Returns:
        float64 [R].
    """
    order = scores.argsort(kind="stable")
    _, starts = np.unique(scores[order], return_index=True)  # of each run of equal scores
    positive, negative = (
        np.add.reduceat(weights[:, order] * chosen[order], starts, axis=1, dtype=np.float64)
        for chosen in (labels, ~labels)
    )  # [R, number of different scores]
    below = negative.cumsum(axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _distances(rows: Tensor, reference: Tensor) -> Tensor:
    """Return Euclidean distances, float64 [n, M]; a copy lies at exactly 0."""
    return _blocks(partial(torch.cdist, compute_mode=EXACT), rows, reference)


def _blocks(compare: Callable[[Tensor, Tensor], Tensor], rows: Tensor, reference: Tensor) -> Tensor:
    """Return `compare` of each row with each of `reference`, [n, M], in float64, of which no whole set is ever copied."""
    return torch.cat([compare(rows.double(), part.double()) for part in reference.split(CHUNK)], dim=1)


def _as_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two sets of features on the CPU, as precise as they came."""
    a, b = (torch.as_tensor(x).detach().cpu() for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {list(a.shape)} and {list(b.shape)}; expected [N, D] and [M, D]")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features that are not finite")
    return a, b
