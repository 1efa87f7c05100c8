"""Image metrics by film, and what their differences are worth: tensors and lists in, numbers out.

Every film is 8-bit grey. SSIM is that of Wang et al. 2004 (IEEE TIP 13(4), Eq. 13) with its Gaussian window (sigma
1.5, 11 x 11) on [0, 1] with a data range of 1: a data range of 255 there makes two unrelated films score 0.99.

torchmetrics brings matplotlib along, a sixth of what generate.py would import: it is imported where films are scored.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

WINDOW = 11  # pixels
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest scale first


def ssim(films: Tensor, references: Tensor) -> Tensor:
    """Return the structural similarity of each film with its reference.

    Args:
        films, references: uint8 [B, H, W], from 11 pixels a side.

    Returns:
        float32 [B], in [-1, 1].
    """
    return ssim_of_grey(_unit(films), _unit(references))


def ssim_of_grey(images: Tensor, references: Tensor) -> Tensor:
    """Return the structural similarity of images with their references, differentiable, float32 [B], in [-1, 1].

    Averaged over the windows that lie wholly inside the film, as the paper and scikit-image do; torchmetrics' own
    average counts windows on a reflected border too, which differ by up to 0.01.

    Args:
        images, references: grey values about [0, 1], float32 [B, 1, H, W], from 11 pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, maps = structural_similarity_index_measure(
        images, references, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )  # maps: [B, 1, H, W]
    border = WINDOW // 2
    return maps[..., border:-border, border:-border].mean(dim=(1, 2, 3))


def num_scales(side: int) -> int:
    """Return how many of the five scales of MS-SSIM fit films of that side.

    At half the side each time the window has to fit; torchmetrics also asks for side // (n - 1)^2 > 10.
    """
    return max(
        n
        for n in range(1, len(SCALE_WEIGHTS) + 1)
        if n == 1 or (side > (WINDOW - 1) * 2 ** (n - 1) and side // (n - 1) ** 2 > WINDOW - 1)
    )


def ms_ssim(films: Tensor, references: Tensor) -> Tensor:
    """Return the multi-scale structural similarity of each film with its reference (Wang et al. 2003, Asilomar, Eq. 7).

    Films of less than 176 pixels carry fewer than its five scales; the weights of those that fit then add up to 1, and
    figures compare with others of the same size only. At the coarsest scale windows on mirrored edges count, as
    torchmetrics has it.

    Args:
        films, references: uint8 [B, H, W].

    Returns:
        float32 [B], in [0, 1].
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = SCALE_WEIGHTS[: num_scales(min(films.shape[1:]))]
    return multiscale_structural_similarity_index_measure(
        _unit(films), _unit(references), sigma=1.5, data_range=1.0, normalize="relu", reduction="none",
        betas=tuple(weight / sum(weights) for weight in weights),
    ).flatten()  # fmt: skip


def mse(films: Tensor, references: Tensor) -> Tensor:
    """Return the mean squared difference of grey values in [0, 1], both uint8 [B, H, W], float32 [B]."""
    return (_unit(films) - _unit(references)).square().mean(dim=(1, 2, 3))


def psnr(films: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, both uint8 [B, H, W], float32 [B].

    Equal films would score infinity; they score that of an error of half a grey level in one pixel of a thousand
    (84 dB) instead, so that means stay finite.
    """
    smallest = (0.5 / 255) ** 2 / 1000
    return -10 * mse(films, references).clamp(min=smallest).log10()


def _unit(films: Tensor) -> Tensor:
    if films.dtype != torch.uint8:
        raise ValueError(f"films of type {films.dtype}; expected uint8")
    return films[:, None].float() / 255


def in_batches(
    metric: Callable[[Tensor, Tensor], Tensor], films: Tensor, references: Tensor, batch_size: int = 16
) -> Tensor:
    """Return a metric of many films, a batch at a time: five copies of each are made on the way."""
    pairs = zip(films.split(batch_size), references.split(batch_size), strict=True)
    return torch.cat([metric(*pair) for pair in pairs])


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[str], seed: int, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over films, resampling patients (Efron 1979; clusters stay whole).

    Args:
        values: one number a film.
        groups: the patient of each film; films of one patient are drawn together.
        seed: of the resampling.
        num_resamples: draws of as many patients as there are.
        level: probability mass of the interval.

    Returns:
        Lower and upper end. With a single patient both are NaN: nothing can be said.
    """
    _, patient = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(patient, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(patient)
    if len(counts) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(counts), size=(num_resamples, len(counts)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
