"""LoRA training of Stable Diffusion 1.5 at 512 px on a CUDA device: images/s, share of the device's ceiling, memory.

    python -m tests.benchmarks.training_cuda

The models are those of Stable Diffusion 1.5 by its published configuration, with weights drawn at random: they cost
what the real ones cost. Rows are the two sides of tests/benchmarks/training.py, diffusers' script and train_lora.py
with each saving added in turn, LoRA of rank 16 on the attention of UNet and text encoder, in bf16. Both sides find the
films decoded on the device, so that the peer does not wait for a disk. The peer takes PyTorch's own choice of attention,
ours, as in training, cuDNN's kernels only where tokens fill their tiles.

    speed   at 4 and 16 films a step; the peer and ours before it is compiled also at 1, and at the most that fit. Rows
            take turns; a turn is timed by events of the device. The rows' losses come first, as they draw the same
            noise. "of the ceiling" is the arithmetic of UNet and text encoder, counted by `torch.utils.flop_counter`
            without the autoencoder and without what is computed twice, over what a bf16 matrix product of 8,192 does
            in the same minute.
    memory  train_lora.py itself, from its first start to a validation with samples, within the memory of an L4 and of
            an A100 at the batch size that launch/l4.yaml and launch/a100.yaml name.

The bars: at 4 and 16 films a step twice the peer, and 40 % of the ceiling; both runs of the memory part end, with a
tenth of the memory to spare.
"""

import argparse
import copy
import functools
import gc
import multiprocessing
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import utils.quiet  # noqa: F401

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import train_lora
from tests.benchmarks.training import (
    COMPILED,
    GRAPH,
    PEER,
    call,
    demo_stream,
    distance,
    ours,
    peer,
    read_pixel_values,
)
from utils.hardware import largest_batch_size
from utils.pipeline import BUNDLED_BASE, ROOT, BaseModel, assemble, load_base
from utils.refusal import ArgumentParser, Refused, run

RESOLUTION, SNR_GAMMA = 512, 5.0
WARM_UP_STEPS, TURN_STEPS = 4, 5
ROWS = {
    "latents cached": ("latents",),
    "nothing read from the device": ("tokens", "weights", "loss"),
    "fused AdamW": ("fused",),
    "LoRA in two products": ("lora",),
    "channels_last": ("channels_last",),
    "batches read ahead: train_lora.py": ("prefetch",),
    "--cuda_graph": (GRAPH,),
    "--compile": (COMPILED,),
}  # savings of tests.benchmarks.training.ours that a row adds to the one before
SPEED_BAR, CEILING_BAR, SAME_BAR = 2.0, 0.4, 1e-2
CARDS = {"l4": 22.0, "a100": 38.0}  # GiB that a program gets of 24 and 40
SPARE_BAR = 0.1
GIB = 2**30


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["speed", "memory"], default=["speed", "memory"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16], help="films a step of all rows [4 16]")
    last = [savings[-1] for savings in ROWS.values()]
    parser.add_argument(
        "--rows", nargs="*", choices=last, default=last, help="beside the peer and 'nothing saved' [all]"
    )
    parser.add_argument("--most", type=int, default=128, help="films a step that the search begins at; 0: none [128]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of five steps [5]")
    parser.add_argument("--compile_at", type=int, nargs="*", default=[4, 16], help="with a compiled row [4 16]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise Refused("no CUDA device here; tests.benchmarks.training is the same on a CPU")
    passed, failed = [], []

    def judge(good: bool, what: str) -> None:
        (passed if good else failed).append(what)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train_lora.py in bf16
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        data, cache = Path(temporary) / "data", Path(temporary) / "cache"
        call("download.py", "--output_dir", data, "--cache_dir", cache, "--resolution", RESOLUTION)
        base = stable_diffusion("cuda")
        if "speed" in args.parts:
            speed(args, base, data, cache, judge)
        if "memory" in args.parts:
            folder = Path(temporary) / "base"
            assemble(base).save_pretrained(folder)
            del base
            torch.cuda.empty_cache()
            for card, gib in CARDS.items():
                fits_within(card, gib, folder, data, cache, Path(temporary) / card, judge)
    print(f"{'fail' if failed else 'pass'}: {'; '.join([*(f'{what}: below the bar' for what in failed), *passed])}")
    return int(bool(failed))


def stable_diffusion(device: str) -> BaseModel:
    """Return models of the size and the schedule of Stable Diffusion 1.5, with random weights in fp32."""
    tokenizer = copy.deepcopy(load_base(BUNDLED_BASE).tokenizer)
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    with torch.device(device):
        return BaseModel(
            name="Stable Diffusion 1.5, random weights",
            tokenizer=tokenizer,
            noise_scheduler=DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, projection_dim=768,
                )
            ),
            vae=AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=RESOLUTION,
            ),
            unet=UNet2DConditionModel(sample_size=RESOLUTION // 8, cross_attention_dim=768),
        )  # fmt: skip


