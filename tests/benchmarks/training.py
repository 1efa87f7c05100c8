"""A LoRA step of train_lora.py against one of diffusers' own script: films/s with each saving added, loss, and memory.

    python -m tests.benchmarks.training

The peer is what `examples/text_to_image/train_text_to_image_lora.py` of diffusers does in a step, written anew: films
are opened, brought to size and tokenised as they are needed, encoded by the autoencoder, and the loss is read from the
device twice. That script trains the UNet only; the peer trains the text encoder too, as diffusers' advanced script
does, and clips both, so that both sides do the same to the same parameters. (The script's own clipping gets an
iterator that is used up, and clips nothing.) Ours is the step of train_lora.py, first without what it saves and then
with one saving more a row; `ours` has each saving beside what the peer does instead. Both train adapters of rank 16 on
the attention of the bundled base, eight films at a time, on the demo set, whose films are stored at 512 px as
download.py stores those of patients.

The losses come first: rows of one precision draw the same noise and have to agree to rounding; the peer draws its own,
so over 200 steps its mean may be two standard errors from ours. Whether ours is still train_lora.py's is asked of that
script: its log has to hold the same losses. Then the bars: ours is twice as fast as the peer in fp32; in bf16, where
the machine computes in it, four times as fast as the peer in fp32; and 50,000 films in the cache take the time and the
memory that 500 take, to 10 % and 20 MB.

Each row is a process of its own; they take turns of five steps. Memory is what is a process's own (RssAnon), without
the pages of the cache's files. "processor ms" is a film's share of the time of all threads, which says more where
others use the machine. Five minutes on two quiet cores, without the compiled row.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import utils.quiet  # noqa: F401

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from utils import linear
from utils.diffusion import min_snr_weights
from utils.files import read_jsonl
from utils.folds import split_fold, with_folds
from utils.hardware import (
    has_native_bf16,
    keep_freed_memory,
    use_all_cores,
)
from utils.kernels import capture_graph, compile_blocks, leave_out_cudnn_attention
from utils.latents import Posteriors, TrainingStream, cache_posteriors, checksum_of, deal_positions, prefetch
from utils.linear import use_frozen_products
from utils.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, FusedLinear, add_lora
from utils.metadata import read_metadata
from utils.pipeline import BUNDLED_BASE, ROOT, BaseModel, cast_frozen, load_base
from utils.refusal import ArgumentParser, run
from utils.seeding import derive_seed
from utils.tokens import tokenize

SAVINGS = {
    "latents": "latents cached",
    "tokens": "captions tokenised once",
    "weights": "loss weights from a table",
    "loss": "loss left on the device",
    "fused": "fused AdamW",
    "lora": "LoRA in two products",
    "channels_last": "channels_last",
    "products": "products by oneDNN",
    "memory": "freed memory kept: train_lora.py",
}  # what train_lora.py saves, in the order of the rows
COMPILED, GRAPH = "compiled", "graph"  # and what it does with --compile and with --cuda_graph
PEER = "diffusers' script"
FILM_SIDE = 512  # pixels, as download.py stores films of patients
RANK, BATCH, SEED = 16, 8, 0
LEARNING_RATE, TEXT_ENCODER_LR, MAX_GRAD_NORM = 1e-3, 1e-4, 1.0
FIRST_STEPS = 8  # of every row, to warm up, and whose losses are compared
ROUND_STEPS = 5
SAME_BAR = 1e-3  # of a loss; rounding grows over the steps
BF16_SAME_BAR = 1e-2
STANDARD_ERRORS = 2
SPEED_BAR, BF16_BAR = 2.0, 4.0  # times as many films/s
FEW_FILMS, MANY_FILMS = 500, 50_000
GROWTH_BAR, GROWTH_MB = 1.1, 20
CONTEXT = multiprocessing.get_context("fork")  # imports are paid for once; the parent itself computes nothing
STEPS_WITHOUT_END = 10**9
BASE = partial(load_base, BUNDLED_BASE)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of five steps, each row in turn")
    parser.add_argument("--loss_steps", type=int, default=200, help="whose mean loss is compared; 0 leaves that out")
    parser.add_argument("--cache_rounds", type=int, default=20, help="of five steps, over few films and over many")
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="of both sides; 0 is the plain loss")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled row")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    passed, failed = [], []

    def judge(good: bool, what: str) -> None:
        (passed if good else failed).append(what)

    with tempfile.TemporaryDirectory() as temporary:
        data, cache = Path(temporary) / "data", Path(temporary) / "cache"
        call("download.py", "--output_dir", data, "--cache_dir", cache, "--resolution", FILM_SIDE)
        finish(start("cache", fill_cache, data, cache))
        print_flops()

        # The rows: the peer, then ours with one saving more each
        demo = (demo_stream, data, cache)
        rows = {PEER: start(PEER, peer, BASE, data, BATCH, "no", args.snr_gamma)}
        saved: tuple[str, ...] = ()
        rows["ours, nothing saved"] = start("ours", ours, BASE, demo, saved, BATCH, "no", args.snr_gamma)
        for saving, name in SAVINGS.items():
            saved = (*saved, saving)
            rows[f"+ {name}"] = full = start(name, ours, BASE, demo, saved, BATCH, "no", args.snr_gamma)
        if not args.no_compile:
            compiled = (*saved, COMPILED)
            rows["+ blocks compiled"] = start(COMPILED, ours, BASE, demo, compiled, BATCH, "no", args.snr_gamma)
        rows["train_lora.py in bf16"] = bf16 = start("bf16", ours, BASE, demo, saved, BATCH, "bf16", args.snr_gamma)
        rows[f"{PEER} in bf16"] = start("bf16", peer, BASE, data, BATCH, "bf16", args.snr_gamma)

        # Warm-up, then turns
        warm_up(rows.values())
        for _ in range(args.rounds):
            for contender in rows.values():
                take(contender, ROUND_STEPS)
        first_losses = rows["ours, nothing saved"].losses[:FIRST_STEPS]
        print(f"{'':<30}{'films/s':>8} {'range':<16}{'times':>6} {'processor ms':>13} {'peak MB':>8}  loss apart")
        for name, contender in rows.items():
            print_row(name, contender, rows[PEER], first_losses)
        others = [row for name, row in rows.items() if not (name.startswith(PEER) or row is bf16 or row.failure)]
        apart = np.max([distance(row.losses, first_losses) for row in others])
        judge(apart <= SAME_BAR, f"{len(others)} rows in fp32 have the same losses to {apart:.0e} (bar {SAME_BAR:g})")
        apart = distance(bf16.losses, first_losses)
        judge(apart <= BF16_SAME_BAR, f"that in bf16 to {apart:.0e} (bar {BF16_SAME_BAR:g})")
        speed, bf16_speed = (times_as_fast(row, rows[PEER]) for row in (full, bf16))
        judge(speed >= SPEED_BAR, f"in fp32 {speed:.2f} times as fast (bar {SPEED_BAR:g})")

        # The same loss curve, from other draws
        while len(full.losses) < args.loss_steps:
            for contender in (rows[PEER], full):
                take(contender, ROUND_STEPS)
        for contender in rows.values():
            finish(contender)
        if args.loss_steps:
            curves = [row.losses[: args.loss_steps] for row in (rows[PEER], full)]
            theirs, mine = (statistics.fmean(curve) for curve in curves)
            error = sum(statistics.variance(curve) / len(curve) for curve in curves) ** 0.5
            apart = abs(theirs - mine)
            print(
                f"mean loss over {args.loss_steps} steps: {theirs:.4f} of the peer, {mine:.4f} of ours, {apart:.4f} "
                f"apart; the standard error of that is {error:.4f}"
            )
            judge(apart <= STANDARD_ERRORS * error, f"mean losses {apart / error:.1f} standard errors apart (bar 2)")
        apart = compare_with_script(data, cache, Path(temporary) / "run", args.snr_gamma)
        judge(apart <= SAME_BAR, f"train_lora.py logs the losses of ours to {apart:.0e} (bar {SAME_BAR:g})")

        # The cache does not grow into memory, nor into time
        streams = {n: (made_up_stream, Path(temporary) / f"{n}-films", n) for n in (FEW_FILMS, MANY_FILMS)}
        few, many = (
            start(f"{n} films", ours, BASE, stream, saved, BATCH, "no", args.snr_gamma)
            for n, stream in streams.items()
        )
        warm_up((few, many))
        for _ in range(args.cache_rounds):
            for contender in (few, many):
                take(contender, ROUND_STEPS)
        for contender in (few, many):
            step_ms = 1000 * statistics.median(contender.seconds) / ROUND_STEPS
            print(
                f"{contender.name:<13} in the cache: {step_ms:.1f} ms a step, peak {contender.peak_kb / 1000:.0f} MB"
            )
            finish(contender)
        growth = 1 / times_as_fast(many, few)
        judge(
            growth <= GROWTH_BAR,
            f"{MANY_FILMS} films take {growth:.2f} of the time of {FEW_FILMS} (bar {GROWTH_BAR:g})",
        )
        allowed = GROWTH_BAR * few.peak_kb + 1000 * GROWTH_MB
        growth_mb = (many.peak_kb - few.peak_kb) / 1000
        judge(
            many.peak_kb <= allowed, f"and {growth_mb:.0f} MB more memory (bar {(allowed - few.peak_kb) / 1000:.0f})"
        )

    if has_native_bf16():  # asked last: it wakes CUDA, after which no process may be forked
        judge(bf16_speed >= BF16_BAR, f"in bf16 {bf16_speed:.2f} times as fast as the peer in fp32 (bar {BF16_BAR:g})")
    else:
        print(f"bf16: {bf16_speed:.2f} times the peer in fp32; no bar, as this machine does not compute in it")
    print(f"{'fail' if failed else 'pass'}: {'; '.join([*(f'{what}: below the bar' for what in failed), *passed])}")
    return int(bool(failed))


# The two steps


class ImageFolder(Dataset):
    """Films of an imagefolder as diffusers' script makes them when they are asked for, a batch of rows at a time."""

    def __init__(self, directory: Path, base: BaseModel, read_film: Callable[[Path, int], Tensor]):
        self.directory, self.rows = directory, read_metadata(directory)
        self.tokenizer, self.resolution, self.read_film = base.tokenizer, base.resolution, read_film

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        rows = [self.rows[i] for i in indices]
        pixel_values = [self.read_film(self.directory / row["file_name"], self.resolution) for row in rows]
        input_ids = tokens_of(self.tokenizer, [row["text"] for row in rows])
        return [dict(pixel_values=film, input_ids=ids) for film, ids in zip(pixel_values, input_ids, strict=True)]


