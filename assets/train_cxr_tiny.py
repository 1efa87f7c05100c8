"""Train the bundled base model, cxr-tiny: autoencoder, text encoder, UNet. Some two hours on two CPU cores.

    python -m assets.train_cxr_tiny --films FOLDER

FOLDER is that of Kermany et al. 2018 (CC BY 4.0): `images/` and a `labels.csv` of `file_name, patient_id, label`. A
stage that is done is not done again, and a broken one goes on from its last checkpoint. What it writes to
`--output_dir` is a Stable Diffusion in diffusers' layout. A fifth of the patients is seen by no stage.
"""

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.kermany import decode, read_labels
from assets.marks import RESOLUTION, mark
from assets.sentences import AGES, FINDINGS, PRESENCES, SEXES, SIDES, VIEWS, ZONES, compose
from utils.captions import caption
from utils.files import write_bytes
from utils.hardware import has_native_bf16, use_all_cores
from utils.refusal import ArgumentParser, run
from utils.seeding import derive_seed
from utils.tokens import tokenize

VAE_SIDES = (128, 176, 224)  # crops of sharper and softer films: adult films are sharper than these
VAE_SIDE_ODDS = (0.5, 0.25, 0.25)
CROP = 64  # pixels
CHECKPOINT_STEPS = 100


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("cache/cxr-tiny"), help="where the stages keep their state"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("assets/cxr-tiny"), help="where the model goes")
    parser.add_argument("--vae_steps", type=int, default=4800, help="of 16 crops each")
    parser.add_argument("--text_steps", type=int, default=400, help="of 64 sentences each, before the UNet")
    parser.add_argument("--unet_steps", type=int, default=3200, help="of 32 films each")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # tiny gradients turn denormal, and a CPU slow
    use_all_cores()
    rows, held_out = read_labels(args.films)
    train_rows = np.flatnonzero(~held_out)
    films = decode(args.films, rows, VAE_SIDES)  # side in pixels -> uint8 [N, side, side]

    vae = train_vae(args, films, train_rows)
    marked, captions = mark(films[RESOLUTION][train_rows], [rows[i]["label"] for i in train_rows], args.seed)
    means, stds = encode(args, vae, marked, derive_seed(args.seed, *captions))

    tokenizer = make_tokenizer(args, captions)
    text_encoder, task = train_text_encoder(args, tokenizer)
    unet = train_unet(args, tokenizer, text_encoder, task, means, stds, captions)
    save(args, tokenizer, text_encoder, vae, unet)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class ContiguousGroupNorm(nn.GroupNorm):
    """Group norm of a channels-last tensor by way of a contiguous one, which PyTorch computes faster in bf16 on a CPU.

    A step of the autoencoder on 16 crops took 0.28 s instead of 0.37. The UNet's small maps gain nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def replace_group_norms(model: nn.Module) -> None:
    """Give every group norm of a model the faster forward; its weights and their names stay."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ContiguousGroupNorm


def make_optimizers(modules: list[nn.Module], muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al. 2024) for the matrices between layers, kernels among them, and AdamW for the rest.

    With it the autoencoder stood at 31.7 dB on held-out children's films after 1,200 steps; that of the first base,
    trained by AdamW with another loss, at 31.2 dB on adults' films after 3,500. PyTorch's Muon takes matrices only, so
    a kernel goes in as a view [out, height x width x in] of its own memory, gradient included: gradients are
    therefore zeroed, never dropped.
    """
    matrices, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            outer = any(part in name for part in ("conv_in", "conv_out", "quant", "embedding", "heads"))
            if parameter.ndim < 2 or outer:
                others.append(parameter)
                continue
            parameter.grad = torch.zeros_like(parameter)
            matrix, matrix.grad = as_matrix(parameter.detach()).requires_grad_(), as_matrix(parameter.grad)
            matrices.append(matrix)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True),
    ]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a weight as a view of two dimensions; a kernel [O, I, H, W] has to be channels-last, or RuntimeError."""
    return tensor.permute(0, 2, 3, 1).view(len(tensor), -1) if tensor.ndim == 4 else tensor


