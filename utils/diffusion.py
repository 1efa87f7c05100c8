"""Arithmetic of the diffusion process that the training script calls by name."""

import torch
from torch import Tensor


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weight of every timestep under Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, Sec. 3.4).

    The weight of the clean-image loss is min(SNR, gamma); expressed on the loss of the noise it is divided by SNR, on
    the loss of the velocity by SNR + 1. Both are finite at zero SNR (a zero-terminal schedule).

    Args:
        alphas_cumprod: signal fraction of the noise schedule, in [0, 1], [T].
        gamma: SNR above which a timestep stops gaining weight; the paper uses 5. 0 weighs all timesteps alike.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".

    Returns:
        float32, [T].

    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {prediction_type!r}; expected 'epsilon' or 'v_prediction'")
    alphas_cumprod = alphas_cumprod.double()
    if gamma == 0:
        return torch.ones_like(alphas_cumprod).float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0).float()  # min(snr, gamma) / snr without 0 / 0
    return (snr.clamp(max=gamma) / (snr + 1)).float()
