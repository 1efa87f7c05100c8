"""Loss weights where test_defects.py does not look. Hermetic."""

import pytest
from diffusers import DDPMScheduler

from utils.diffusion import min_snr_weights


def test_gamma_zero_weighs_all_timesteps_alike() -> None:
    assert (min_snr_weights(DDPMScheduler().alphas_cumprod, 0, "epsilon") == 1).all()


def test_another_prediction_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample"):
        min_snr_weights(DDPMScheduler().alphas_cumprod, 5.0, "sample")