def read_pixel_values(path: Path, resolution: int) -> Tensor:
    """Do to a file what the peer's torchvision transforms do: its shorter side to size, a random crop, [-1, 1].

    Returns:
        float32 [3, resolution, resolution].
    """
    image = Image.open(path).convert("RGB")
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        image = image.resize([max(resolution, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (int(torch.randint(side - resolution + 1, ())) for side in image.size)
    if image.size != (resolution, resolution):
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def tokens_of(tokenizer, captions: Sequence[str]) -> Tensor:
    """Tokenise captions as the peer does, int64 [N, L]."""
    length = tokenizer.model_max_length
    return tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids


def peer(
    make_base: Callable[[], BaseModel],
    data_dir: Path,
    batch_size: int,
    precision: str,
    snr_gamma: float,
    read_film: Callable[[Path, int], Tensor] = read_pixel_values,
) -> Callable[[int], list[float]]:
    """Return a function that takes steps as diffusers' script takes them, and returns their losses."""
    diffusers.utils.logging.set_verbosity_error()  # of a cast that is none
    accelerator = Accelerator(mixed_precision=precision)
    base = make_base()
    noise_scheduler, text_encoder, vae, unet = base.noise_scheduler, base.text_encoder, base.vae, base.unet
    weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False).to(accelerator.device, dtype=weight_dtype)
    parameters = []
    for model, targets, name in (
        (unet, UNET_TARGETS["attention"], "unet"),
        (text_encoder, TEXT_ENCODER_TARGETS, "text_encoder"),
    ):
        torch.manual_seed(derive_seed(SEED, name))  # both sides set out from the same adapters
        lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
        model.add_adapter(lora)  # in the base's own precision, unless that is fp16
        parameters.append([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer = torch.optim.AdamW(
        [{"params": parameters[0], "lr": LEARNING_RATE}, {"params": parameters[1], "lr": TEXT_ENCODER_LR}]
    )
    films = ImageFolder(data_dir, base, read_film)
    # Batches of one size, as the loss is gathered as so many copies
    dataloader = DataLoader(films, shuffle=True, batch_size=batch_size, collate_fn=collate, drop_last=True)
    lr_scheduler = get_scheduler("constant", optimizer)
    unet, text_encoder, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        unet, text_encoder, optimizer, dataloader, lr_scheduler
    )
    unet.train()
    text_encoder.train()
    torch.manual_seed(SEED)

    def step(batch: dict[str, Tensor]) -> float:
        with accelerator.accumulate(unet):
            latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            num_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, num_timesteps, (len(latents),), device=latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
            if noise_scheduler.config.prediction_type == "epsilon":
                target = noise
            else:
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            if snr_gamma:
                loss_weights = recomputed_weights(noise_scheduler, timesteps, snr_gamma)
                error = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                loss = (error.mean(dim=(1, 2, 3)) * loss_weights).mean()
            else:
                loss = F.mse_loss(model_pred.float(), target.float())
            logged = accelerator.gather(loss.repeat(batch_size)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_([*parameters[0], *parameters[1]], MAX_GRAD_NORM)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        loss.detach().item()  # once more, for the progress bar
        return logged

    batches = epochs_of(dataloader)
    return lambda num_steps: [step(next(batches)) for _ in range(num_steps)]


def use_pefts_layers(*models: torch.nn.Module) -> None:
    """Have adapted layers compute as peft does, in products that `FlopCounterMode` counts, too."""
    for module in (module for model in models for module in model.modules()):
        if type(module) is FusedLinear:
            module.__class__ = Linear


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "input_ids")}


def epochs_of(dataloader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from dataloader


def recomputed_weights(noise_scheduler, timesteps: Tensor, snr_gamma: float) -> Tensor:
    """Return the Min-SNR weights of a batch from the schedule's tables, as the peer does in each step, [B]."""
    snr = compute_snr(noise_scheduler, timesteps)
    capped = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    return capped / (snr if noise_scheduler.config.prediction_type == "epsilon" else snr + 1)


def ours(
    make_base: Callable[[], BaseModel],
    make_stream: tuple,
    savings: Sequence[str],
    batch_size: int,
    precision: str,
    snr_gamma: float,
    read_film: Callable[[Path, int], Tensor] = read_pixel_values,
) -> Callable[[int], list[float]]:
    """Return a function that takes steps as train_lora.py does, and returns their losses.

    Args:
        make_base: returns models of its own.
        make_stream: a function and the arguments that follow the base; it returns what `demo_stream` does.
        savings: keys of SAVINGS, COMPILED, GRAPH. Where one is missing, the step does what the peer does in that place.
        batch_size: films a step.
        precision: "no" or "bf16".
        snr_gamma: 0 weighs all timesteps alike.
        read_film: returns the pixels of a file at a resolution, as `read_pixel_values` does.
    """
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    if "memory" in savings:
        keep_freed_memory()
    base = make_base()
    noise_scheduler, tokenizer, vae = base.noise_scheduler, base.tokenizer, base.vae.requires_grad_(False).to(device)
    scaling_factor, resolution = vae.config.scaling_factor, base.resolution
    stream, captions, paths = make_stream[0](base, *make_stream[1:])
    if "latents" not in savings:
        vae.to({"no": torch.float32, "bf16": torch.bfloat16}[precision])
    empty_ids = tokenize(tokenizer, [""]).to(device)
    unet, text_encoder = base.unet, base.text_encoder
    if "channels_last" in savings:
        unet = unet.to(memory_format=torch.channels_last)
    unet_parameters = add_lora(unet, RANK, RANK, derive_seed(SEED, "unet"))
    text_encoder_parameters = add_lora(text_encoder, RANK, RANK, derive_seed(SEED, "text_encoder"))
    lora_parameters = unet_parameters + text_encoder_parameters
    cast_frozen(unet, accelerator.mixed_precision)
    if "lora" not in savings:
        use_pefts_layers(unet, text_encoder)
    leave_out_cudnn_attention(unet)
    if device.type == "cpu":
        linear.BY_ONEDNN = "products" in savings
        use_frozen_products(unet, text_encoder)
    if COMPILED in savings:
        compile_blocks(unet)
    groups = [
        {"params": unet_parameters, "lr": LEARNING_RATE},
        {"params": text_encoder_parameters, "lr": TEXT_ENCODER_LR},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True) if "fused" in savings else torch.optim.AdamW(groups)
    lr_scheduler = get_scheduler("constant", optimizer)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    text_encoder = accelerator.prepare_model(text_encoder)
    loss_weights = min_snr_weights(
        noise_scheduler.alphas_cumprod, snr_gamma, noise_scheduler.config.prediction_type
    ).to(device)
    positions = deal_positions(0, STEPS_WITHOUT_END, 1, batch_size, 0, 1)
    batches = iter(DataLoader(stream, batch_sampler=positions, pin_memory="prefetch" in savings))
    if "prefetch" in savings:
        batches = prefetch(batches)
    unet.train()
    text_encoder.train()

    replay = []  # none or one

    def forward_backward(
        noisy_latents: Tensor, timesteps: Tensor, input_ids: Tensor, target: Tensor, place_weights: Tensor
    ) -> Tensor:
        encoder_hidden_states = text_encoder(input_ids)[0]
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        error = F.mse_loss(model_pred.float(), target, reduction="none")
        loss = (error * place_weights[:, None]).mean(dim=(1, 2, 3))
        if "weights" in savings or not snr_gamma:
            loss = (loss * loss_weights[timesteps]).mean()
        else:
            loss = (loss * recomputed_weights(noise_scheduler, timesteps, snr_gamma)).mean()
        accelerator.backward(loss)
        return loss.detach()

    def step(batch: dict[str, Tensor]) -> Tensor | float:
        places = batch["position"].tolist()
        films = [stream.film_at(place) for place in places]
        with accelerator.accumulate(unet, text_encoder):
            generators = [torch.Generator(device).manual_seed(derive_seed(SEED, "draws", place)) for place in places]
            if "latents" in savings:
                mean, std = batch["mean"].to(device, non_blocking=True), batch["std"].to(device, non_blocking=True)
            else:
                pixel_values = torch.stack([read_film(paths[film], resolution) for film in films])
                posterior = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
            latents = (mean + std * randn_tensor(mean.shape, generators, device)) * scaling_factor
            noise = randn_tensor(latents.shape, generators, device)
            num_timesteps = noise_scheduler.config.num_train_timesteps
            draws = [torch.randint(num_timesteps, (1,), generator=g, device=device) for g in generators]
            timesteps = torch.cat(draws)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

            if "tokens" in savings:
                input_ids = batch["input_ids"]
            else:
                input_ids = tokens_of(tokenizer, [captions[film] for film in films])
            # As many are drawn as there, but none left empty: the peer has no caption dropout
            dropped = torch.cat([torch.rand(1, generator=g, device=device) for g in generators]) < 0
            input_ids = torch.where(dropped[:, None], empty_ids, input_ids.to(device, non_blocking=True))
            if noise_scheduler.config.prediction_type == "epsilon":
                target = noise
            else:
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            place_weights = batch["place_weights"].to(device, non_blocking=True)
            place_weights = torch.where(dropped[:, None, None], 1.0, place_weights)
            inputs = noisy_latents, timesteps, input_ids, target, place_weights
            if GRAPH in savings and not replay:
                replay.append(capture_graph(forward_backward, inputs, lora_parameters))
            loss = (replay[0] if replay else forward_backward)(*inputs)
            logged = loss.clone()
            if "loss" not in savings:
                logged = accelerator.gather(loss.repeat(batch_size)).mean().item()
            accelerator.clip_grad_norm_(lora_parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not replay)
            if "loss" not in savings:
                loss.item()
        lr_scheduler.step()
        return logged

    return lambda num_steps: [float(loss) for loss in [step(next(batches)) for _ in range(num_steps)]]


# What the steps are taken over


def demo_stream(base: BaseModel, data_dir: Path, cache_dir: Path, training_only: bool = False):
    """Return the stream over a data set's films, and the caption and the path of each.

    Args:
        base: its tokenizer, its autoencoder and its resolution are used.
        data_dir, cache_dir: of the films and of their latents.
        training_only: leave out what train_lora.py leaves out: fold 0 and the films that it validates on.
    """
    rows = with_folds(read_metadata(data_dir))
    posteriors = cache_posteriors(data_dir, rows, base.vae, cache_dir, base.resolution)
    place = {row["file_name"]: i for i, row in enumerate(rows)}
    if training_only:
        rows, _, _ = split_fold(rows, 0, SEED)
    captions = [row["text"] for row in rows]
    films = [place[row["file_name"]] for row in rows]
    stream = TrainingStream(posteriors, films, tokenize(base.tokenizer, captions), SEED)
    return stream, captions, [data_dir / row["file_name"] for row in rows]


def fill_cache(data_dir: Path, cache_dir: Path) -> None:
    demo_stream(load_base(BUNDLED_BASE), data_dir, cache_dir)


def made_up_stream(base: BaseModel, folder: Path, num_films: int):
    """Return the stream over latents that are written here, and no captions nor paths."""
    side = base.unet.config.sample_size
    write_posteriors(folder, num_films, (base.unet.config.in_channels, side, side))
    captions = [f"Chest radiograph of a {age}-year-old woman. No acute finding." for age in range(18, 98)]
    input_ids = tokenize(base.tokenizer, captions)[torch.arange(num_films) % len(captions)]
    return TrainingStream(Posteriors(folder, num_films), range(num_films), input_ids, SEED), None, None


def write_posteriors(folder: Path, num_films: int, shape: Sequence[int]) -> None:
    """Write what `utils.latents.Posteriors` reads: `mean` and `std` of films that do not exist, a block repeated."""
    folder.mkdir()
    block = np.random.default_rng(SEED).uniform(0, 1, (FEW_FILMS, *shape)).astype(np.float32)
    for name in ("mean", "std"):
        values = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (num_films, *shape))
        for first in range(0, num_films, FEW_FILMS):
            values[first : first + FEW_FILMS] = block
        values.flush()
    checksums = np.array([checksum_of(film, film) for film in block], np.uint32)
    np.save(folder / "checksum.npy", np.resize(checksums, num_films))


def compare_with_script(data_dir: Path, cache_dir: Path, run_dir: Path, snr_gamma: float) -> float:
    """Return how far the losses that train_lora.py logs are from those of our step over the same films."""
    call(
        "train_lora.py", "--pretrained_model_name_or_path", BUNDLED_BASE, "--train_data_dir", data_dir,
        "--cache_dir", cache_dir, "--output_dir", run_dir, "--mixed_precision", "no", "--seed", SEED, "--fold", 0,
        "--rank", RANK, "--text_encoder_rank", RANK, "--lora_targets", "attention", "--train_batch_size", BATCH,
        "--learning_rate", LEARNING_RATE, "--text_encoder_lr", TEXT_ENCODER_LR, "--lr_scheduler", "constant",
        "--lr_warmup_steps", 0, "--caption_dropout", 0, "--snr_gamma", snr_gamma, "--max_train_steps", FIRST_STEPS,
        "--validation_steps", FIRST_STEPS, "--max_validation_samples", 2,
        "--num_validation_images", 0, "--report_to", "none",
    )  # fmt: skip
    stream = (demo_stream, data_dir, cache_dir, True)
    contender = start("the script's", ours, BASE, stream, tuple(SAVINGS), BATCH, "no", snr_gamma)
    take(contender, FIRST_STEPS)
    finish(contender)
    return distance(contender.losses, [row["loss"] for row in read_jsonl(run_dir / "log.jsonl")])


def call(script: str, *arguments: object) -> None:
    """Run a script of the project to its end; raise RuntimeError with what it said where it fails."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")


# Processes that take turns


@dataclass
class Contender:
    """A process that takes steps when told to, and what is known of it."""

    name: str
    process: multiprocessing.Process
    connection: Connection
    seconds: list[float] = field(default_factory=list)  # of each turn
    processor_s: list[float] = field(default_factory=list)  # the same of all its threads
    losses: list[float] = field(default_factory=list)  # of each step
    peak_kb: int = 0
    failure: str = ""


def start(name: str, build: Callable, *arguments: object) -> Contender:
    """Start a process, let it build what it needs, and return when it is ready."""
    connection, other_end = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(other_end, build, arguments), daemon=True)
    process.start()
    contender = Contender(name, process, connection)
    receive(contender)
    return contender


def serve(connection: Connection, build: Callable, arguments: Sequence[object]) -> None:
    """Take as many steps as the connection says, until it says 0."""
    use_all_cores()
    try:
        take_steps = build(*arguments)
        connection.send((0.0, 0.0, [], ""))
        while num_steps := connection.recv():
            begin, begin_processor = time.perf_counter(), time.process_time()
            losses = take_steps(num_steps)
            connection.send((time.perf_counter() - begin, time.process_time() - begin_processor, losses, ""))
    except Exception as error:  # whatever a compiler raises
        connection.send((0.0, 0.0, [], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def take(contender: Contender, num_steps: int) -> None:
    """Let a contender take steps while the others wait. Only a compiled one may fail, for want of a compiler."""
    if contender.failure:
        return
    contender.connection.send(num_steps)
    seconds, processor_s, losses = receive(contender)
    contender.seconds.append(seconds)
    contender.processor_s.append(processor_s)
    contender.losses.extend(losses)


def receive(contender: Contender) -> tuple[float, float, list[float]]:
    """Wait for a contender's answer and watch its memory meanwhile."""
    while not contender.connection.poll(0.02):
        status = Path(f"/proc/{contender.process.pid}/status").read_text()
        own = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
        contender.peak_kb = max([contender.peak_kb, *own])
    *answer, contender.failure = contender.connection.recv()
    if contender.failure and contender.name != COMPILED:
        raise RuntimeError(f"{contender.name}: {contender.failure}")
    return tuple(answer)


def warm_up(contenders: Iterable[Contender]) -> None:
    """Let each take its first steps, whose losses are kept and whose time is not."""
    for contender in contenders:
        take(contender, FIRST_STEPS)
        contender.seconds.clear()
        contender.processor_s.clear()


def finish(contender: Contender) -> None:
    if not contender.failure:
        contender.connection.send(0)
    contender.process.join()


# What is said of them


def times_as_fast(one: Contender, other: Contender) -> float:
    """Return the median over the rounds of how many times as fast one is as another."""
    return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))


def distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the largest relative difference of the first steps' losses."""
    ratios = np.divide(losses[:FIRST_STEPS], others[:FIRST_STEPS])
    return float(np.abs(ratios - 1).max())  # NaN where one of them is


def print_row(name: str, contender: Contender, reference: Contender, first_losses: Sequence[float]) -> None:
    if contender.failure:
        print(f"{name:<30}left out: {contender.failure}")
        return
    rates = [BATCH * ROUND_STEPS / seconds for seconds in contender.seconds]
    span = f"({min(rates):.1f} to {max(rates):.1f})"
    processor_ms = 1000 * statistics.median(contender.processor_s) / (BATCH * ROUND_STEPS)
    apart = "" if name.startswith(PEER) else f"{distance(contender.losses, first_losses):.0e}"
    print(
        f"{name:<30}{statistics.median(rates):>8.1f} {span:<16}{times_as_fast(contender, reference):>6.2f} "
        f"{processor_ms:>13.1f} {contender.peak_kb / 1000:>8.0f}  {apart}",
        flush=True,
    )


def print_flops() -> None:
    """Say where the arithmetic of the peer's step goes."""
    contender = start("flops", count_flops)
    take(contender, 1)
    finish(contender)
    names = ("autoencoder", "text encoder forward", "UNet forward", "backward")
    total = sum(contender.losses)
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in zip(names, contender.losses, strict=True))
    print(f"arithmetic of a film: {total / BATCH / 1e9:.2f} GFLOP; {shares}")


def count_flops() -> Callable[[int], list[float]]:
    """Return a function that counts the operations of one batch: autoencoder, text encoder, UNet, backward."""
    base = load_base(BUNDLED_BASE)
    add_lora(base.unet, RANK, RANK, SEED)
    add_lora(base.text_encoder, RANK, RANK, SEED)
    use_pefts_layers(base.unet, base.text_encoder)
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    pixel_values = torch.zeros(BATCH, 3, base.resolution, base.resolution)
    input_ids = tokens_of(base.tokenizer, [""] * BATCH)

    def count(_: int) -> list[float]:
        totals = []

        def counted(stage: Callable[[], object]) -> object:
            with FlopCounterMode(display=False) as counter:
                result = stage()
            totals.append(float(counter.get_total_flops()))
            return result

        counted(lambda: base.vae.requires_grad_(False).encode(pixel_values))
        encoder_hidden_states = counted(lambda: base.text_encoder(input_ids)[0])
        noisy_latents = torch.zeros(BATCH, channels, side, side)
        model_pred = counted(lambda: base.unet(noisy_latents, 0, encoder_hidden_states).sample)
        counted(lambda: model_pred.sum().backward())
        return totals

    return count


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
