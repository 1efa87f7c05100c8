"""What parts of the training recipe are worth: validation SSIM and MSE with and without each, over seeds.

    python -m tests.benchmarks.recipe --data FOLDER

FOLDER is a set that download.py wrote. Three variants of train_lora.py are trained for each seed: the reference (Min-SNR,
LoRA on UNet and text encoder), one without the text encoder's LoRA and one without Min-SNR. Two more questions are read
off the same runs: every checkpoint is scored with the adapters as they are and with their moving average, and the best of
each with the base's own decoder and with one fitted to the same fold's training films. Of each run what counts is the
best of its validations, as in train_lora.py. The held-out fold is not touched. The bar is none: defaults follow the table.
Typed again with the same --work, finished runs are not trained again. An hour or two on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import utils.quiet  # noqa: F401

import torch

from utils.checkpoint import load_checkpoint
from utils.decoder import adapt_decoder, decoder_state, put_on_decoder, score_round_trip
from utils.files import read_jsonl, write_json
from utils.folds import draw_rows, split_fold, with_folds
from utils.hardware import use_all_cores
from utils.latents import FilmDataset, cache_posteriors
from utils.lora import add_lora, trainable_tensors
from utils.metadata import read_metadata
from utils.pipeline import ROOT, BaseModel, load_base
from utils.refusal import ArgumentParser, run
from utils.tokens import tokenize
from utils.validation import HEADLINE, FilmBank, eval_mode, film_bank, score_model, summarise

VARIANTS = {
    "reference": ("--snr_gamma", "5"),
    "without text-encoder LoRA": ("--snr_gamma", "5", "--text_encoder_rank", "0"),
    "without Min-SNR": ("--snr_gamma", "0"),
}
METRICS = ("ssim", "mse")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that download.py wrote")
    parser.add_argument("--fold", type=int, default=0, help="held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="at most [train_lora.py's own]")
    parser.add_argument("--decoder_steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=Path("out/recipe"), help="folder of the runs [out/recipe]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    use_all_cores()
    scores = {}
    for seed in args.seeds:
        for variant, flags in VARIANTS.items():
            run_dir = args.work / f"{variant.replace(' ', '-')}-{seed}"
            train(args, run_dir, seed, flags)
            if not (run_dir / "recipe.json").exists():
                write_json(run_dir / "recipe.json", score_run(args, run_dir, seed))
            scores[variant, seed] = json.loads((run_dir / "recipe.json").read_text(encoding="utf-8"))
            print(f"{variant}, seed {seed}: {scores[variant, seed]}", flush=True)
    table(scores, args.seeds)
    return 0


def train(args: argparse.Namespace, run_dir: Path, seed: int, flags: tuple[str, ...]) -> None:
    command = [sys.executable, "train_lora.py", "--train_data_dir", str(args.data), "--fold", str(args.fold)]
    command += ["--seed", str(seed), "--output_dir", str(run_dir), "--cache_dir", str(args.work / "cache"), *flags]
    command += ["--use_ema", "--checkpoints_total_limit", "0", "--num_validation_images", "0", "--report_to", "none"]
    command += ["--max_train_steps", str(args.steps)] if args.steps else []
    subprocess.run(command, cwd=ROOT, check=True)


def score_run(args: argparse.Namespace, run_dir: Path, seed: int) -> dict:
    """Return the best SSIM, with its MSE and step, of adapters and averages, both with an adapted decoder, and each step's."""
    settings = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["settings"]
    rows = with_folds(read_metadata(args.data), group_by="patient_id")
    training_rows, validation_rows, _ = split_fold(rows, args.fold, seed)
    validation_rows = draw_rows(validation_rows, settings["max_validation_samples"], seed)
    base = load_base(settings["pretrained_model_name_or_path"])
    vae, resolution = base.vae.to(memory_format=torch.channels_last).requires_grad_(False).eval(), base.resolution
    posteriors = cache_posteriors(args.data, rows, vae, args.work / "cache", resolution)
    place = {row["file_name"]: i for i, row in enumerate(rows)}
    places = [[place[row["file_name"]] for row in part] for part in (training_rows, validation_rows)]
    input_ids = tokenize(base.tokenizer, [row["text"] for row in validation_rows])
    bank = film_bank(
        args.data, validation_rows, posteriors, places[1], input_ids, vae.config.scaling_factor, resolution
    )
    base.unet.to(memory_format=torch.channels_last)
    add_lora(base.unet, settings["rank"], settings["lora_alpha"], 0, settings["lora_targets"])
    text_encoder_alpha = settings["lora_alpha"] * settings["text_encoder_rank"] / settings["rank"]
    add_lora(base.text_encoder, settings["text_encoder_rank"], text_encoder_alpha, 0)

    # The run itself validated the averages; the adapters behind them are in its checkpoints
    averages = {row["step"]: {name: row[name] for name in METRICS} for row in read_jsonl(run_dir / "validation.jsonl")}
    tensors = {step: load_checkpoint(run_dir / f"checkpoint-{step}")[1] for step in sorted(averages) if step > 0}
    adapters = {step: score(base, part["adapters"], bank) for step, part in tensors.items()}
    best = {}
    for kind, seen in (("adapters", adapters), ("averages", averages)):
        step = max(tensors, key=lambda step: seen[step]["ssim"])
        state = tensors[step]["adapters"]
        if kind == "averages":
            state = dict(zip(state, tensors[step]["ema"]["shadow_params"], strict=True))
        best[kind] = seen[step] | {"step": step}, state

    # The decoder sees neither the adapters nor the validation films' captions
    own = decoder_state(vae)
    before = score_round_trip(bank, vae, 16)["ssim"].mean().item()
    adapt_decoder(
        args.work / f"decoder-{seed}", vae, FilmDataset(args.data, training_rows, resolution), posteriors, places[0],
        bank, record={}, max_train_steps=args.decoder_steps, learning_rate=settings["adapt_decoder_lr"], seed=seed,
    )  # fmt: skip
    after = score_round_trip(bank, vae, 16)["ssim"].mean().item()
    by_step = {step: {"adapters": adapters[step], "averages": averages[step]} for step in tensors}
    results = {"films": len(bank), "ceiling": before, "adapted ceiling": after, "by_step": by_step}
    for kind, (seen, state) in best.items():
        results |= {kind: seen, f"{kind}, adapted decoder": score(base, state, bank) | {"step": seen["step"]}}
    put_on_decoder(vae, own)
    return results


