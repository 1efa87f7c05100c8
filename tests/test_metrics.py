"""Image metrics against their definitions, and intervals against what they must do. Hermetic."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from utils.metrics import bootstrap_interval, in_batches, ms_ssim, mse, num_scales, psnr, ssim


def films(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 48, 48), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference_ssim(film: np.ndarray, reference: np.ndarray) -> float:
    """Wang et al. 2004, Eq. 13, window by window: Gaussian of sigma 1.5 on 11 x 11, population moments."""
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    values, (c1, c2) = [], (0.01**2, 0.03**2)
    for top in range(film.shape[0] - 10):
        for left in range(film.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] / 255.0 for image in (film, reference))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * x * x).sum() - mean_x**2, (window * y * y).sum() - mean_y**2
            covariance = (window * x * y).sum() - mean_x * mean_y
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            values.append(luminance * (2 * covariance + c2) / (var_x + var_y + c2))
    return float(np.mean(values))


def test_ssim_is_wangs_definition_film_by_film() -> None:
    ours, others = films(0), (films(0).int() // 2 + films(1).int() // 3).to(torch.uint8)
    expected = [reference_ssim(a.numpy(), b.numpy()) for a, b in zip(ours, others, strict=True)]
    assert ssim(ours, others).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_and_psnr_are_scikit_images() -> None:
    """Of scikit-image 0.26.0: structural_similarity(film / 255, noisy / 255, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1.0) and peak_signal_noise_ratio(film, noisy, data_range=255).
    """
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8))
    film = np.array(rough.resize((96, 96), Image.Resampling.BICUBIC))
    noisy = (
        (film + np.random.default_rng(9).normal(0, 20, film.shape).round().astype(int)).clip(0, 255).astype(np.uint8)
    )
    film, noisy = torch.from_numpy(film)[None], torch.from_numpy(noisy)[None]
    assert ssim(film, noisy).item() == pytest.approx(0.6826091427289429, abs=1e-5)
    assert psnr(film, noisy).item() == pytest.approx(22.288821839104997, abs=1e-4)


def test_ssim_of_unrelated_films_is_low_and_of_equal_ones_is_one() -> None:
    """A data range of 255 on films in [0, 1] would give 0.99 for both."""
    assert ssim(films(0), films(1)).max() < 0.1
    assert ssim(films(0), films(0)).tolist() == pytest.approx([1, 1])


def test_psnr_and_mse_are_their_definitions() -> None:
    dark = torch.full((1, 16, 16), 100, dtype=torch.uint8)
    light = dark + 51  # a fifth of the range
    assert mse(dark, light).item() == pytest.approx(0.04)
    assert psnr(dark, light).item() == pytest.approx(-10 * math.log10(0.04), abs=1e-4)


def test_psnr_of_equal_films_is_finite() -> None:
    assert 80 < psnr(films(0), films(0)).min() < 90


def test_metrics_refuse_anything_but_8_bit() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ssim(films(0).float(), films(1).float())


def test_bootstrap_by_patient_is_wider_than_by_film_where_patients_repeat() -> None:
    """Ten copies of a patient's film say no more than one."""
    values = np.random.default_rng(0).normal(size=20)
    repeated, patients = np.repeat(values, 10), np.repeat(np.arange(20), 10).astype(str)
    by_patient = bootstrap_interval(repeated, patients, seed=0)
    by_film = bootstrap_interval(repeated, [str(i) for i in range(200)], seed=0)
    assert by_patient[1] - by_patient[0] > 2 * (by_film[1] - by_film[0])
    assert by_patient == pytest.approx(bootstrap_interval(values, [str(i) for i in range(20)], seed=0), abs=1e-9)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(size=40), [str(i) for i in range(40)], trial, 500)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_patient_says_nothing() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([0.1, 0.2], ["a", "a"], seed=0))


def reference_ms_ssim(film: np.ndarray, reference: np.ndarray, weights: list[float]) -> float:
    """Wang et al. 2003, Eq. 7: contrast and structure at every scale, luminance at the coarsest alone, edges mirrored."""
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    x, y, (c1, c2), product = film / 255.0, reference / 255.0, (0.01**2, 0.03**2), 1.0
    for scale, weight in enumerate(weights):
        luminances, contrasts = [], []
        last = scale == len(weights) - 1
        padded = [np.pad(image, 5, mode="reflect") if last else image for image in (x, y)]
        for top in range(padded[0].shape[0] - 10):
            for left in range(padded[0].shape[1] - 10):
                a, b = (image[top : top + 11, left : left + 11] for image in padded)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                covariance = (window * a * b).sum() - mean_a * mean_b
                contrasts.append((2 * covariance + c2) / (var_a + var_b + c2))
                luminances.append((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1))
        value = np.mean(np.multiply(luminances, contrasts)) if last else np.mean(contrasts)
        product *= max(value, 0.0) ** weight
        x, y = (image.reshape(len(image) // 2, 2, len(image) // 2, 2).mean(axis=(1, 3)) for image in (x, y))
    return float(product)


def test_ms_ssim_is_wangs_definition_on_the_scales_that_fit() -> None:
    ours, others = films(0), (films(0).int() // 2 + films(1).int() // 3).to(torch.uint8)
    assert [num_scales(side) for side in (11, 20, 21, 48, 96, 128, 175, 176, 512)] == [1, 1, 2, 3, 3, 4, 4, 5, 5]
    weights = [0.0448, 0.2856, 0.3001]
    weights = [weight / sum(weights) for weight in weights]
    expected = [reference_ms_ssim(a.numpy(), b.numpy(), weights) for a, b in zip(ours, others, strict=True)]
    assert ms_ssim(ours, others).tolist() == pytest.approx(expected, abs=1e-4)
    assert ms_ssim(ours, ours).tolist() == pytest.approx([1, 1])
    assert ms_ssim(ours[:1], others[:1]).shape == (1,), "one film is a batch, too"
    assert in_batches(ms_ssim, ours, others, 1).tolist() == pytest.approx(ms_ssim(ours, others).tolist())


@pytest.mark.parametrize("side", [11, 22, 41, 43, 64, 81, 96, 98, 128, 160, 161, 175, 192])
def test_ms_ssim_takes_films_of_any_size(side: int) -> None:
    blank = torch.zeros(1, side, side, dtype=torch.uint8)
    assert ms_ssim(blank, blank).tolist() == [1.0]