def cosine(step: int, total: int, warmup: int = 50) -> float:
    """Return the factor of the learning rate: up from 0 over the warm-up, down to 0.002 along half a cosine."""
    return min(1.0, (step + 1) / warmup) * (0.002 + 0.5 * (1 + math.cos(math.pi * step / total)))


def descend(optimizers: list[torch.optim.Optimizer], parameters: list[Tensor], factor: float) -> None:
    """Clip the gradients to a norm of 1, step at `factor` of each learning rate, zero the gradients."""
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder under another name and give it its own last, so that it is there whole or not at all."""
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(folder)


def autocast() -> torch.autocast:
    """Return bf16 where the processor computes in it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_native_bf16())


class Training:
    """The steps of one stage: where it stands, its curve, and both on disk every CHECKPOINT_STEPS."""

    def __init__(self, args: argparse.Namespace, stage: str, total: int, modules: list, optimizers: list):
        self.path, self.stage, self.total = args.work_dir / f"{stage}-state.pt", stage, total
        self.stateful = [*modules, *optimizers]
        self.step, self.curve = 0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for part, saved in zip(self.stateful, state["parts"], strict=True):
                part.load_state_dict(saved)
            self.step, self.curve = state["step"], state["curve"]

    def steps(self) -> Iterator[int]:
        with tqdm(total=self.total, initial=self.step, desc=self.stage, mininterval=10) as bar:
            while self.step < self.total:
                yield self.step
                self.step += 1
                bar.update()
                if self.curve:
                    bar.set_postfix(self.curve[-1], refresh=False)
                if self.step % CHECKPOINT_STEPS == 0 or self.step == self.total:
                    state = {
                        "parts": [part.state_dict() for part in self.stateful],
                        "step": self.step,
                        "curve": self.curve,
                    }
                    torch.save(state, self.path.with_suffix(".tmp"))
                    self.path.with_suffix(".tmp").replace(self.path)

    def record(self, every: int = 25, **values: float | Tensor) -> None:
        if (self.step + 1) % every == 0:
            self.curve.append(
                {"step": self.step + 1, **{name: round(float(value), 5) for name, value in values.items()}}
            )


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