# Speed


@dataclass
class Row:
    """A side that takes steps, and what is known of it."""

    take_steps: Callable[[int], list[float]]
    losses: list[float]  # of the first steps
    peak: int  # bytes in the first steps; a graph's own do not show later
    seconds: list[float] = field(default_factory=list)  # of each turn


def speed(args: argparse.Namespace, base: BaseModel, data: Path, cache: Path, judge: Callable) -> None:
    """Print a table a batch size, and judge."""
    ceiling = matmul_flops()
    print(f"ceiling: {ceiling / 1e12:.0f} TFLOP/s, a bf16 matrix product of 8,192", flush=True)
    pixels = functools.cache(lambda path, resolution: read_pixel_values(path, resolution).cuda())

    def build(savings: Sequence[str] | None, batch_size: int) -> Row:
        before = torch.cuda.memory_allocated()
        make_base = functools.partial(copy.deepcopy, base)
        if savings is None:
            take_steps = peer(make_base, data, batch_size, "bf16", SNR_GAMMA, pixels)
        else:
            stream = (demo_stream, data, cache)
            take_steps = ours(make_base, stream, savings, batch_size, "bf16", SNR_GAMMA, pixels)
        take_steps = functools.partial(with_attention, take_steps, savings is None)
        torch.cuda.reset_peak_memory_stats()
        losses = take_steps(WARM_UP_STEPS)
        return Row(take_steps, losses, torch.cuda.max_memory_allocated() - before)

    saved: list[str] = []
    columns: dict[str, Sequence[str] | None] = {PEER: None, "ours, nothing saved": ()}
    for name, savings in ROWS.items():
        saved += savings
        columns[f"+ {name}"] = tuple(saved)
    launched, compiled = (f"+ {name}" for name in list(ROWS)[-2:])

    demo_stream(base, data, cache)  # fills the cache
    for path in sorted(data.glob("**/*.png")):
        pixels(path, RESOLUTION)
    counted = [saving for saving in saved[:-2] if saving != "lora"]  # whose product in place is not counted
    flops = flops_a_film(build(counted, 2).take_steps, 2)
    print(f"arithmetic of a film: {flops / 1e12:.2f} TFLOP", flush=True)

    def compare(names: Sequence[str], batch_size: int) -> dict[str, Row]:
        release()
        rows = {name: build(columns[name], batch_size) for name in names}
        for _ in range(args.rounds):
            for row in rows.values():
                turn(row)
        print_table(rows, batch_size, flops, ceiling)
        return rows

    left_out = {f"+ {name}" for name, savings in ROWS.items() if savings[-1] not in args.rows}
    wanted = [name for name in columns if name not in left_out]
    for batch_size in args.batch_sizes:
        rows = compare([name for name in wanted if name != compiled or batch_size in args.compile_at], batch_size)
        mine = [row.losses for name, row in rows.items() if name != PEER]
        apart = max(distance(losses, mine[0]) for losses in mine)
        judge(apart <= SAME_BAR, f"{batch_size} films a step: {len(mine)} rows have the same losses to {apart:.0e}")
        best = list(rows.values())[-1]
        times = statistics.median(a / b for a, b in zip(rows[PEER].seconds, best.seconds, strict=True))
        share = flops * batch_size * TURN_STEPS / statistics.median(best.seconds) / ceiling
        judge(times >= SPEED_BAR, f"{batch_size} films a step: {times:.2f} times the peer (bar {SPEED_BAR:g})")
        judge(share >= CEILING_BAR, f"{batch_size} films a step: {share:.0%} of the ceiling (bar {CEILING_BAR:.0%})")
        del rows, mine, best

    # One film a step, and the most that fit, each side alone on the device
    compare([name for name in (PEER, launched) if name in wanted], 1)
    for name in (PEER, launched) if args.most else ():

        def attempt(size: int, savings: Sequence[str] | None = columns[name]) -> None:
            release()
            build(savings, size)

        compare([name], largest_batch_size(attempt, args.most, args.most))


