"""LoRA steps of the bundled base with --mixed_precision bf16 and no, side by side: films/s, and the SSIM both gain.

    python -m tests.benchmarks.mixed_precision

First a step of the size of train_lora.py's, five at a time, the two precisions in turn; then whole runs of the script on
the demo set, with two seeds each. The bar: what train_lora.py takes where nobody asks is at most 5 % slower than the
other, and the precisions' gains in validation SSIM differ by no more than the seeds' do. Ten minutes on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils.quiet  # noqa: F401

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from utils.files import read_jsonl
from utils.hardware import choose_mixed_precision, use_all_cores
from utils.lora import add_lora
from utils.pipeline import BUNDLED_BASE, ROOT, cast_frozen, load_base
from utils.refusal import ArgumentParser
from utils.tokens import tokenize

PRECISIONS = ("bf16", "no")
FILMS = 16


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of five steps, each precision in turn")
    parser.add_argument("--train_steps", type=int, default=200, help="of the whole runs; 0 leaves them out")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    use_all_cores()
    five_steps = {precision: make_steps(precision) for precision in PRECISIONS}
    rates = {precision: [] for precision in PRECISIONS}
    for number in range(args.rounds + 1):
        for precision in PRECISIONS:
            start = time.perf_counter()
            five_steps[precision]()
            if number:  # the first round warms up
                rates[precision].append(5 * FILMS / (time.perf_counter() - start))
    for precision in PRECISIONS:
        low, high = min(rates[precision]), max(rates[precision])
        print(
            f"{precision:<5} {statistics.median(rates[precision]):6.1f} films/s, {low:.1f} to {high:.1f}, {args.rounds} rounds"
        )
    ratio = statistics.median(fast / slow for fast, slow in zip(rates["bf16"], rates["no"], strict=True))
    print(f"bf16 against no, by round: {ratio:.2f} times")

    apart = False
    if args.train_steps:
        gains = train_both(args.train_steps)
        between = abs(statistics.fmean(gains["bf16"]) - statistics.fmean(gains["no"]))
        seeds = max(abs(a - b) for a, b in gains.values())
        print(f"SSIM gained: precisions {between:.4f} apart, seeds up to {seeds:.4f}")
        apart = between > seeds
    default = choose_mixed_precision(None)
    slower = {"bf16": 1 / ratio, "no": ratio}[default] > 1.05
    print(f"{'fail' if slower or apart else 'pass'}: the default here is {default}")
    return int(slower or apart)


def make_steps(precision: str):
    """Return a function that takes five steps, forward, backward, clipping and AdamW, on latents made up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision)
    base = load_base(BUNDLED_BASE)
    unet = base.unet.to(memory_format=torch.channels_last)
    parameters = add_lora(unet, 16, 16, 0, "feed_forward") + add_lora(base.text_encoder, 8, 8, 1)
    cast_frozen(unet, precision)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(parameters, lr=1e-3, fused=True))
    text_encoder = accelerator.prepare_model(base.text_encoder)
    side = base.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(FILMS, base.unet.config.in_channels, side, side, generator=generator)
    timesteps = torch.randint(1000, (FILMS,), generator=generator)
    input_ids = tokenize(base.tokenizer, ["Chest radiograph of a child. Left pleural effusion."] * FILMS)

    def five_steps() -> None:
        for _ in range(5):
            model_pred = unet(latents, timesteps, text_encoder(input_ids)[0]).sample
            accelerator.backward(F.mse_loss(model_pred.float(), latents))
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return five_steps


def train_both(steps: int) -> dict[str, list[float]]:
    """Return what whole runs gained in validation SSIM, by precision, one of seed 0 and one of seed 1."""
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "data", Path(folder) / "cache"
        python = [sys.executable, "-u"]
        run = dict(cwd=ROOT, check=True, capture_output=True)
        subprocess.run([*python, "download.py", "--output_dir", data, "--cache_dir", cache], **run)
        gains = {precision: [] for precision in PRECISIONS}
        for seed in ("0", "1"):
            for precision in PRECISIONS:
                out = Path(folder) / f"{precision}-{seed}"
                start = time.perf_counter()
                subprocess.run(
                    [
                        *python, "train_lora.py", "--pretrained_model_name_or_path", BUNDLED_BASE, "--train_data_dir", data,
                        "--cache_dir", cache, "--output_dir", out, "--mixed_precision", precision, "--seed", seed,
                        "--max_train_steps", str(steps), "--validation_steps", str(steps), "--num_validation_images", "0",
                        "--report_to", "none",
                    ],
                    **run,
                )  # fmt: skip
                first, last = (row["ssim"] for row in read_jsonl(out / "validation.jsonl"))
                gains[precision].append(last - first)
                seconds = time.perf_counter() - start
                print(
                    f"{precision:<5} seed {seed}, {steps} steps: SSIM {first:.4f} to {last:.4f}, {seconds:.0f} s in all"
                )
    return gains


if __name__ == "__main__":
    sys.exit(main(parse_args()))
