"""Scores of a model on real films that repeat to the last digit: by noise level, film by film, beside what bounds them.

A film is not compared with a free sample of its caption: two unrelated real films score 0.62 in SSIM, so that would
be noise. It is compared with itself, rebuilt from a known amount of noise (SDEdit, Meng et al. 2022, arXiv:2108.01073)
by a deterministic sampler (DDIM, Song et al. 2021, arXiv:2010.02502). Noise depends on the film alone: checkpoints,
folds and bases are compared at equal noise, and their differences can be paired by film.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from utils.folds import patient_of
from utils.images import to_films
from utils.latents import FilmDataset, Posteriors, load_films
from utils.metrics import psnr, ssim
from utils.seeding import derive_seed

NUM_LEVELS = 10  # timesteps of the noise-prediction error: the middles of ten equal bins
STRENGTHS = (0.3, 0.5, 0.7)  # share of the noise schedule that a film is rebuilt from
HEADLINE = 0.5  # the strength that early stopping reads
PAIRED = {"ssim": ssim, "psnr": psnr}  # metrics of a rebuilt film and the film itself
NUM_DDIM_STEPS = 20  # over the whole schedule; strength 0.5 takes the last ten


@dataclass(frozen=True)
class FilmBank:
    """Real films with all that scoring them needs.

    Attributes:
        films: uint8 [N, H, W].
        latents: scaled posterior means, float32 [N, C, h, w].
        input_ids: tokens of their captions, int64 [N, L].
        seeds: of each film's noise, [N].
        patients: whose film it is, [N]; patients who share a film count as one.
    """

    films: Tensor
    latents: Tensor
    input_ids: Tensor
    seeds: list[int]
    patients: list[str]

    def __len__(self) -> int:
        return len(self.films)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Return the noise of some films, float32 [B, C, h, w], the same on every machine."""
        shape = self.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=_generator(self.seeds[i])) for i in indices])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def film_bank(
    directory: Path,
    rows: Sequence[dict],
    posteriors: Posteriors,
    places: Sequence[int],
    input_ids: Tensor,
    scaling_factor: float,
    resolution: int,
    interpolation: str = "lanczos",
) -> FilmBank:
    """Gather films for scoring.

    Args:
        directory, rows: the films and the folder their `file_name` is relative to.
        posteriors, places: the latent cache and the films' places in it.
        input_ids: tokens of the rows' captions, [N, L].
        scaling_factor: of the autoencoder's configuration.
        resolution, interpolation: as the cache was built.
    """
    return FilmBank(
        films=load_films(FilmDataset(directory, rows, resolution, interpolation)),
        latents=posteriors.read(places)[0] * scaling_factor,
        input_ids=input_ids,
        seeds=[derive_seed("film noise", row["file_name"]) for row in rows],
        patients=[patient_of(row) for row in rows],
    )


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Switch models to evaluation and back to what they were, without gradients in between."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def rebuild(
    unet: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    encoder_hidden_states: Tensor,
    strength: float,
) -> Tensor:
    """Noise clean latents to a share of the schedule and denoise them again, without guidance.

    Args:
        unet: noise predictor; gets and gives [B, C, h, w].
        noise_scheduler: the base's schedule.
        latents, noise: float32 [B, C, h, w].
        encoder_hidden_states: of the films' captions, [B, L, D].
        strength: share of the schedule in (0, 1].

    Returns:
        Rebuilt latents, float32 [B, C, h, w].
    """
    ddim = DDIMScheduler.from_config(
        noise_scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    ddim.set_timesteps(NUM_DDIM_STEPS, device=latents.device)
    timesteps = ddim.timesteps[-round(NUM_DDIM_STEPS * strength) :]
    rebuilt = ddim.add_noise(latents, noise, timesteps[:1].expand(len(latents)))
    for timestep in timesteps:
        model_pred = unet(rebuilt, timestep, encoder_hidden_states).sample
        rebuilt = ddim.step(model_pred.float(), timestep, rebuilt).prev_sample
    return rebuilt


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the films of scaled latents [B, C, h, w], uint8 [B, H, W] on the CPU."""
    return to_films(vae.decode(latents / vae.config.scaling_factor).sample)


@dataclass
class Scores:
    """Numbers by film, gathered batch after batch: float64 [N] a name, 0 where a film is not ours to score.

    So the shares of several processes add up to the whole.
    """

    num_films: int
    by_name: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, indices: Sequence[int], values: Tensor) -> None:
        self.by_name.setdefault(name, torch.zeros(self.num_films, dtype=torch.float64))[list(indices)] = (
            values.double().cpu()
        )

    def put_all(
        self,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        suffix: str,
        indices: Sequence[int],
        films: Tensor,
        references: Tensor,
    ) -> None:
        for name, metric in metrics.items():
            self.put(name + suffix, indices, metric(films, references))


def noise_levels(noise_scheduler: DDPMScheduler) -> list[int]:
    """Return the timesteps at which the noise-prediction error is measured: the middles of NUM_LEVELS equal bins."""
    width = noise_scheduler.config.num_train_timesteps // NUM_LEVELS
    return [width * level + width // 2 for level in range(NUM_LEVELS)]


def score_model(
    bank: FilmBank,
    unet: nn.Module,
    text_encoder: nn.Module,
    vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler,
    batch_size: int,
    indices: Sequence[int] | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = PAIRED,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Tensor]:
    """Score a model on films: how well it predicts noise, and how well it rebuilds them.

    Args:
        bank: the films.
        unet, text_encoder: the model, in evaluation mode; in reduced precision they cast what they get themselves.
        vae: autoencoder in fp32, on their device.
        noise_scheduler: the base's schedule.
        batch_size: films at a time.
        indices: which films (a process's share); all by default.
        metrics: of the rebuilt films, by name.
        strengths: that films are rebuilt from.

    Returns:
        By name, float64 [N] each, 0 outside `indices`: `mse/<timestep>`, the error of the predicted noise or
        velocity; `<metric>/<strength>` of the rebuilt film.
    """
    scores, device = Scores(len(bank)), vae.device
    for chunk in _chunks(range(len(bank)) if indices is None else indices, batch_size):
        latents, noise = bank.latents[chunk].to(device), bank.noise(chunk).to(device)
        encoder_hidden_states = text_encoder(bank.input_ids[chunk].to(device))[0]
        for level in noise_levels(noise_scheduler):
            timesteps = torch.full((len(chunk),), level, device=device)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
            scores.put(f"mse/{level}", chunk, (model_pred.float() - target).square().mean(dim=(1, 2, 3)))
        for strength in strengths:
            rebuilt = decode(vae, rebuild(unet, noise_scheduler, latents, noise, encoder_hidden_states, strength))
            scores.put_all(metrics, f"/{strength}", chunk, rebuilt, bank.films[chunk])
    return scores.by_name


@torch.no_grad()
def score_bounds(
    bank: FilmBank,
    vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler,
    mean_film: Tensor,
    batch_size: int,
    indices: Sequence[int] | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = PAIRED,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Tensor]:
    """Score what no model should fall below, and what none can pass, on the same films.

    Returns:
        By name, float64 [N] each, 0 outside `indices`, for each metric: `<metric>/ceiling` (the autoencoder's round trip),
        `<metric>/mean_film` (the mean training film in place of each) and `<metric>/noisy/<strength>` (the noisy latents
        decoded as they are).
    """
    scores, device = Scores(len(bank)), vae.device
    for chunk in _chunks(range(len(bank)) if indices is None else indices, batch_size):
        latents, noise, films = bank.latents[chunk].to(device), bank.noise(chunk).to(device), bank.films[chunk]
        scores.put_all(metrics, "/ceiling", chunk, decode(vae, latents), films)
        scores.put_all(metrics, "/mean_film", chunk, mean_film.expand_as(films), films)
        for strength in strengths:
            last = round(noise_scheduler.config.num_train_timesteps * strength) - 1
            timesteps = torch.full((len(chunk),), last, device=device)
            noisy = decode(vae, noise_scheduler.add_noise(latents, noise, timesteps))
            scores.put_all(metrics, f"/noisy/{strength}", chunk, noisy, films)
    return scores.by_name


def summarise(scores: dict[str, Tensor]) -> dict:
    """Return the means over films: SSIM and PSNR at the strength that early stopping reads, MSE by noise level, and bounds."""

    def mean(name: str) -> float:
        return scores[name].mean().item()

    levels = {name.removeprefix("mse/"): mean(name) for name in scores if name.startswith("mse/")}
    summary = {
        "ssim": mean(f"ssim/{HEADLINE}"),
        "psnr": mean(f"psnr/{HEADLINE}"),
        "mse": sum(levels.values()) / len(levels),
        "mse_by_timestep": levels,
    }
    if "ssim/ceiling" in scores:
        summary["bounds"] = {
            metric: {
                "ceiling": mean(f"{metric}/ceiling"),
                "mean_film": mean(f"{metric}/mean_film"),
                "noisy": mean(f"{metric}/noisy/{HEADLINE}"),
            }
            for metric in ("ssim", "psnr")
        }
    return summary


def _chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