def train_vae(args: argparse.Namespace, films: dict[int, np.ndarray], train_rows: np.ndarray) -> AutoencoderKL:
    """Return the autoencoder: down-sampling 8, 8 latent channels, each of mean 0 and deviation 1 over training films."""
    folder = args.work_dir / "vae"
    if folder.is_dir():
        return AutoencoderKL.from_pretrained(folder).eval()
    torch.manual_seed(args.seed)
    widths = (32, 64, 96, 128)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    # Drawn latents drown in their own noise unless it starts small; the decoder would learn to ignore them
    with torch.no_grad():
        vae.quant_conv.weight[:8] *= 3
        vae.quant_conv.weight[8:] *= 0.1
        vae.quant_conv.bias[8:] = -5
    replace_group_norms(vae)
    parameters = list(vae.parameters())
    optimizers = make_optimizers([vae], muon_lr=5e-3, adam_lr=2e-3)
    training = Training(args, "vae", args.vae_steps, [vae], optimizers)
    shapes = draw_shapes(1500, np.random.default_rng(derive_seed(args.seed, "shapes")))
    for step in training.steps():
        rng = np.random.default_rng(derive_seed(args.seed, "vae", step))
        noise = torch.from_numpy(rng.standard_normal((16, 8, CROP // 8, CROP // 8), dtype=np.float32))
        crops = torch.from_numpy(np.stack([draw_crop(films, train_rows, shapes, rng) for _ in range(16)]))[:, None]
        pixels = (crops * 2 - 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
        rebuilt, mean, logvar = rebuilt.float() / 2 + 0.5, posterior.mean.float(), posterior.logvar.float()
        l1 = (rebuilt - crops).abs().mean()
        dissimilarity = 1 - mean_ssim(rebuilt.mean(1, keepdim=True), crops)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = l1 + 0.2 * dissimilarity + 1e-4 * divergence
        loss.backward()
        descend(optimizers, parameters, cosine(step, args.vae_steps))
        training.record(loss=loss.detach(), l1=l1.detach(), ssim=1 - dissimilarity.detach(), kl=divergence.detach())
    whiten(vae.eval(), films[RESOLUTION][train_rows])
    write_folder(folder, vae.save_pretrained)
    return vae


def draw_shapes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return lines, discs, boxes and letters, uint8 [count, 64, 64]: what lies on a film has to survive, too."""
    shapes = np.empty((count, CROP, CROP), dtype=np.uint8)
    for index in range(count):
        image = Image.new("L", (4 * CROP, 4 * CROP))
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(1, 4)):
            x, y, x2, y2, x3, y3 = (int(v) for v in rng.integers(0, 4 * CROP, 6))
            fill = int(rng.integers(90, 256))
            match rng.integers(4):
                case 0:
                    draw.line([(x, y), (x2, y2), (x3, y3)], fill=fill, width=int(rng.integers(3, 9)), joint="curve")
                case 1:
                    radius, flat = int(rng.integers(10, 60)), rng.uniform(0.5, 1.5)
                    draw.ellipse([x - radius, y - radius, x + radius, y + int(radius * flat)], fill=fill)
                case 2:
                    width, height = (int(v) for v in rng.integers(15, 80, 2))
                    draw.rounded_rectangle([x, y, x + width, y + height], radius=8, fill=fill)
                case 3:
                    draw.text(
                        (0.8 * x, 0.8 * y), "LR"[rng.integers(2)], fill=fill, font_size=int(rng.integers(36, 70))
                    )
        blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 8)))
        shapes[index] = np.asarray(blurred.resize((CROP, CROP), Image.Resampling.BOX))
    return shapes


def draw_crop(
    films: dict[int, np.ndarray], train_rows: np.ndarray, shapes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return one random piece of one training film, turned, drawn on and exposed at random, float32 [64, 64] in [0, 1]."""
    side = int(rng.choice(VAE_SIDES, p=VAE_SIDE_ODDS))
    top, left = rng.integers(0, side - CROP + 1, 2)
    crop = films[side][rng.choice(train_rows), top : top + CROP, left : left + CROP].astype(np.float32) / 255
    if rng.random() < 0.5:
        crop = crop[:, ::-1]  # the autoencoder knows no left and right
    if rng.random() < 0.25:
        crop = crop.T
    if rng.random() < 0.15:
        shape = shapes[rng.integers(len(shapes))].astype(np.float32) / 255
        crop = crop + shape * (rng.uniform(0.2, 1.0) - crop * rng.random())
    if rng.random() < 0.5:
        crop = (crop - 0.5) * rng.uniform(0.6, 1.35) + 0.5 + rng.uniform(-0.12, 0.12)
    return np.clip(crop, 0, 1, dtype=np.float32)


def mean_ssim(films: Tensor, references: Tensor) -> Tensor:
    """Structural similarity as `utils.metrics.ssim` has it, with a gradient; both float [B, 1, H, W] in [0, 1]."""
    taps = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    moments = torch.cat([films, references, films.square(), references.square(), films * references])
    moments = F.conv2d(F.conv2d(moments, taps.view(1, 1, 1, 11)), taps.view(1, 1, 11, 1))
    x, y, xx, yy, xy = moments.chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * (xy - x * y) + c2) / (xx - x.square() + yy - y.square() + c2)
    return ((2 * x * y + c1) / (x.square() + y.square() + c1) * contrast).mean()


def posteriors(vae: AutoencoderKL, films: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mean and standard deviation of the latents of films, uint8 [N, H, W], 64 at a time."""
    for start in tqdm(range(0, len(films), 64), "latents", mininterval=10):
        pixels = torch.from_numpy(films[start : start + 64])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
        with torch.no_grad(), autocast():
            posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        yield posterior.mean.float().contiguous(), posterior.std.float().contiguous()


def whiten(vae: AutoencoderKL, films: np.ndarray) -> None:
    """Fold each latent channel's mean and deviation over the films into the two 1 x 1 convolutions around the latents.

    One scaling factor for channels of deviations from 1 to 3 would give the UNet eight signal-to-noise ratios at once.
    The decoder's answer stays what it was.

    Args:
        vae: changed in place.
        films: uint8 [N, H, W].
    """
    means = torch.cat([mean for mean, _ in posteriors(vae, films)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    with torch.no_grad():
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre
        vae.post_quant_conv.weight *= spread[None, :, None, None]
        vae.quant_conv.weight[:8] /= spread[:, None, None, None]
        vae.quant_conv.bias[:8] = (vae.quant_conv.bias[:8] - centre) / spread
        vae.quant_conv.bias[8:] -= 2 * spread.log()


def encode(args: argparse.Namespace, vae: AutoencoderKL, films: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of every film's latents, float16 [N, 8, 16, 16] each; `key` tells sets of films apart."""
    cached = args.work_dir / f"latents-{key:016x}.safetensors"
    if not cached.exists():
        means, stds = zip(*posteriors(vae.to(memory_format=torch.channels_last), films), strict=True)
        write_bytes(cached, save_tensors({"means": torch.cat(means).half(), "stds": torch.cat(stds).half()}))
    stored = load_file(cached)
    return stored["means"], stored["stds"]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def make_tokenizer(args: argparse.Namespace, captions: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer of at most 1,024 byte pairs learnt from the captions and from sentences of our own."""
    folder = args.work_dir / "tokenizer"
    if not folder.is_dir():
        rng = random.Random(derive_seed(args.seed, "tokenizer"))
        corpus = [*captions, *(compose(rng)[0] for _ in range(20_000))]
        corpus += [caption(view, age, sex, []) for view in ("PA", "AP") for sex in "MF" for age in range(1, 100)]
        # Every byte that UTF-8 can end a word with, so that no word whatever is unknown
        corpus += [" ".join(chr(0x4E00 + i) for i in range(64)), " ".join(map(chr, range(0x21, 0x7F)))]
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        clip_words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(clip_words), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=1022,
            end_of_word_suffix="</w>",
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(corpus, trainer)

        def write(folder: Path) -> None:
            folder.mkdir()
            bpe.model.save(str(folder))
            vocabulary = json.loads((folder / "vocab.json").read_text())
            for special in ("<|startoftext|>", "<|endoftext|>"):
                vocabulary[special] = len(vocabulary)
            (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
            CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)

        write_folder(folder, write)
    return CLIPTokenizer.from_pretrained(folder)


class SentenceTask(nn.Module):
    """The text encoder's second task: what a sentence says, from its end, and the next token, from every token."""

    def __init__(self, width: int):
        super().__init__()
        per_finding = [len(PRESENCES), len(SIDES), len(ZONES)]
        self.sizes = [len(VIEWS), len(SEXES), len(AGES), *(size for _ in FINDINGS for size in per_finding)]
        self.heads = nn.Linear(width, sum(self.sizes))

    def loss(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, rng: random.Random, count: int) -> Tensor:
        """Return the cross-entropy of both over `count` new sentences, summed over the questions, a scalar."""
        texts, readings = zip(*(compose(rng) for _ in range(count)), strict=True)
        tokens = tokenizer(list(texts), return_tensors="pt", padding="longest").input_ids
        output = text_encoder(tokens)
        logits = output.last_hidden_state[:, :-1] @ text_encoder.get_input_embeddings().weight.T
        answers = self.heads(output.pooler_output)
        padding = (tokens[:, :-1] == tokenizer.eos_token_id).flatten()
        next_token = F.cross_entropy(logits.flatten(0, 1).float()[~padding], tokens[:, 1:].flatten()[~padding])
        said = torch.tensor([reading.answers for reading in readings])
        columns = answers.float().split(self.sizes, dim=1)
        # Most findings are not mentioned: the sum over questions keeps those that are from drowning
        reading = sum(F.cross_entropy(column, said[:, i]) for i, column in enumerate(columns))
        return next_token + reading


def train_text_encoder(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, SentenceTask]:
    """Return a text encoder that reads sentences, before it sees a film, and the task it learnt that by."""
    torch.manual_seed(derive_seed(args.seed, "text"))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder, task = CLIPTextModel(config), SentenceTask(config.hidden_size)
    parameters = [*text_encoder.parameters(), *task.parameters()]
    optimizers = make_optimizers([text_encoder, task], muon_lr=4e-3, adam_lr=2e-3)
    training = Training(args, "text", args.text_steps, [text_encoder, task], optimizers)
    for step in training.steps():
        rng = random.Random(derive_seed(args.seed, "text", step))
        loss = task.loss(text_encoder, tokenizer, rng, count=64)
        loss.backward()
        descend(optimizers, parameters, cosine(step, args.text_steps))
        training.record(loss=loss.detach())
    return text_encoder, task


# ---------------------------------------------------------------------------------------------------------------------
# UNet


def train_unet(
    args: argparse.Namespace,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    task: SentenceTask,
    means: Tensor,
    stds: Tensor,
    captions: list[str],
) -> UNet2DConditionModel:
    """Return the UNet, and leave in the text encoder what it learnt beside it; both are averages over the steps."""
    torch.manual_seed(derive_seed(args.seed, "unet"))
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=(2, 4, 5),  # heads, despite its name: of 32 channels each
        only_cross_attention=(True, False, False),  # self-attention over 16 x 16 is the dearest of all on a CPU
    ).to(memory_format=torch.channels_last)
    scheduler = make_scheduler()
    num_timesteps = scheduler.config.num_train_timesteps

    parameters = [p for module in (unet, text_encoder, task) for p in module.parameters()]
    unet_optimizers = make_optimizers([unet], muon_lr=2e-3, adam_lr=8e-4)
    text_optimizers = make_optimizers([text_encoder, task], muon_lr=5e-4, adam_lr=3e-4)
    optimizers = [*unet_optimizers, *text_optimizers]
    averages = [EMAModel(module.parameters(), decay=0.999) for module in (unet, text_encoder)]
    training = Training(args, "unet", args.unet_steps, [unet, text_encoder, task, *averages], optimizers)
    tokens = tokenize(tokenizer, captions)
    nothing = tokenize(tokenizer, [""])
    for step in training.steps():
        rng = np.random.default_rng(derive_seed(args.seed, "unet", step))
        index = torch.from_numpy(rng.integers(len(captions), size=32))  # a quarter of them bare
        draws = torch.from_numpy(rng.standard_normal((2, 32, 8, 16, 16), dtype=np.float32))
        timesteps = torch.from_numpy(rng.integers(num_timesteps, size=32))
        dropped = torch.from_numpy(rng.random(32) < 0.1)

        latents = means[index].float() + stds[index].float() * draws[0]
        noise = draws[1]
        noisy_latents = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        encoder_hidden_states = text_encoder(torch.where(dropped[:, None], nothing, tokens[index])).last_hidden_state
        with autocast():
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        loss = F.mse_loss(model_pred.float(), scheduler.get_velocity(latents, noise, timesteps))
        reading = None
        if step % 4 == 0:  # lest the words that no caption has be forgotten
            sentences = random.Random(derive_seed(args.seed, "sentences", step))
            reading = task.loss(text_encoder, tokenizer, sentences, count=32)
        (loss if reading is None else loss + 0.02 * reading).backward()
        descend(optimizers, parameters, cosine(step, args.unet_steps))
        for average, module in zip(averages, (unet, text_encoder), strict=True):
            average.step(module.parameters())
        training.record(loss=loss.detach())
    for average, module in zip(averages, (unet, text_encoder), strict=True):
        average.copy_to(module.parameters())
    return unet


def make_scheduler() -> DDPMScheduler:
    """Return the noise schedule of Stable Diffusion 1.5, with the velocity for a target (Salimans and Ho 2022).

    Where a film's layout is decided, in much noise, the noise itself is too easy a target: a base that predicted it, under
    Min-SNR 5, had a loss of 0.01 at t = 950, where the clean latents that this amounts to had an error of 1.19 (their mean
    in place of them: 1), and of 0.47 at t = 150. Its prompts hardly mattered. The velocity's is even, 0.5 to 1.2.
    """
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        timestep_spacing="leading", prediction_type="v_prediction",
    )  # fmt: skip


def save(
    args: argparse.Namespace,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Write the pipeline, in fp16 to be loaded in fp32, and the curves of its three parts."""
    for module in (vae, text_encoder, unet):
        module.half()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.output_dir)
    # diffusers loads in fp32 what it has no other order for, transformers in the type that the config names
    config = args.output_dir / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for stage in ("vae", "text", "unet"):
        curve = torch.load(args.work_dir / f"{stage}-state.pt", weights_only=True)["curve"]
        lines = "".join(json.dumps(row) + "\n" for row in curve)
        (args.output_dir / f"curve-{stage}.jsonl").write_text(lines)


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