def score(base: BaseModel, adapters: dict[str, torch.Tensor], bank: FilmBank) -> dict[str, float]:
    """Put adapters on and return the validation films' mean SSIM, rebuilt from half the noise, and MSE."""
    with torch.no_grad():
        for name, tensor in trainable_tensors(unet=base.unet, text_encoder=base.text_encoder).items():
            tensor.copy_(adapters[name])
    with eval_mode(base.unet, base.text_encoder):
        scores = score_model(
            bank, base.unet, base.text_encoder, base.vae, base.noise_scheduler, 16, strengths=(HEADLINE,)
        )
    return {name: value for name, value in summarise(scores).items() if name in METRICS}


def table(scores: dict[tuple[str, int], dict], seeds: list[int]) -> None:
    """Print means over seeds, and each difference from the reference with the adapters as they are, paired by seed."""
    kinds = ("adapters", "averages", "adapters, adapted decoder", "averages, adapted decoder")
    print(
        f"\n{'variant':<28}{'scored':<28}{'SSIM':>8}{'MSE':>9}{'best steps':>18}  against the reference, by seed: SSIM, MSE"
    )
    for variant in VARIANTS:
        for kind in kinds:
            ours = [scores[variant, seed][kind] for seed in seeds]
            reference = [scores["reference", seed]["adapters"] for seed in seeds]
            means = [statistics.fmean(row[name] for row in ours) for name in METRICS]
            apart = [
                ", ".join(f"{row[name] - other[name]:+.4f}" for row, other in zip(ours, reference, strict=True))
                for name in METRICS
            ]
            steps = " ".join(str(row["step"]) for row in ours)
            print(f"{variant:<28}{kind:<28}{means[0]:>8.4f}{means[1]:>9.4f}{steps:>18}  {apart[0]}; {apart[1]}")

    print(
        f"\n{'variant':<28}{'step':>6}{'seeds':>7}  SSIM, MSE of adapters and of averages, means over the seeds that got there"
    )
    for variant in VARIANTS:
        curves = [scores[variant, seed]["by_step"] for seed in seeds]
        for step in max(curves, key=len):
            there = [curve[step] for curve in curves if step in curve]
            means = [
                statistics.fmean(row[kind][name] for row in there)
                for kind in ("adapters", "averages")
                for name in METRICS
            ]
            print(f"{variant:<28}{step:>6}{len(there):>7}  " + "  ".join(f"{mean:.4f}" for mean in means))


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
