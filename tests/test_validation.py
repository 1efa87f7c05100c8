"""Scores on real films: deterministic, shareable between processes, and right for models whose answer is known."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from utils.images import to_films, to_grey
from utils.latents import cache_posteriors
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.validation import (
    STRENGTHS,
    eval_mode,
    film_bank,
    noise_levels,
    rebuild,
    score_bounds,
    score_model,
    summarise,
)


@pytest.fixture(scope="module")
def setting(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    base, rows = load_base(str(tiny_base)), read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, base.vae, tmp_path_factory.mktemp("cache"), 64)
    places = [2, 5, 9, 20, 33]
    ids = base.tokenizer([rows[i]["text"] for i in places], padding="max_length", return_tensors="pt").input_ids
    bank = film_bank(tiny_data, [rows[i] for i in places], cached, places, ids, base.vae.config.scaling_factor, 64)
    return base, bank


def score(base, bank, indices=None, batch_size=2):
    with eval_mode(base.unet, base.text_encoder):
        return score_model(bank, base.unet, base.text_encoder, base.vae, base.noise_scheduler, batch_size, indices)


def test_scores_repeat_and_leave_the_random_state_alone(setting) -> None:
    base, bank = setting
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = score(base, bank)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = score(base, bank)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shares_of_processes_add_up(setting) -> None:
    base, bank = setting
    whole = score(base, bank, batch_size=1)
    shares = [score(base, bank, range(start, len(bank), 2), batch_size=1) for start in (0, 1)]
    for name, values in whole.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_model_that_knows_the_noise_rebuilds_the_film(prediction_type: str, strength: float) -> None:
    """Also a check of the timesteps: any slip of one between noising and the first step shows here."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    alphas = scheduler.alphas_cumprod

    def oracle(sample, timestep, encoder_hidden_states):
        eps = (sample - alphas[timestep] ** 0.5 * latents) / (1 - alphas[timestep]) ** 0.5
        velocity = alphas[timestep] ** 0.5 * eps - (1 - alphas[timestep]) ** 0.5 * latents
        return SimpleNamespace(sample=eps if prediction_type == "epsilon" else velocity)

    rebuilt = rebuild(oracle, scheduler, latents, noise, torch.zeros(2, 77, 8), strength)
    torch.testing.assert_close(rebuilt, latents, rtol=0, atol=1e-3)


def test_the_error_of_a_model_that_says_nothing_is_the_power_of_the_noise(setting) -> None:
    base, bank = setting

    class Silent(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            return SimpleNamespace(sample=torch.zeros_like(sample))

    silent = Silent()
    scores = score_model(bank, silent, base.text_encoder, base.vae, base.noise_scheduler, 2)
    power = bank.noise(range(len(bank))).square().mean(dim=(1, 2, 3)).double()
    for level in noise_levels(base.noise_scheduler):
        torch.testing.assert_close(scores[f"mse/{level}"], power)


def test_bounds_are_what_their_names_say(setting) -> None:
    base, bank = setting
    bounds = score_bounds(bank, base.vae, base.noise_scheduler, bank.films[0], batch_size=2)
    assert bounds["ssim/mean_film"][0] == pytest.approx(1)  # the "mean" is the first film here
    assert bounds["ssim/mean_film"][1] < 0.9
    assert set(bounds) == {
        f"{metric}/{name}"
        for metric in ("ssim", "psnr")
        for name in ("ceiling", "mean_film", *(f"noisy/{strength}" for strength in STRENGTHS))
    }


def test_noise_belongs_to_the_film(setting) -> None:
    _, bank = setting
    assert torch.equal(bank.noise([3, 1])[1], bank.noise([1])[0])
    assert not torch.equal(bank.noise([3])[0], bank.noise([1])[0])


def test_summaries_are_means_with_the_headline_in_front(setting) -> None:
    base, bank = setting
    scores = score(base, bank)
    summary = summarise(scores)
    assert summary["ssim"] == pytest.approx(scores["ssim/0.5"].mean().item())
    assert summary["mse"] == pytest.approx(sum(summary["mse_by_timestep"].values()) / 10)
    assert "bounds" not in summary


def test_eval_mode_restores_what_was(setting) -> None:
    base, _ = setting
    base.unet.train()
    base.text_encoder.eval()
    with pytest.raises(RuntimeError), eval_mode(base.unet, base.text_encoder):
        assert not base.unet.training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert base.unet.training
    assert not base.text_encoder.training


def test_grey_is_pillows_grey_to_the_bit() -> None:
    """So that a film from our decoder is the film of a stock pipeline."""
    from PIL import Image

    pixel_values = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    stock = ((pixel_values / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    for ours, array in zip(to_films(pixel_values), stock, strict=True):
        assert torch.equal(ours, to_grey(Image.fromarray(array)))
