"""What this machine computes well in, and how much of it fits: precision, threads, packages, memory."""

import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import find_executable_batch_size, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size

from utils.refusal import Refused


def choose_mixed_precision(flag: str | None) -> str:
    """Return "no", "fp16" or "bf16": the flag, else what `accelerate` was told, else bf16 where it is computed natively.

    `accelerate launch` says "no" also when nobody asked, so its "no" counts as silence: fp32 is `--mixed_precision no`
    on the script's own command line.

    Raises:
        Refused: for fp16 without a CUDA device.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not flag and told in ("fp16", "bf16"):
        flag = told
    if flag == "fp16" and not is_cuda_used():
        raise Refused(
            "--mixed_precision fp16 needs a CUDA device and none is used here; use bf16 or no (a run that began in fp16 "
            "goes on on a CUDA device only)"
        )
    precision = flag or ("bf16" if has_native_bf16() else "no")
    if is_cuda_used() and not has_native_bf16() and (precision == "bf16" or not flag):
        costs = {
            "bf16": "bf16 is slow on it and attention takes many times the memory",
            "no": "fp32 takes twice the memory",
        }
        warnings.warn(
            f"this GPU has no hardware for bf16, and {costs[precision]}: take --mixed_precision fp16", stacklevel=1
        )
    return precision


def is_cuda_used() -> bool:
    """Return whether there is a CUDA device, and accelerate was not told to compute on the CPU nevertheless."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def has_native_bf16() -> bool:
    """Return whether matrix products in bfloat16 have hardware of their own: CUDA from Ampere on, or a CPU with AMX."""
    if is_cuda_used():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()  # private, but the only name under which torch tells


def use_all_cores() -> None:
    """Share this machine's cores between its processes, where the user set no OMP_NUM_THREADS.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 by themselves, which would leave all cores but one idle.
    """
    launched = not os.environ.keys().isdisjoint({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"})
    told = os.environ.get("OMP_NUM_THREADS")
    if told is None or (launched and told == "1"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = min(cores, int(os.environ.get("OMP_THREAD_LIMIT", cores)))  # more give NaN in bf16, not an error
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def count_local_processes(num_processes: int) -> int:
    """Return how many of a launch's processes are this machine's, which their launcher says where there are several."""
    return min(num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)))


def allow_tf32(allowed: bool) -> None:
    """Let CUDA's fp32 products and convolutions round to 10 bits of mantissa, or not; PyTorch lets convolutions by itself."""
    with warnings.catch_warnings():
        # PyTorch 2.9 asks for other names, and then raises where a library, such as its own compiler, reads these
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed, a gigabyte at most and in blocks of up to 32 MiB, for the next tensors.

    What one step frees the next asks for again. Handed back to the system meanwhile, each page comes back as a fault
    and is zeroed first, a tenth of the time of small steps on a CPU. CUDA's memory PyTorch keeps by itself.
    """
    if platform.libc_ver()[0] != "glibc":  # others have no such settings
        return
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_threshold, 32 * 2**20) and libc.mallopt(trim_threshold, 2**30)):
        warnings.warn("glibc does not keep freed memory (mallopt): steps on a CPU take somewhat longer", stacklevel=2)


def xformers_problem() -> str | None:
    """Return why xformers' attention cannot run here, or None where it can. PyTorch's SDPA serves everywhere.

    Tried out rather than looked up: a build for another torch imports well and fails at the first call, and cards that
    compute in fp16 may have no kernel for the fp32 that diffusers tries it with.
    """
    if not is_cuda_used():
        return "xformers has kernels for CUDA devices only"
    try:
        import xformers.ops

        for dtype in (torch.float32, torch.float16):
            query = torch.randn(1, 8, 1, 40, device="cuda", dtype=dtype, requires_grad=True)
            xformers.ops.memory_efficient_attention(query, query, query).sum().backward()
    except Exception as error:  # whatever a foreign kernel raises
        return f"xformers does not run here ({' '.join(str(error).split())[:160]})"
    return None


def warn_about_xformers(problem: str) -> None:
    """Say that PyTorch's scaled_dot_product_attention does xformers' work."""
    warnings.warn(f"{problem}: attention runs on PyTorch's scaled_dot_product_attention instead", stacklevel=2)


def choose_adamw(use_8bit: bool, device: torch.device) -> type[torch.optim.Optimizer]:
    """Return PyTorch's AdamW, or bitsandbytes' with 8-bit moments where asked for and able to run.

    8-bit moments (Dettmers et al. 2022, arXiv:2110.02861) save little here: matrices of fewer than 4,096 numbers keep
    32-bit ones. A bitsandbytes that is missing or broken is warned of, by name.
    """
    if use_8bit:
        try:
            from bitsandbytes.optim import AdamW8bit

            weight = torch.nn.Parameter(torch.zeros(64, 64, device=device))
            weight.grad = torch.zeros_like(weight)
            AdamW8bit([weight]).step()
        except Exception as error:  # whatever a foreign kernel raises
            reason = " ".join(str(error).split())[:160]
            warnings.warn(f"bitsandbytes does not run here ({reason}): AdamW keeps 32-bit moments", stacklevel=2)
        else:
            return AdamW8bit
    return torch.optim.AdamW


def compile_problem(device: torch.device) -> str | None:
    """Return why torch.compile cannot run here, or None where it can: it needs a C++ compiler, on CUDA Triton too."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler shows as one of many
        return " ".join(str(error).split())[:160]
    return None


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Refuse in one line what does not fit into memory. Serves as a decorator, too.

    Args:
        doing: what needed the memory: "training".
        advice: which flag lowers it.
    """
    try:
        yield
    except RuntimeError as error:
        if not (should_reduce_batch_size(error) or "out of memory" in str(error)):  # the latter is the driver's own
            raise
        raise Refused(f"out of memory while {doing}; {advice}") from error


def largest_batch_size(attempt: Callable[[int], None], films: int, most: int) -> int:
    """Return the largest number of films at a time that fits into memory and divides `films` evenly.

    Args:
        attempt: does with a batch of a size what training will; it runs out of memory or returns.
        films: of an optimizer step and a process.
        most: not more at a time than that.

    Raises:
        Refused: where not even one film fits.
    """
    sizes = [size for size in range(most, 0, -1) if films % size == 0]
    untried = iter(sizes[1:])

    def try_out(batch_size: int) -> int:
        attempt(batch_size)
        return batch_size

    try:
        search = find_executable_batch_size(
            try_out, starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(untried, 0)
        )
        return search()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise Refused(
            "out of memory with one film at a time; add --gradient_checkpointing, or lower --resolution"
        ) from error
