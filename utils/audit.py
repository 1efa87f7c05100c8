"""Does a model give back the films it was trained on? Asked of generated films, films at hand, and films it never saw.

A model that only learnt what chest films look like draws films as near to patients it was trained on as to others. The
share of generated films that lie nearer to training is then 0.5, whatever the features; each copy adds a half of one
film to it. The same is asked in the encoder's features, where films of like patients are near, and in pixels, where
copies are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.distances import memorisation, nearest_neighbours

LEAST_FILMS = 500  # of training patients and of held-out ones, one each, below which nothing is said
HIGHEST_SHARE = 0.6  # that the upper end of an interval may reach: a fifth of the films copies
TOO_FEW, PASSED, FAILED = "too few films to say", "no sign of memorisation", "memorisation"


def audit(
    generated: dict[str, Tensor],
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    seed: int,
) -> dict:
    """Audit generated films in each space that films were measured in.

    Args:
        generated: features by space, [2 M, D] each, of a film from the caption of each of the real ones: neither side is
            then nearer for what its captions say, and a caption that brings its own film back is asked for it.
        train, held_out: the same of real films, one each of as many patients, [M, D].
        seed: of the bootstrap.

    Returns:
        As in `metrics.json`: by space `probability` and its 95 % `interval`, then `generated`, `references`, which are
        the numbers 2 M and M, and the `verdict`.
    """
    found = {space: memorisation(films, train[space], held_out[space], seed) for space, films in generated.items()}
    record: dict = {
        space: {"probability": of.probability, "interval": list(of.interval)} for space, of in found.items()
    }
    num_references, num_generated = (
        min(getattr(of, name) for of in found.values()) for name in ("num_references", "num_generated")
    )
    upper_ends = [of.interval[1] for of in found.values()]
    return record | {
        "generated": num_generated, "references": num_references,
        "verdict": verdict(num_references, num_generated, upper_ends),
    }  # fmt: skip


def verdict(num_references: int, num_generated: int, upper_ends: Sequence[float]) -> str:
    """Return what an audit of so many films may say, the upper ends of all intervals deciding."""
    if min(num_references, num_generated) < LEAST_FILMS:
        return TOO_FEW
    return PASSED if max(upper_ends) <= HIGHEST_SHARE else FAILED


def suspects(generated: Tensor, train: Tensor, held_out: Tensor, count: int) -> list[tuple[int, int, float]]:
    """Return the generated films that lie nearest to training for how far they are from all other films.

    Args:
        generated, train, held_out: features, [N, D], [M, D], [K, D].
        count: how many.

    Returns:
        (generated film, nearest training film, distance to it over that to the nearest held-out film), smallest ratio
        first: a copy is at 0, and what was not memorised is about 1.
    """
    to_train, nearest = nearest_neighbours(generated, train)
    to_held_out, _ = nearest_neighbours(generated, held_out)
    ratios = torch.nan_to_num(to_train / to_held_out, nan=1.0)  # as near to both as can be
    order = np.argsort(ratios.numpy(), kind="stable")[:count]
    return [(int(i), int(nearest[i]), float(ratios[i])) for i in order]
