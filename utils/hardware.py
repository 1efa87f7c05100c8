"""What this machine computes well in: precision, threads, attention kernels, 8-bit moments."""

import os
import warnings

import torch

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
    if flag == "fp16" and not torch.cuda.is_available():
        raise Refused("--mixed_precision fp16 needs a CUDA device and there is none here; use bf16 or no")
    return flag or ("bf16" if has_native_bf16() else "no")


def has_native_bf16() -> bool:
    """Return whether matrix products in bfloat16 have hardware of their own: CUDA from Ampere on, or a CPU with AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()  # private, but the only name under which torch tells


def use_all_cores() -> None:
    """Share this machine's cores between its processes, where the user set no OMP_NUM_THREADS.

    `accelerate launch` sets OMP_NUM_THREADS=1 where it finds no GPU, which would leave all cores but one idle.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def xformers_problem() -> str | None:
    """Return why xformers' attention cannot run here, or None where it can. PyTorch's SDPA serves everywhere.

    Tried out rather than looked up: a build for another torch imports well and fails at the first call.
    """
    if not torch.cuda.is_available():
        return "xformers has kernels for CUDA devices only"
    try:
        import xformers.ops

        query = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.float16)
        xformers.ops.memory_efficient_attention(query, query, query)
    except Exception as error:  # whatever a foreign kernel raises
        return f"xformers does not run here ({' '.join(str(error).split())[:160]})"
    return None


def warn_about_xformers(problem: str) -> None:
    """Say that PyTorch's scaled_dot_product_attention does xformers' work."""
    warnings.warn(f"{problem}: attention runs on PyTorch's scaled_dot_product_attention instead", stacklevel=2)


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' AdamW with 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861).

    Matrices of fewer than 4,096 numbers keep 32-bit moments.

    Raises:
        Refused: where bitsandbytes is missing or does not load.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise Refused(
            f"--use_8bit_adam needs bitsandbytes, which does not load ({reason}); leave the flag out"
        ) from error
    return AdamW8bit
