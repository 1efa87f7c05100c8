"""Does a model give back the films it was trained on? Asked of generated films, films at hand, and films it never saw.

A model that only learnt what chest films look like draws films as near to patients it was trained on as to others: the
share of generated films that lie nearer to training is 0.5, whatever the features. A film that its own caption brings
back is nearer to training for sure. Copies of films that were not asked for show as near copies, among all training films, and a
single film that comes back as it was as a copy. The same is asked in the encoder's features, where films of like patients are near, and in pixels, where
copies are.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from utils.distances import auroc, memorisation, nearest_neighbours
from utils.folds import MIN_CORRELATION
from utils.release import verdict

COPY_QUANTILE = 0.01  # of held-out films that are nearer to training than a near copy
LEAST_CAPTIONS = 10  # of training and of others
NOISES = 4  # that a caption's pull is the mean over


def audit(
    generated: dict[str, Tensor],
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    all_train: dict[str, Tensor],
    all_held_out: dict[str, Tensor],
    patients: Sequence[str],
    num_patients: int,
    seed: int,
    num_unmeasured: int = 0,
) -> dict:
    """Audit generated films in each space that films were measured in.

    Args:
        generated: by space, "features" and "pixels", [2 M, D] each, of a film from the caption of each of the real ones: neither side is
            then nearer for what its captions say, and a caption that brings its own film back is asked for it.
        train, held_out: the same of real films, one each of as many patients, [M, D].
        all_train, all_held_out: of as many films of those sides as there are, [N, D] and [K, D].
        patients: of all those held-out films, [K].
        num_patients: of either side that there are, also where fewer are measured.
        seed: of the resampling.
        num_unmeasured: training films that are not in `all_train`.

    Returns:
        As in `metrics.json`: by space `probability` and its 95 % `interval`; `near_copies`, as `is_near_copy` tells them, a share
        of the generated films with its `near_copies_interval` (Wilson 1927), and `near_copies_expected`, the most that is
        expected without memorisation; then `copies`, as `count_copies` counts them in pixels, `generated`, `references` and
        `training_films`, the numbers 2 M, M and N, `unmeasured`, and the `verdict`.
    """
    num_held_out = len(patients)
    record: dict = {}
    for space, films in generated.items():
        found = memorisation(films, train[space], held_out[space], seed)
        copies = is_near_copy(films, all_train[space], all_held_out[space], patients)
        ends = binomtest(int(copies.sum()), len(copies)).proportion_ci(method="wilson")
        record[space] = {
            "probability": found.probability, "interval": list(found.interval),
            "near_copies": copies.double().mean().item(), "near_copies_interval": list(ends),
            # Of exchangeable films so many are below that quantile, which lies between two of few held-out films
            "near_copies_expected": (1 + COPY_QUANTILE * (num_held_out - 1)) / (num_held_out + 1),
        }  # fmt: skip
        record |= {"generated": found.num_generated, "references": found.num_references}
        record |= {"training_films": len(all_train[space])}
    found_in = [record[space] for space in generated]
    record["copies"] = count_copies(generated["pixels"], all_train["pixels"], all_held_out["pixels"])
    record |= {"unmeasured": num_unmeasured}
    found = verdict(record["references"], num_patients, found_in, record["copies"], num_unmeasured)
    return record | {"verdict": found}


def count_copies(films: Tensor, originals: Tensor, others: Tensor) -> int:
    """Return how many films are one of `originals`, with what an autoencoder does to it.

    They correlate with it beyond 0.99, where download.py takes two films for one, and beyond what any of `others` does. Of 360
    and of 599 real films no two correlate beyond 0.98, not even of one patient, and each with its round trip beyond 0.999.

    Args:
        films, originals, others: thumbnails as `images.thumbnails` returns them, [N, D], [M, D], [K, D].
    """

    def correlations(rows: Tensor) -> Tensor:
        _, nearest = nearest_neighbours(rows, originals)
        return (rows * originals[nearest]).sum(dim=1) / (rows.shape[1] - 1)  # of a blank film 0

    bar = max(MIN_CORRELATION, correlations(others).max().item())
    return int((correlations(films) > bar).sum())


def is_near_copy(generated: Tensor, train: Tensor, held_out: Tensor, patients: Sequence[str]) -> Tensor:
    """Return which films are nearer to training than 99 % of held-out films are, bool [N].

    And nearer also for how far they are from held-out films, where those are measured by their distance to others of other
    patients: a plain film is near to everything.

    Args:
        generated, train, held_out: features, [N, D], [M, D], [K, D].
        patients: whose the held-out films are, [K].
    """
    _, whose = np.unique(np.asarray(patients), return_inverse=True)
    of_generated, of_held_out = (nearest_neighbours(films, train)[0] for films in (generated, held_out))
    to_others, _ = nearest_neighbours(held_out, held_out, torch.from_numpy(whose))
    ratios = torch.nan_to_num(of_generated / nearest_neighbours(generated, held_out)[0], nan=1.0)
    usual = torch.nan_to_num(of_held_out / to_others, nan=1.0)  # 0 / 0: as near to both as can be
    return (of_generated < of_held_out.quantile(COPY_QUANTILE)) & (ratios < usual.quantile(COPY_QUANTILE))


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


@torch.no_grad()
def caption_pull(
    unet: Callable, text_encoder: Callable, input_ids: Tensor, empty_ids: Tensor, latent_shape: Sequence[int],
    timestep: int, batch_size: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """Return how far each caption moves the prediction from pure noise, the mean over four noises, float64 [N].

    |f(x_T, c) - f(x_T, "")| (Wen et al. 2024, arXiv:2407.21720). A caption that was learnt by heart settles the film before
    anything can be seen of it, and pulls harder than captions that the model never saw.

    Args:
        unet, text_encoder: the models; f is what the UNet predicts, noise or velocity.
        input_ids, empty_ids: tokens of the captions [N, L] and of the empty one [1, L].
        latent_shape: (C, h, w).
        timestep: the schedule's last.
        batch_size: captions at a time.
        device: of the models.
    """
    noises = torch.randn(NOISES, 1, *latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    empty = text_encoder(empty_ids.to(device))[0]
    without = [unet(noise, timestep, empty).sample.float() for noise in noises]
    pulls = []
    for ids in input_ids.split(batch_size):
        hidden = text_encoder(ids.to(device))[0]
        apart = [
            (unet(noise.expand(len(ids), -1, -1, -1), timestep, hidden).sample.float() - of_none)
            .flatten(1)
            .norm(dim=1)
            for noise, of_none in zip(noises, without, strict=True)
        ]
        pulls.append(torch.stack(apart).mean(dim=0).double().cpu())
    return torch.cat(pulls)


def compare_pulls(train: Tensor, held_out: Tensor, seed: int) -> dict | None:
    """Compare the pull of captions that training saw with that of captions it never saw.

    Args:
        train, held_out: pulls of different captions, [N] and [M].
        seed: of the bootstrap.

    Returns:
        `training` and `held_out`, the numbers N and M; `probability` that a caption of training pulls harder, with its
        95 % `interval` by caption (0.5: no sign). None for fewer than LEAST_CAPTIONS of either.
    """
    if min(len(train), len(held_out)) < LEAST_CAPTIONS:
        return None
    scores, trained = torch.cat([train, held_out]).tolist(), [True] * len(train) + [False] * len(held_out)
    area, ends = auroc(scores, trained, [str(i) for i in range(len(scores))], seed)
    return {"training": len(train), "held_out": len(held_out), "probability": area, "interval": list(ends)}