def with_attention(take_steps: Callable[[int], list[float]], cudnn: bool, steps: int) -> list[float]:
    """Take steps with PyTorch's own choice of attention, as the peer does, or as train_lora.py chooses."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    return take_steps(steps)


def turn(row: Row) -> None:
    """Let a side take its steps, timed by the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    row.take_steps(TURN_STEPS)
    end.record()
    end.synchronize()
    row.seconds.append(begin.elapsed_time(end) / 1000)


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def print_table(rows: dict[str, Row], batch_size: int, flops: float, ceiling: float) -> None:
    films, first = batch_size * TURN_STEPS, next(iter(rows.values()))
    mine = [row for name, row in rows.items() if not name.startswith(PEER)]
    head = f"{batch_size} films a step"
    print(f"\n{head:<36}{'images/s':>9} {'range':<17}{'times':>6}{'of the ceiling':>16}{'peak GiB':>10}  loss apart")
    for name, row in rows.items():
        rates = [films / seconds for seconds in row.seconds]
        median, span = statistics.median(rates), f"({min(rates):.1f} to {max(rates):.1f})"
        times = statistics.median(a / b for a, b in zip(first.seconds, row.seconds, strict=True))
        apart = f"{distance(row.losses, mine[0].losses):.0e}" if row in mine else ""
        print(
            f"{name:<36}{median:>9.1f} {span:<17}{times:>6.2f}{median * flops / ceiling:>16.0%}"
            f"{row.peak / GIB:>10.1f}  {apart}",
            flush=True,
        )


def matmul_flops(size: int = 8192, repeats: int = 20) -> float:
    """Return the operations a second of a bf16 matrix product of random numbers, the median of `repeats`."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return 2 * size**3 / statistics.median(seconds[3:])


def flops_a_film(take_steps: Callable[[int], list[float]], batch_size: int) -> float:
    """Return the operations of a step, forward and backward, a film."""
    with FlopCounterMode(display=False) as counter:
        take_steps(1)
    return counter.get_total_flops() / batch_size


# Memory


def fits_within(card: str, gib: float, base: Path, data: Path, cache: Path, run_dir: Path, judge: Callable) -> None:
    """Run train_lora.py as a card's configuration says, within that card's memory, and judge."""
    flags = re.search(r"train_lora\.py (.*)", (ROOT / "launch" / f"{card}.yaml").read_text()).group(1).split()
    command = [*flags, "--pretrained_model_name_or_path", base, "--train_data_dir", data, "--cache_dir", cache]
    command += ["--output_dir", run_dir, "--mixed_precision", "bf16", "--rank", 16, "--text_encoder_rank", 16]
    command += ["--max_train_steps", 6, "--validation_steps", 6, "--max_validation_samples", 16]
    command += ["--max_train_samples", 64, "--report_to", "none"]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train_within, args=(theirs, gib, list(map(str, command))))
    process.start()
    theirs.close()
    try:
        peak, failure = ours.recv()
    except EOFError:
        peak, failure = 0.0, "it ended without a word"
    process.join()
    print(f"{card}: {' '.join(flags)}: {failure or f'peak {peak:.1f} of {gib:g} GiB'}", flush=True)
    judge(not failure and peak <= (1 - SPARE_BAR) * gib, f"{card}: {failure or f'{peak:.1f} of {gib:g} GiB'}")


def train_within(connection, gib: float, command: list[str]) -> None:
    """Run train_lora.py in this process, which may take `gib` GiB, and send its peak in GiB and why it failed."""
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    failure = ""
    try:
        train_lora.main(train_lora.parse_args(command))
    except Refused as refusal:
        failure = str(refusal)
    connection.send((torch.cuda.max_memory_allocated() / GIB, failure))


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
