"""What this machine computes well in: precision, threads, attention kernels."""

import importlib.util
import os
import warnings

import torch


def choose_mixed_precision(flag: str | None) -> str:
    """Return "no", "fp16" or "bf16": the flag, else what `accelerate` was told, else bf16 where it is computed natively.

    `accelerate launch` says "no" also when nobody asked, so its "no" counts as silence: fp32 is `--mixed_precision no`
    on the script's own command line.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if flag:
        return flag
    if told in ("fp16", "bf16"):
        return told
    return "bf16" if has_native_bf16() else "no"


def has_native_bf16() -> bool:
    """Return whether matrix products in bfloat16 have hardware of their own: CUDA from Ampere on, or a CPU with AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()


def use_all_cores(num_local_processes: int) -> None:
    """Share this machine's cores between its processes, where the user set no OMP_NUM_THREADS.

    `accelerate launch` sets OMP_NUM_THREADS=1 where it finds no GPU, which would leave all cores but one idle.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // num_local_processes))


def xformers_problem() -> str | None:
    """Return why xformers' attention cannot run here, or None where it can. PyTorch's SDPA serves everywhere."""
    if not torch.cuda.is_available():
        return "xformers has kernels for CUDA devices only"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return f"xformers does not import ({error})"
    return None


def warn_once_about_xformers(problem: str) -> None:
    """Say that PyTorch's scaled_dot_product_attention does xformers' work."""
    warnings.warn(f"{problem}: attention runs on PyTorch's scaled_dot_product_attention instead", stacklevel=2)
