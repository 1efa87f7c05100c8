"""Images a second, and the time to the first one: generate.py beside the stock pipeline.

    python -m tests.benchmarks.generation

The bundled base with a LoRA of rank 16 on UNet and text encoder, 25 steps of DPM-Solver++, guidance 4, fp32 on a CPU and bf16 on
a GPU that computes in it. The peer is diffusers' StableDiffusionPipeline as its documentation has it: from_pretrained,
load_lora_weights, one call a batch. Both draw the same prompts from the same noise, and must agree to a grey level in fp32
before anything is timed; then they take turns. First images are timed from the start of a process, generate.py's own and that of a
script of ten lines.

The bar: 1.5 times the peer's images a second at 8 images at a time.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import generate
from utils.hardware import choose_mixed_precision, keep_freed_memory, use_all_cores
from utils.lora import adapter_state, add_lora, save_adapter
from utils.pipeline import BUNDLED_BASE, ROOT, load_base, sample_pictures
from utils.refusal import ArgumentParser, run
from utils.release import WEIGHTS_NAME

PROMPT = "PA chest radiograph of a 60-year-old man. Cardiomegaly."
STEPS, GUIDANCE, RANK = 25, 4.0, 16
BAR, BAR_AT = 1.5, 8

SCRIPT = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline.load_lora_weights(sys.argv[2])
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline(sys.argv[3], num_inference_steps=25, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)).images[0]
image.convert("L").save(sys.argv[4])
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images at a time [1 8]")
    parser.add_argument("--rounds", type=int, default=6, help="of a batch, each in turn [6]")
    parser.add_argument("--first", type=int, default=3, help="first images, each in a process of its own [3]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        lora = write_adapter(Path(folder))
        accelerator = Accelerator(mixed_precision=choose_mixed_precision(None))
        if accelerator.device.type == "cpu":
            use_all_cores()
            keep_freed_memory()
        drawing = generate.parse_args(["--prompt", PROMPT, "--lora", str(lora)])
        pipeline, model, _ = generate.load_model(drawing, accelerator)
        stock = stock_pipeline(lora, accelerator)

        def ours(size: int) -> np.ndarray:
            pictures = sample_pictures(
                pipeline, [PROMPT] * size, range(size), model["resolution"], STEPS, GUIDANCE, size
            )
            return np.stack([generate.grey_levels(picture[None])[0].numpy() for picture in pictures])

        def theirs(size: int) -> np.ndarray:
            generators = [torch.Generator().manual_seed(seed) for seed in range(size)]
            images = stock(
                [PROMPT] * size, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators
            ).images
            return np.stack([np.asarray(image.convert("L"), dtype=int) for image in images])

        apart = np.abs(ours(2) - theirs(2)).max()
        print(f"{accelerator.mixed_precision} on {accelerator.device.type}: {apart} grey levels apart at most")
        if accelerator.mixed_precision == "no" and apart > 1:
            print("fail: the two do not draw the same images")
            return 1
        print(f"{'images at a time':>18}{'stock, images/s':>18}{'ours':>8}{'ours / stock':>14}")
        ratios = {size: compare(theirs, ours, size, args.rounds) for size in args.batch_sizes}
        seconds = {name: [] for name in ("stock", "ours")}
        for number in range(args.first):
            image = Path(folder) / f"{number}.png"
            script = [sys.executable, "-c", SCRIPT, BUNDLED_BASE, str(lora), PROMPT, str(image)]
            command = [sys.executable, "generate.py", "--prompt", PROMPT, "--lora", str(lora), "--batch_size", "1",
                       "--output_dir", str(image.with_suffix(""))]  # fmt: skip
            for name, words in (("stock", script), ("ours", command)):
                start = time.perf_counter()
                subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
        if args.first:
            stock_s, ours_s = (statistics.median(values) for values in seconds.values())
            print(f"first image, from the start of a process: stock {stock_s:.1f} s, ours {ours_s:.1f} s")
    ratio = ratios.get(BAR_AT)
    passed = ratio is not None and ratio >= BAR
    said = "not measured" if ratio is None else f"{ratio:.2f} times the stock pipeline"
    print(f"{'pass' if passed else 'fail'}: at {BAR_AT} images {said} (bar {BAR})")
    return 0 if passed else 1


def compare(theirs, ours, size: int, rounds: int) -> float:
    """Print a row: images a second of both, in turn, and return the median ratio."""
    rates = {name: [] for name in ("stock", "ours")}
    for number in range(rounds + 1):
        for name, draw in (("stock", theirs), ("ours", ours)):
            start = time.perf_counter()
            draw(size)
            if number:  # the first round warms up
                rates[name].append(size / (time.perf_counter() - start))
    ratio = statistics.median(fast / slow for slow, fast in zip(rates["stock"], rates["ours"], strict=True))
    stock, fast = (statistics.median(values) for values in rates.values())
    print(f"{size:>18}{stock:>18.2f}{fast:>8.2f}{ratio:>14.2f}", flush=True)
    return ratio


def write_adapter(folder: Path) -> Path:
    """Save an adapter of random weights, small enough for films to stay films, and return its folder."""
    base = load_base(BUNDLED_BASE)
    parameters = add_lora(base.unet, RANK, RANK, seed=0) + add_lora(base.text_encoder, RANK, RANK, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    settings = {"revision": None, "variant": None, "prediction_type": None}
    header = {"base": BUNDLED_BASE, "settings": settings, "resolution": base.resolution}
    save_adapter(folder / "adapter" / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), header)
    return folder / "adapter"


def stock_pipeline(lora: Path, accelerator: Accelerator) -> StableDiffusionPipeline:
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / BUNDLED_BASE, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device, dtype)


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
