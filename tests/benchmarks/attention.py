"""PyTorch's kernels of attention on a CUDA device: time forward and backward, and gradients where scores are far below 0.

    python -m tests.benchmarks.attention

In bf16, at the shapes of Stable Diffusion 1.5 at 512 px and 16 films a step: tokens of queries and of keys, eight heads.
Times are medians of events. Then two films' scores of -7,200 / sqrt(width) and less: kernels of cuDNN that pad a tile
of tokens have gradients that are not finite there (`utils.kernels.leave_out_cudnn_attention`).

The bar: where `FullTilesAttnProcessor` lets cuDNN's kernels serve, and wherever others do, all gradients are finite.
"""

import argparse
import statistics
import sys

import utils.quiet  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.kernels import CUDNN_LEAST, CUDNN_TILE
from utils.refusal import ArgumentParser, Refused, run

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
SHAPES = [(4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (1024, 77, 80), (256, 256, 160), (64, 64, 160)]
TOKENS = [(n, n) for n in (4, 16, 64, 96, 128, 192, 256, 320, 1024, 4096)] + [(4096, 77), (256, 77), (16, 128)]
WIDTHS = (40, 64, 80, 160)
FILMS, HEADS = 16, 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each kernel [5]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise Refused("no CUDA device here, and the kernels are a CUDA device's")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")

    print(f"\n{'ms, forward and backward':<28}" + "".join(f"{name:>12}" for name in KERNELS))
    for queries, keys, width in SHAPES:
        inputs = [normal(FILMS, tokens, width) for tokens in (queries, keys, keys)]
        times = [median_ms(kernel, inputs, args.rounds) for kernel in KERNELS.values()]
        print(f"{f'{queries} x {keys}, {width} wide':<28}" + "".join(f"{time:>12.2f}" for time in times), flush=True)

    print(f"\n{'gradients not finite':<28}" + "".join(f"{name:>12}" for name in KERNELS))
    failures = []
    for queries, keys in TOKENS:
        counts = {
            name: sum(count_not_finite(kernel, queries, keys, width) for width in WIDTHS)
            for name, kernel in KERNELS.items()
        }
        print(f"{f'{queries} x {keys}':<28}" + "".join(f"{count:>12,}" for count in counts.values()), flush=True)
        full = all(tokens >= CUDNN_LEAST and tokens % CUDNN_TILE == 0 for tokens in (queries, keys))
        failures += [f"{name} at {queries} x {keys}" for name in counts if counts[name] and (full or name != "cuDNN")]
    print(f"fail: {', '.join(failures)}" if failures else "pass: what training takes has finite gradients")
    return int(bool(failures))


def normal(films: int, tokens: int, width: int, mean: Tensor | float = 0.0) -> Tensor:
    """Return random numbers about a mean, bf16 [films, heads, tokens, width], laid out as diffusers does."""
    numbers = torch.randn(films, tokens, HEADS, width, device="cuda") + mean
    return numbers.bfloat16().transpose(1, 2).requires_grad_()


def attend(kernel: SDPBackend, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values."""
    with sdpa_kernel(kernel):
        output = F.scaled_dot_product_attention(*inputs)
    return torch.autograd.grad(output, inputs, gradient)


def median_ms(kernel: SDPBackend, inputs: list[Tensor], rounds: int) -> float:
    times, gradient = [], torch.randn_like(inputs[0])
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        attend(kernel, inputs, gradient)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def count_not_finite(kernel: SDPBackend, queries: int, keys: int, width: int) -> int:
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(width, device="cuda"), dim=0)
    inputs = [
        normal(2, queries, width, 120 * direction), normal(2, keys, width, -60 * direction), normal(2, keys, width)
    ]  # fmt: skip
    gradients = attend(kernel, inputs, torch.randn_like(inputs[0]))
    return sum(int((~gradient.isfinite()).sum()) for gradient in gradients)


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
