"""Loss weights against their definition and against diffusers' own arithmetic. Hermetic."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from utils.diffusion import min_snr_weights


@pytest.mark.parametrize(("prediction_type", "shift"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_weights_are_the_papers(prediction_type: str, shift: int) -> None:
    scheduler = DDPMScheduler()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    weights = min_snr_weights(scheduler.alphas_cumprod, 5.0, prediction_type)
    torch.testing.assert_close(weights, (snr.clamp(max=5.0) / (snr + shift)).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_finite_at_zero_terminal_snr(prediction_type: str) -> None:
    alphas_cumprod = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.clone()
    alphas_cumprod[-1] = 0
    assert min_snr_weights(alphas_cumprod, 5.0, prediction_type).isfinite().all()


def test_gamma_zero_weighs_all_timesteps_alike() -> None:
    assert (min_snr_weights(DDPMScheduler().alphas_cumprod, 0, "epsilon") == 1).all()


def test_another_prediction_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample"):
        min_snr_weights(DDPMScheduler().alphas_cumprod, 5.0, "sample")
