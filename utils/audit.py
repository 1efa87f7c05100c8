"""Does a model give back the films it was trained on? Asked of generated films, films at hand, and films it never saw.

A model that only learnt what chest films look like draws films as near to patients it was trained on as to others: the
share of generated films that lie nearer to training is 0.5, whatever the features. A film that its own caption brings
back is nearer to training for sure. Copies of films that were not asked for show as near copies, among all training
films. The same is asked in the encoder's features, where films of like patients are near, and in pixels, where
copies are.
"""

import numpy as np
import torch
from torch import Tensor

from utils.distances import memorisation, nearest_neighbours
from utils.release import verdict


def audit(
    generated: dict[str, Tensor],
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    all_train: dict[str, Tensor],
    all_held_out: dict[str, Tensor],
    seed: int,
) -> dict:
    """Audit generated films in each space that films were measured in.

    Args:
        generated: features by space, [2 M, D] each, of a film from the caption of each of the real ones: neither side is
            then nearer for what its captions say, and a caption that brings its own film back is asked for it.
        train, held_out: the same of real films, one each of as many patients, [M, D].
        all_train, all_held_out: of as many films of those sides as there are, [N, D] each.
        seed: of the resampling.

    Returns:
        As in `metrics.json`: by space `probability`, its 95 % `interval` and `near_copies`, the share of generated films
        nearer to a training film than 99 % of held-out films are (0.01 is expected of films as varied as those, more of
        plainer ones); then `generated`, `references` and `training_films`, the numbers 2 M, M and N, and the `verdict`.
    """
    record: dict = {}
    for space, films in generated.items():
        found = memorisation(films, train[space], held_out[space], seed)
        of_held_out, _ = nearest_neighbours(all_held_out[space], all_train[space])
        of_generated, _ = nearest_neighbours(films, all_train[space])
        record[space] = {
            "probability": found.probability, "interval": list(found.interval),
            "near_copies": (of_generated < of_held_out.quantile(0.01)).double().mean().item(),
        }  # fmt: skip
        record |= {"generated": found.num_generated, "references": found.num_references}
        record |= {"training_films": len(all_train[space])}
    intervals = [record[space]["interval"] for space in generated]
    return record | {"verdict": verdict(record["references"], record["generated"], intervals)}


def suspects(generated: Tensor, train: Tensor, held_out: Tensor, count: int) -> list[tuple[int, int, float]]:
    """Return the generated films that lie nearest to training for how far they are from held-out films.

    Args:
        generated, train, held_out: features, [N, D], [M, D], [K, D].
        count: how many.

    Returns:
        (generated film, nearest training film, distance to it over that to the nearest held-out film), smallest ratio
        first. A copy is at 0; that of another film is the smaller, the more training films there are for each held-out.
    """
    to_train, nearest = nearest_neighbours(generated, train)
    to_held_out, _ = nearest_neighbours(generated, held_out)
    ratios = torch.nan_to_num(to_train / to_held_out, nan=1.0)  # as near to both as can be
    order = np.argsort(ratios.numpy(), kind="stable")[:count]
    return [(int(i), int(nearest[i]), float(ratios[i])) for i in order]
