"""Fine-tune LoRA adapters on the UNet and the text encoder of a Stable Diffusion, on captioned chest radiographs.

    accelerate launch train_lora.py --fold 2

Trains on every fold but --fold, less a tenth of the patients for validation, and writes to out/fold2/ (--output_dir):

    pytorch_lora_weights.safetensors   the best adapter by validation SSIM; loads in any StableDiffusionPipeline
    kohya_lora_weights.safetensors     the same for A1111 and ComfyUI (--export kohya)
    vae_decoder.safetensors            a decoder fitted to the films (--adapt_decoder_steps)
    README.md                          its model card
    config.json                        what was asked, on which data, with which versions
    log.jsonl, validation.jsonl        a row an optimizer step, a row a validation
    curves.png, samples/               the same as pictures
    checkpoint-<step>/                 what the same command, typed again, goes on from, exactly
    logs/                              for TensorBoard

In --help, [ ] is what a flag is where it is not given. Most runs need no more than --fold, --train_batch_size,
--learning_rate, --max_train_steps and --rank.
"""

import argparse
import importlib.util
import json
import math
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPTextModel

from utils.boxes import read_boxes
from utils.card import public_base, public_settings, write_card
from utils.checkpoint import (
    amend_checkpoint,
    clear_run,
    find_start,
    go_back_to,
    prune_checkpoints,
    save_checkpoint,
)
from utils.decoder import adapt_decoder
from utils.diffusion import min_snr_weights
from utils.early_stopping import EarlyStopping
from utils.export import save_kohya, verify_adapter
from utils.files import (
    append_jsonl,
    canonical_json,
    hold_lock,
    read_jsonl,
    require_space,
    require_writable,
    write_json,
)
from utils.folds import draw_rows, shuffle_captions, split_fold, with_folds
from utils.hardware import (
    allow_tf32,
    choose_adamw,
    choose_mixed_precision,
    compile_problem,
    count_local_processes,
    explain_out_of_memory,
    keep_freed_memory,
    largest_batch_size,
    use_all_cores,
    warn_about_xformers,
    xformers_problem,
)
from utils.hub import push
from utils.interrupt import LeaveRequest, explain_lost_process
from utils.kernels import capture_graph, compile_blocks, leave_out_cudnn_attention
from utils.latents import (
    FilmDataset,
    TrainingStream,
    cache_posteriors,
    channel_statistics,
    deal_positions,
    hash_weights,
    mean_film,
    prefetch,
)
from utils.linear import use_frozen_products
from utils.lora import (
    UNET_TARGETS,
    adapter_state,
    add_lora,
    parameter_groups,
    read_adapter,
    save_adapter,
    trainable_tensors,
)
from utils.metadata import dataset_hash, read_metadata
from utils.pipeline import (
    BUNDLED_BASE,
    BaseModel,
    assemble,
    canonical_name,
    cast_frozen,
    default_base,
    load_base,
    sample,
    with_schedule,
)
from utils.refusal import ArgumentParser, Refused, run
from utils.release import DECODER_NAME, KOHYA_NAME, WEIGHTS_NAME, why_not_upload
from utils.report import contact_sheet, draw_curves, save_png
from utils.runlog import package_versions, precision_name, read_config
from utils.seeding import derive_seed
from utils.tokens import TokenizedCaptions, tokenize
from utils.validation import HEADLINE, FilmBank, eval_mode, film_bank, score_bounds, score_model, summarise

# What a run takes where the command line is silent
RECIPES = {
    "cxr-tiny": dict(
        max_train_steps=1000, learning_rate=4e-3, text_encoder_lr=2e-3, lora_targets="feed_forward", snr_gamma=0.0,
        adapt_decoder_lr=1e-3,
    ),
    "stable-diffusion": dict(
        max_train_steps=4000, learning_rate=1e-4, text_encoder_lr=1e-5, lora_targets="attention", snr_gamma=5.0,
        adapt_decoder_lr=1e-4,
    ),
}  # fmt: skip
SAMPLE_PROMPTS = (
    "PA chest radiograph of a 60-year-old man. No acute finding.",
    "PA chest radiograph of a 60-year-old man. Cardiomegaly.",
    "AP chest radiograph of a 30-year-old woman. Pneumonia.",
)
LR_SCHEDULERS = [kind.value for kind in SchedulerType]
INTERPOLATIONS = ["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]
TRACKERS = ["tensorboard", "wandb", "comet_ml", "all", "none"]
FLUSH_EVERY = 25  # steps between reads of the loss, each of which waits for the device

# Settings that may differ between a run and its resume: where, how and in what portions, not what it learns
FREE_SETTINGS = {
    "train_data_dir", "dataset_name", "output_dir", "logging_dir", "report_to", "cache_dir", "checkpointing_steps",
    "checkpoints_total_limit", "dataloader_num_workers", "resume_from_checkpoint", "overwrite", "push_to_hub",
    "hub_token", "hub_model_id", "local_rank", "train_batch_size", "gradient_accumulation_steps", "auto_batch_size",
    "gradient_checkpointing", "cuda_graph", "validation_batch_size", "num_validation_images", "validation_prompt",
    "export",
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line: the flags of diffusers' train_text_to_image_lora.py, and ours."""
    usage = "accelerate launch train_lora.py [FLAG ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", default="data", help="folder of images and metadata.jsonl, from download.py [data]")
    add("--dataset_name", help="the same folder, by the name that diffusers' script gives it")
    add("--fold", type=int, default=0, help="patients kept out of training, for evaluate.py alone [0]")
    add("--group_by", choices=["patient_id", "image"], default="patient_id", help="image: each is its own patient")
    add("--image_column", default="file_name", help="column of the image's file name [file_name]")
    add("--caption_column", default="text", help="column of the caption [text]")
    add("--max_train_samples", type=int, help="train on at most so many films, drawn by --seed")
    add("--max_validation_samples", type=int, default=64, help="validate on at most so many films [64]")
    add("--cache_dir", help="where latents (and hub downloads, if given) are kept [cache]")

    add = parser.add_argument_group("base model").add_argument
    add(
        "--pretrained_model_name_or_path", metavar="BASE", help="folder or hub id [SD 1.5 with CUDA, else the bundled]"
    )
    add("--revision", help="branch, tag or commit of the base on the hub")
    add("--variant", help="infix of the base's weight files, such as fp16")
    add("--resolution", type=int, help="side of the films in pixels [the base's own]")
    add("--center_crop", action="store_true", help="for diffusers' command lines: films are centred in any case")
    add("--random_flip", action="store_true", help="mirror half of the films; puts the heart on the right")
    add("--image_interpolation_mode", default="lanczos", choices=INTERPOLATIONS, help="[lanczos]")

    add = parser.add_argument_group("adapters").add_argument
    add("--rank", type=int, default=16, help="rank of the UNet's adapter [16]")
    add("--lora_alpha", type=float, help="the update is scaled by alpha / rank [the rank]")
    add(
        "--lora_targets",
        choices=list(UNET_TARGETS),
        help="layers of the UNet with LoRA, each choice with those before it [attention; for the bundled base feed_forward]",
    )
    add("--text_encoder_rank", type=int, default=8, help="rank of the text encoder's adapter; 0 freezes it [8]")
    add("--train_text_encoder_frac", type=float, default=1.0, help="share of the steps in which it learns [1]")
    add(
        "--lora_dropout",
        type=float,
        default=0.0,
        help="share of an adapter's inputs that a step leaves out; resume with the same batch size and processes [0]",
    )
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank), not alpha / rank")
    add("--use_dora", action="store_true", help="adapt magnitude and direction of the UNet's weights apart; slower")
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="validate and keep the moving average of the adapters, not the adapters of a step [on]",
    )
    add("--ema_decay", type=float, default=0.999, help="its decay is 1 - step^(-2/3), and at most this [0.999]")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="[what the base's scheduler says]")
    add("--rescale_betas_zero_snr", action="store_true", help="end the schedule in noise alone; for velocity models")
    add("--snr_gamma", type=float, help="Min-SNR weighting; 0 weighs all alike [0 for the bundled base, else 5]")
    add(
        "--box_loss_weight",
        type=float,
        default=0.0,
        help="weight of the mean error in each box (column boxes), however small, beside that of the whole film [0]",
    )
    add("--noise_offset", type=float, default=0.0, help="standard deviation of a shift of the noise per channel [0]")
    add(
        "--input_perturbation",
        type=float,
        default=0.0,
        help="standard deviation of noise on the input that is not in the target [0]",
    )
    add("--caption_dropout", type=float, default=0.1, help="share of captions left empty, for guidance [0.1]")
    add("--sentence_dropout", type=float, default=0.0, help="share of sentences, but the first, left out [0]")
    add("--shuffle_captions", action="store_true", help="a control: deal the training films' captions out at random")

    add = parser.add_argument_group("decoder").add_argument
    add("--adapt_decoder_steps", type=int, default=0, help="train the decoder first, so many steps of 8 films [0]")
    add("--adapt_decoder_lr", type=float, help="its learning rate [1e-3 for the bundled base, else 1e-4]")

    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=int, default=16, help="films at a time on each process [16]")
    add("--gradient_accumulation_steps", type=int, default=1, help="such batches per optimizer step [1]")
    add("--max_train_steps", type=int, help="optimizer steps [1000 for the bundled base, else 4000]")
    add("--num_train_epochs", type=int, help="the same in passes over the films; --max_train_steps wins")
    add("--learning_rate", type=float, help="of the UNet's adapter [4e-3 for the bundled base, else 1e-4]")
    add("--text_encoder_lr", type=float, help="of the text encoder's [2e-3 for the bundled base, else 1e-5]")
    add("--loraplus_lr_ratio", type=float, default=1.0, help="LoRA+: rate of the B matrices over that of the A [1]")
    add("--scale_lr", action="store_true", help="multiply both by the films of an optimizer step")
    add("--lr_scheduler", default="cosine", choices=LR_SCHEDULERS, help="[cosine]")
    add("--lr_warmup_steps", type=int, help="steps of linear warm-up [5 %% of the steps]")
    add("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts [1]")
    add("--lr_power", type=float, default=1.0, help="power of polynomial [1]")
    add("--lr_step_rules", help="of piecewise_constant, as factor:step,...,factor, such as 1:500,0.1:800,0.01")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit moments, by bitsandbytes")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment [0.9]")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment [0.999]")
    add("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay [0.01]")
    add("--adam_epsilon", type=float, default=1e-8, help="[1e-8]")
    add("--max_grad_norm", type=float, default=1.0, help="L2 norm that the gradient is clipped to [1]")
    add("--seed", type=int, default=0, help="seed of everything random [0]")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_steps", type=int, help="optimizer steps between validations [a tenth of the steps]")
    add("--validation_epochs", type=int, help="the same in passes over the films")
    add("--validation_batch_size", type=int, default=16, help="films at a time [16]")
    add("--validation_prompt", action="append", help="prompt of the sample grid; repeat for more [three of ours]")
    add("--num_validation_images", type=int, default=4, help="samples a prompt; 0 draws none [4]")
    add(
        "--early_stopping_patience",
        type=int,
        default=3,
        help="stop after so many validations without a gain in SSIM; 0: never [3]",
    )

    add = parser.add_argument_group("hardware").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="no is fp32 [accelerate's, else bf16 where native]")
    add(
        "--allow_tf32",
        action=argparse.BooleanOptionalAction,
        help="TensorFloat-32 matrix products on Ampere and later [with bf16 and fp16]",
    )
    add("--compile", action="store_true", help="compile the UNet's blocks: a minute or two first, then faster steps")
    add(
        "--cuda_graph", action="store_true", help="replay forward and backward as one launch: faster for small batches"
    )
    add(
        "--no_cuda_graph",
        dest="cuda_graph",
        action="store_false",
        default=False,
        help="leave out the --cuda_graph of a preset",
    )
    add(
        "--auto_batch_size", action="store_true", help="split --train_batch_size into micro-steps that fit into memory"
    )
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers instead of PyTorch's SDPA")
    add("--dataloader_num_workers", type=int, default=0, help="processes that read films to encode them [0]")
    add("--local_rank", type=int, default=-1, help="for old launchers: accelerate knows it")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="the run's folder [out/fold<k>]")
    add("--resume_from_checkpoint", default="latest", help="latest, a checkpoint's folder, or none: afresh [latest]")
    add("--overwrite", action="store_true", help="let --resume_from_checkpoint none delete a finished run")
    add("--checkpointing_steps", type=int, default=100, help="optimizer steps between checkpoints [100]")
    add("--checkpoints_total_limit", type=int, default=2, help="newest checkpoints that are kept; 0 keeps all [2]")
    add("--report_to", default="tensorboard", choices=TRACKERS, help="[tensorboard]")
    add("--logging_dir", default="logs", help="TensorBoard's folder within the run's [logs]")
    add("--export", choices=["kohya"], help="write the adapter for A1111 and ComfyUI, too")
    add(
        "--push_to_hub",
        action="store_true",
        help="upload adapter, card, records and samples, once evaluate.py has audited it",
    )
    add("--hub_token", help="[the one that `hf auth login` saved]")
    add("--hub_model_id", help="repository on the hub [the run folder's name]")

    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"out/fold{args.fold}"
    args.train_data_dir = args.dataset_name or args.train_data_dir
    recorded = None if args.resume_from_checkpoint == "none" else recorded_base(Path(args.output_dir))
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or recorded or default_base()
    args.pretrained_model_name_or_path = canonical_name(args.pretrained_model_name_or_path)
    recipe = RECIPES["cxr-tiny" if args.pretrained_model_name_or_path == BUNDLED_BASE else "stable-diffusion"]
    if args.num_train_epochs is not None:
        recipe = {name: value for name, value in recipe.items() if name != "max_train_steps"}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    return args


def recorded_base(run_dir: Path) -> str | None:
    """Return the base model that a run began with, None for a new run."""
    config = run_dir / "config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8"))["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{config} is damaged; delete it, or name the base with --pretrained_model_name_or_path"
        ) from error


def check_args(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant and machines that cannot do what is asked, before anything is loaded."""
    least = dict(
        rank=1, text_encoder_rank=0, train_batch_size=1, gradient_accumulation_steps=1, max_train_steps=1,
        num_train_epochs=1, adam_epsilon=1e-15, adam_weight_decay=0, seed=0, validation_steps=1, validation_epochs=1,
        validation_batch_size=1, checkpointing_steps=1,
        max_validation_samples=1, max_train_samples=1, num_validation_images=0, early_stopping_patience=0,
        checkpoints_total_limit=0, snr_gamma=0, box_loss_weight=0, noise_offset=0, learning_rate=0, text_encoder_lr=0,
        max_grad_norm=1e-12,
        lora_alpha=1e-12, lr_warmup_steps=0, dataloader_num_workers=0, resolution=64, loraplus_lr_ratio=1e-12,
        lr_num_cycles=1, lr_power=0, input_perturbation=0, adapt_decoder_steps=0, adapt_decoder_lr=0,
    )  # fmt: skip
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and not smallest <= value < math.inf:
            raise Refused(f"--{name} {value}; expected a finite number from {smallest} on")
    for name in ("caption_dropout", "sentence_dropout", "train_text_encoder_frac"):
        if not 0 <= getattr(args, name) <= 1:
            raise Refused(f"--{name} {getattr(args, name)}; expected a share from 0 to 1")
    for name in ("adam_beta1", "adam_beta2", "ema_decay", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise Refused(f"--{name} {getattr(args, name)}; expected a number from 0 to below 1")
    rules = re.fullmatch(r"(\d*\.?\d+:\d+,)+\d*\.?\d+", args.lr_step_rules or "")
    if (args.lr_scheduler == "piecewise_constant") != bool(rules) or bool(args.lr_step_rules) != bool(rules):
        raise Refused(
            f"--lr_scheduler {args.lr_scheduler} with --lr_step_rules {args.lr_step_rules}; expected piecewise_constant "
            "with rules such as 1:500,0.1:800,0.01, and no other with any"
        )
    if args.export == "kohya" and args.use_dora:
        raise Refused(
            "--export kohya with --use_dora; A1111 and ComfyUI compute DoRA otherwise, so leave out one of the two"
        )
    if args.shuffle_captions and args.push_to_hub:
        raise Refused("--shuffle_captions with --push_to_hub; a control knows nothing of its captions and stays here")
    if args.compile and args.use_dora:
        raise Refused("--compile with --use_dora; peft's DoRA cannot be compiled whole, so leave out one of the two")
    for flag in ("gradient_checkpointing", "lora_dropout"):
        if args.cuda_graph and getattr(args, flag):
            raise Refused(
                f"--cuda_graph with --{flag}, which touches the random state as no graph may; leave out one of the two "
                "(--no_cuda_graph takes back a preset's)"
            )
    if args.auto_batch_size and args.lora_dropout:
        raise Refused(
            "--auto_batch_size with --lora_dropout, whose masks depend on the micro-steps; name them by --train_batch_size "
            "and --gradient_accumulation_steps"
        )
    if args.report_to not in ("none", "all") and importlib.util.find_spec(args.report_to) is None:
        raise Refused(
            f"--report_to {args.report_to} needs its package: pip install {args.report_to}, or --report_to none"
        )
    if not Path(args.train_data_dir).is_dir():
        raise Refused(
            f"no folder {args.train_data_dir}; fetch films first (python download.py --list_sources), or save a data set "
            "of the hub as an imagefolder"
        )
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise Refused(f"--output_dir {args.output_dir} is a file; expected a folder")


def encode_films(
    args: argparse.Namespace,
    accelerator: Accelerator,
    base: BaseModel,
    rows: list[dict],
    training_rows: list[dict],
    validation_rows: list[dict],
) -> tuple[TrainingStream, FilmBank, dict]:
    """Encode the films of all folds where no run has, and say what their latents and captions are like.

    Returns:
        The training films in their order, the validation films, and mean and standard deviation of the latents.
    """
    data_dir, tokenizer, scaling_factor = Path(args.train_data_dir), base.tokenizer, base.vae.config.scaling_factor
    caching = dict(
        directory=data_dir, rows=rows, vae=base.vae, cache_dir=Path(args.cache_dir or "cache"),
        resolution=args.resolution, interpolation=args.image_interpolation_mode, batch_size=args.validation_batch_size,
        num_workers=args.dataloader_num_workers, process_index=accelerator.process_index,
        num_processes=count_local_processes(accelerator.num_processes), wait_for_everyone=accelerator.wait_for_everyone,
        owner=str(Path(args.output_dir).resolve()),
    )  # fmt: skip
    with explain_out_of_memory("encoding films", "lower --validation_batch_size"):
        posteriors = cache_posteriors(**caching)
        mirrored = cache_posteriors(**caching, mirrored=True) if args.random_flip else None
    if args.random_flip:
        accelerator.print(
            "--random_flip: half of the films are mirrored, with their hearts on the right and their captions as before"
        )
    place = {row["file_name"]: i for i, row in enumerate(rows)}
    training_places, validation_places = (
        [place[row["file_name"]] for row in part] for part in (training_rows, validation_rows)
    )
    means, deviations = channel_statistics(posteriors, training_places, scaling_factor)
    accelerator.print("latents by channel, where the base expects about 0 and 1: mean "
                      f"{' '.join(f'{mean:.2f}' for mean in means)}, sd "
                      f"{' '.join(f'{sd:.2f}' for sd in deviations)}")  # fmt: skip

    captions = TokenizedCaptions(tokenizer, [row["text"] for row in training_rows], args.sentence_dropout > 0)
    accelerator.print(f"{captions.num_shortened} of {len(training_rows)} captions lose sentences beyond "
                      f"{tokenizer.model_max_length} tokens; {captions.num_cut} are cut within one")  # fmt: skip
    boxes = read_boxes(data_dir, training_rows) if args.box_loss_weight else None
    stream = TrainingStream(
        posteriors, training_places, captions, args.seed, mirrored, boxes, args.box_loss_weight, args.sentence_dropout,
    )  # fmt: skip
    input_ids = tokenize(tokenizer, [row["text"] for row in validation_rows])
    bank = film_bank(
        data_dir, validation_rows, posteriors, validation_places, input_ids, scaling_factor, args.resolution,
        args.image_interpolation_mode,
    )  # fmt: skip
    return stream, bank, {"mean": means, "sd": deviations}


def put_on_adapters(
    args: argparse.Namespace, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Freeze both models, put adapters on whose update is scaled alike in both, and return their parameters."""
    options = dict(dropout=args.lora_dropout, use_rslora=args.use_rslora)
    share_of_rank = args.text_encoder_rank / args.rank
    text_encoder_alpha = args.lora_alpha * share_of_rank ** (0.5 if args.use_rslora else 1)
    return (
        add_lora(unet, args.rank, args.lora_alpha, derive_seed(args.seed, "unet"), args.lora_targets,
                 use_dora=args.use_dora, **options),
        add_lora(text_encoder, args.text_encoder_rank, text_encoder_alpha, derive_seed(args.seed, "text_encoder"),
                 **options),
    )  # fmt: skip


def choose_kernels(
    args: argparse.Namespace,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    device: torch.device,
    num_processes: int,
) -> None:
    """Switch on what the command line asks for and this machine can do; what it cannot is warned of, by name."""
    leave_out_cudnn_attention(unet)
    if device.type == "cpu":
        use_frozen_products(unet, text_encoder)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.text_encoder_rank:  # without adapters it would learn nothing, at the price of a backward pass
            text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.enable_xformers_memory_efficient_attention:
        if problem := xformers_problem():
            warn_about_xformers(problem)
        else:
            unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        if problem := compile_problem(device):
            warnings.warn(f"torch.compile does not run here ({problem}): training goes on without", stacklevel=1)
        else:
            compile_blocks(unet)
    if args.cuda_graph and (device.type != "cuda" or num_processes > 1):
        warnings.warn("--cuda_graph needs one process on a CUDA device: training goes on without", stacklevel=1)
        args.cuda_graph = False


def fit_decoder(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    stream: TrainingStream,
    training_rows: list[dict],
    bank: FilmBank,
    set_hash: str,
) -> dict:
    """Fit the autoencoder's decoder to the training films, or put on the one that an earlier start of this run fitted.

    Returns:
        SSIM and PSNR of the validation films' round trip `before` and `after`.
    """
    films = FilmDataset(Path(args.train_data_dir), training_rows, args.resolution, args.image_interpolation_mode)
    record = {"base": public_base(args.pretrained_model_name_or_path), "fold": args.fold, "data_hash": set_hash}
    films_at_a_time = min(8, max(1, 512 * 512 // args.resolution**2))
    with explain_out_of_memory("adapting the decoder", "lower --resolution, or --adapt_decoder_steps 0"):
        header = adapt_decoder(
            Path(args.output_dir), vae, films, stream.posteriors, stream.films, bank, record,
            max_train_steps=args.adapt_decoder_steps, learning_rate=args.adapt_decoder_lr,
            micro_batch_size=films_at_a_time, seed=args.seed,
            autocast=accelerator.autocast if accelerator.mixed_precision == "bf16" else nullcontext,
            process_index=accelerator.process_index, num_processes=accelerator.num_processes,
            mean_over_processes=lambda tensor: accelerator.reduce(tensor, "mean"),
        )  # fmt: skip
    before, after = (
        {metric: header["validation"][when][metric] for metric in ("ssim", "psnr")} for when in ("before", "after")
    )
    accelerator.print(
        f"decoder: round trip of validation films from SSIM {before['ssim']:.4f}, PSNR {before['psnr']:.2f} dB to "
        f"{after['ssim']:.4f}, {after['psnr']:.2f} dB: {Path(args.output_dir) / DECODER_NAME}"
    )
    return {"before": before, "after": after}


def fitting_batch_size(
    accelerator: Accelerator, live: BaseModel, latent_shape: tuple[int, ...], films: int, most: int
) -> int:
    """Return how many films at a time, `most` of them, fit into every process's memory and divide `films` evenly."""

    def attempt(batch_size: int) -> None:
        """Take the memory of a micro-step."""
        latents = torch.zeros(batch_size, *latent_shape, device=accelerator.device)
        timesteps = torch.zeros(batch_size, dtype=torch.long, device=accelerator.device)
        input_ids = tokenize(live.tokenizer, [""] * batch_size).to(accelerator.device)
        with accelerator.autocast():
            live.unet(latents, timesteps, live.text_encoder(input_ids)[0]).sample.float().mean().backward()
        for model in (live.unet, live.text_encoder):
            model.zero_grad()

    for model in (live.unet, live.text_encoder):
        model.train()
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for sizes that are only tried
        fits = torch.tensor([largest_batch_size(attempt, films, most)], device=accelerator.device)
    return int(accelerator.gather(fits).min())


def flush(
    pending: list[dict],
    accelerator: Accelerator,
    log: Path,
    names: list[str],
    stream: TrainingStream,
    films_a_step: int,
    recent_norms: deque[float],
) -> float:
    """Read the losses of the last steps from the device, check them, write them to the log and return the last.

    Args:
        pending: a row a step; `loss` is a scalar tensor of this process, `grad_norm` one or a number, `position` that
            of the step's first film in the stream.
        accelerator: the processes to average over.
        log: the JSON-lines file.
        names: file names of the training films.
        stream: which film stands where.
        films_a_step: films an optimizer step, over all processes.
        recent_norms: gradient norms of the last steps, FLUSH_EVERY at most, which those of these are added to.

    Raises:
        Refused: for a loss or a gradient that is not finite, with its step and films. A loss scaler skips steps whose
            gradient overflowed fp16 and lowers its scale, so there only the loss counts.
    """
    losses = accelerator.reduce(torch.stack([row["loss"] for row in pending]), "mean").tolist()
    norms = torch.stack([torch.as_tensor(row["grad_norm"]) for row in pending]).tolist()
    rows, refusal = [], None
    recent_norms.extend(norms)
    if accelerator.scaler and len(recent_norms) == FLUSH_EVERY and not any(map(math.isfinite, recent_norms)):
        raise Refused(
            f"step {pending[-1]['step']}: every gradient of the last {FLUSH_EVERY} steps overflowed fp16, so nothing is learnt; "
            "use --mixed_precision bf16 or no"
        )
    for row, loss, norm in zip(pending, losses, norms, strict=True):
        if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.scaler):
            films = [names[stream.film_at(row["position"] + i)] for i in range(films_a_step)]
            wider = {"fp16": " or with --mixed_precision bf16 or no", "bf16": " or with --mixed_precision no"}
            refusal = Refused(
                f"step {row['step']}: loss {loss}, gradient norm {norm}; earlier checkpoints are kept. Begin another run "
                f"(--output_dir) at a lower --learning_rate{wider.get(accelerator.mixed_precision, '')}. "
                f"Films of the step: {', '.join(films)}"
            )
            break
        finite_norm = norm if math.isfinite(norm) else None
        rows.append({"step": row["step"], "loss": loss, "lr": row["lr"], "grad_norm": finite_norm})
    if accelerator.is_main_process:
        append_jsonl(log, [row | {"num_processes": accelerator.num_processes} for row in rows])
        for row in rows:
            accelerator.log(
                {name: row[name] for name in ("loss", "lr", "grad_norm") if row[name] is not None}, row["step"]
            )
    if refusal:
        raise refusal
    return losses[-1]


def draw_samples(live: BaseModel, args: argparse.Namespace, accelerator: Accelerator, step: int) -> Image.Image:
    """Return a contact sheet of generated films, a row a prompt, the same noise in every row, as in generate.py.

    Every process draws its share of the films; all get the sheet.
    """
    prompts, seeds = args.validation_prompt or list(SAMPLE_PROMPTS), list(range(args.num_validation_images))
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    share = range(accelerator.process_index, len(wanted), accelerator.num_processes)
    films = torch.zeros(len(wanted), args.resolution, args.resolution, dtype=torch.int32, device=accelerator.device)
    drawn = sample(
        assemble(live), [wanted[i][0] for i in share], [wanted[i][1] for i in share], args.resolution,
        num_inference_steps=25, guidance_scale=4.0, batch_size=min(math.ceil(len(wanted) / accelerator.num_processes), 16),
    )  # fmt: skip
    for i, film in zip(share, drawn, strict=True):
        films[i] = film
    films = accelerator.reduce(films, "sum").to("cpu", torch.uint8).numpy()
    rows = [list(films[i : i + len(seeds)]) for i in range(0, len(films), len(seeds))]
    footer = f"Synthetic, not for diagnosis. Step {step}, guidance 4, 25 steps."
    return contact_sheet(rows, prompts, [f"seed {seed}" for seed in seeds], footer)


def track_samples(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """Send generated films, never a patient's, to the tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(sheet)[None, :, :, None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [sheet]}, step=step)


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put the adapters' moving averages in their place for a while, where there are any."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def conclude(
    args: argparse.Namespace, first_step: int, early_stopping: EarlyStopping, validations: list[dict], started: float
) -> int:
    """Write what sums a run up, say what its best adapter is worth, upload it where that is asked for.

    Args:
        first_step: that this call began at.
        validations: the rows of validation.jsonl.
        started: when this call began to train, on the monotonic clock.

    Returns:
        The exit status: 1 where the run is not to be uploaded.
    """
    run_dir = Path(args.output_dir)
    log = run_dir / "log.jsonl"
    rows = read_jsonl(log) if log.exists() else []  # a sync may have lost it
    num_steps = rows[-1]["step"] - first_step if rows else 0
    draw_curves(run_dir / "curves.png", rows, validations)
    write_card(run_dir, Path(args.train_data_dir))
    print(f"{'stopped early' if early_stopping.should_stop else 'budget used up'}: best step {early_stopping.best_step}, SSIM "
          f"{early_stopping.best:.4f}; {num_steps} steps in {time.monotonic() - started:.0f} s")  # fmt: skip
    print(f"adapter: {run_dir / WEIGHTS_NAME}")
    if args.export == "kohya":
        save_kohya(run_dir / KOHYA_NAME, *read_adapter(run_dir / WEIGHTS_NAME))
        print(f"for A1111 and ComfyUI: {run_dir / KOHYA_NAME}")
    if args.push_to_hub:
        if reason := why_not_upload(run_dir):
            print(f"trained, but not uploaded: {reason}", file=sys.stderr)
            return 1
        print(f"uploaded to {push(run_dir, args.hub_model_id, args.hub_token)}")
    return 0


@explain_lost_process()
@explain_out_of_memory(
    "training",
    "add --auto_batch_size (the same run in smaller micro-steps), --gradient_checkpointing, or lower --resolution",
)
def main(args: argparse.Namespace) -> int:
    check_args(args)
    run_dir, data_dir = Path(args.output_dir), Path(args.train_data_dir)

    # Films: one fold is held out and a tenth of the other folds' patients validates
    rows = with_folds(read_metadata(data_dir, args.image_column, args.caption_column), group_by=args.group_by)
    training_rows, validation_rows, held_out_rows = split_fold(rows, args.fold, args.seed, group_by=args.group_by)
    set_hash, num_folds = dataset_hash(rows), len({row["fold"] for row in rows})
    training_hash, validation_hash = dataset_hash(training_rows), dataset_hash(validation_rows)
    validation_rows = draw_rows(validation_rows, args.max_validation_samples, args.seed)
    if args.max_train_samples is not None:
        training_rows = draw_rows(training_rows, args.max_train_samples, args.seed)
        rows = training_rows + validation_rows
    if args.shuffle_captions:
        training_rows = shuffle_captions(training_rows, args.seed)

    # Devices and precision
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=1))  # of other machines, while the first encodes films
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=choose_mixed_precision(args.mixed_precision),
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(run_dir), logging_dir=str(run_dir / args.logging_dir)),
        kwargs_handlers=[timeout],
    )
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # whatever the environment says
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise Refused(
            f"{accelerator.distributed_type.value} is not supported; expected one process, or several with a whole model "
            "each (accelerate launch --multi_gpu)"
        )
    device, say = accelerator.device, accelerator.print
    use_all_cores()  # beside a GPU films are scored by them
    if device.type == "cpu":
        keep_freed_memory()
    if args.allow_tf32 is None:  # numbers that are rounded to 16 bits anyway
        args.allow_tf32 = accelerator.mixed_precision != "no"
    allow_tf32(args.allow_tf32)
    say(f"base {args.pretrained_model_name_or_path}, {precision_name(accelerator.mixed_precision)}, "
        f"{accelerator.num_processes} x {device.type}")  # fmt: skip
    say(f"{len(training_rows)} films to train on, {len(validation_rows)} to validate, fold {args.fold} with "
        f"{len(held_out_rows)} held out")  # fmt: skip
    if len(validation_rows) < accelerator.num_processes:
        raise Refused(
            f"{len(validation_rows)} validation films for {accelerator.num_processes} processes; expected one each"
        )

    # How long, in optimizer steps
    films_a_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_an_epoch = math.ceil(len(training_rows) / films_a_step)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_an_epoch
    text_encoder_steps = round(args.train_text_encoder_frac * max_train_steps) if args.text_encoder_rank else 0
    validation_steps = (
        args.validation_steps
        or (args.validation_epochs and args.validation_epochs * steps_an_epoch)
        or max(1, max_train_steps // 10)
    )

    # Folders that take what is written; one that others filled with latents may be read-only
    require_writable(run_dir)
    cache_dir = Path(args.cache_dir or "cache")
    if not (cache_dir / "latents").is_dir():
        require_writable(cache_dir)

    # A run goes on from its last checkpoint, with the settings it began with, and nobody else writes to its folder
    lock = hold_lock(run_dir / ".lock") if accelerator.is_main_process else None
    if accelerator.is_main_process and lock is None:
        raise Refused(f"another train_lora.py is writing to {run_dir}; wait for it, or choose another --output_dir")
    adamw = choose_adamw(args.use_8bit_adam, device)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    settings |= {"mixed_precision": accelerator.mixed_precision, "use_8bit_adam": adamw is not torch.optim.AdamW}
    settings |= {"training_data_hash": training_hash, "validation_data_hash": validation_hash}
    settings |= {"films_a_step": films_a_step, "max_train_steps": max_train_steps}
    if args.lora_dropout:  # its masks are drawn a micro-step of a process, whose films decide
        settings |= {"train_batch_size": args.train_batch_size, "num_processes": accelerator.num_processes}
    state, tensors, remark = find_start(
        run_dir, args.resume_from_checkpoint, settings, accelerator.num_processes, args.overwrite, device.type
    )
    written = [run_dir / "config.json"] + [run_dir / DECODER_NAME] * (args.adapt_decoder_steps > 0)
    is_over = state is not None and state["finished"] and all(path.is_file() for path in written)
    if len(set(gather_object([canonical_json([state, is_over])]))) > 1:
        raise Refused(f"processes see different checkpoints in {run_dir}, a folder that lags behind; type this again")
    say(remark)

    # Of a run that is over only what sums it up is written again, without base, latents or any film
    if is_over:
        status = 0
        if accelerator.is_main_process:
            go_back_to(run_dir, state, args.checkpoints_total_limit)
            found = {"train_data_dir": args.train_data_dir, "cache_dir": args.cache_dir}  # where evaluate.py looks
            write_json(run_dir / "config.json", read_config(run_dir) | found)
            early_stopping = EarlyStopping(**state["early_stopping"])
            status = conclude(args, state["step"], early_stopping, state["validations"], time.monotonic())
            lock.close()
        accelerator.end_training()
        return status

    # The frozen base
    where = (args.revision, args.variant, args.cache_dir)
    base = load_base(args.pretrained_model_name_or_path, *where)
    base_hash = hash_weights(base.unet) + hash_weights(base.text_encoder) + hash_weights(base.vae)
    if state is not None and state["base_hash"] != base_hash:
        raise Refused(f"{base.name} has other weights than when this run began; choose another --output_dir")
    base = with_schedule(base, args.prediction_type, args.rescale_betas_zero_snr)
    noise_scheduler = base.noise_scheduler
    args.resolution = args.resolution or base.resolution
    enlarged = [
        row for row in rows if min(row.get(side) or args.resolution for side in ("width", "height")) < args.resolution
    ]
    if enlarged:
        say(f"{len(enlarged)} of {len(rows)} films are smaller than {args.resolution} px and are enlarged, which adds no detail "
            f"({BUNDLED_BASE} is a base for 128 px)")  # fmt: skip
    if args.resolution % base.pixel_multiple:
        raise Refused(f"--resolution {args.resolution}; this base needs a multiple of {base.pixel_multiple}")
    vae = base.vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    if args.resolution >= 512:
        vae.enable_slicing()  # a film at a time takes a fraction of the memory
    scaling_factor = vae.config.scaling_factor
    loss_weights = min_snr_weights(
        noise_scheduler.alphas_cumprod, args.snr_gamma, noise_scheduler.config.prediction_type
    ).to(device)  # [T]

    # Adapters in fp32 on layers of the base, whose UNet is cast to the precision of the arithmetic
    unet, text_encoder = base.unet.to(memory_format=torch.channels_last), base.text_encoder
    unet_parameters, text_encoder_parameters = put_on_adapters(args, unet, text_encoder)
    lora_parameters = unet_parameters + text_encoder_parameters
    cast_frozen(unet, accelerator.mixed_precision)
    choose_kernels(args, unet, text_encoder, device, accelerator.num_processes)
    checkpoints = max_train_steps // args.checkpointing_steps + max_train_steps // validation_steps
    checkpoints = args.checkpoints_total_limit or checkpoints
    tensors_bytes = sum(parameter.numel() for parameter in lora_parameters) * 4 * (5 if args.use_ema else 4)
    if accelerator.is_main_process:
        require_space(run_dir, tensors_bytes * (checkpoints + 1), "checkpoints")

    # Latents, once for all folds, captions as tokens, and validation films with all that scoring them takes
    stream, bank, latent_statistics = encode_films(args, accelerator, base, rows, training_rows, validation_rows)
    empty_ids = tokenize(base.tokenizer, [""]).to(device)  # [1, L]

    # AdamW with decoupled weight decay, a rate each for UNet and text encoder, one schedule
    rate_factor = films_a_step if args.scale_lr else 1
    groups = parameter_groups(unet, args.learning_rate * rate_factor, args.loraplus_lr_ratio)
    groups += parameter_groups(text_encoder, args.text_encoder_lr * rate_factor, args.loraplus_lr_ratio)
    optimizer = adamw(
        groups, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
        **({"fused": True} if adamw is torch.optim.AdamW else {}),
    )  # fmt: skip
    if args.lr_warmup_steps and args.lr_scheduler in ("constant", "piecewise_constant"):
        say(f"--lr_warmup_steps: --lr_scheduler {args.lr_scheduler} has no warm-up; constant_with_warmup has")
    warmup_steps = args.lr_warmup_steps if args.lr_warmup_steps is not None else round(0.05 * max_train_steps)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, step_rules=args.lr_step_rules, num_warmup_steps=warmup_steps,
        num_training_steps=max_train_steps, num_cycles=args.lr_num_cycles, power=args.lr_power,
    )  # fmt: skip

    # The schedule is not prepared: accelerate would step it once for every process
    unet, optimizer = accelerator.prepare(unet, optimizer)
    text_encoder = accelerator.prepare_model(text_encoder, evaluation_mode=not text_encoder_parameters)
    live_unet, live_text_encoder = (accelerator.unwrap_model(model) for model in (unet, text_encoder))
    live_tensors = trainable_tensors(unet=live_unet, text_encoder=live_text_encoder)
    live = replace(base, unet=live_unet, text_encoder=live_text_encoder)
    ema = EMAModel(lora_parameters, decay=args.ema_decay, use_ema_warmup=True, foreach=True) if args.use_ema else None
    early_stopping = EarlyStopping(patience=args.early_stopping_patience)
    first_step = position = 0
    validations: list[dict] = []  # the rows of validation.jsonl
    if state is not None:
        with torch.no_grad():
            for name, tensor in live_tensors.items():
                tensor.copy_(tensors["adapters"][name])
        optimizer.load_state_dict(tensors["optimizer"])
        lr_scheduler.load_state_dict(tensors["lr_scheduler"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        if ema is not None:
            ema.load_state_dict(tensors["ema"])
            ema.to(device)
        early_stopping = EarlyStopping(**state["early_stopping"])
        first_step, position, validations = state["step"], state["position"], state["validations"]

    # The record
    log, validation_log = run_dir / "log.jsonl", run_dir / "validation.jsonl"
    config = {
        "base": args.pretrained_model_name_or_path, "fold": args.fold, "resolution": args.resolution,
        "settings": settings, "train_data_dir": args.train_data_dir, "cache_dir": args.cache_dir,
        "data_hash": set_hash, "num_folds": num_folds, "versions": package_versions(),
        "films": {"training": len(training_rows), "validation": len(bank), "held_out": len(held_out_rows)},
        "latents": latent_statistics, "vae_decoder": None,
    }  # fmt: skip
    if accelerator.is_main_process:
        if state is None:
            clear_run(run_dir, keep_decoder=args.adapt_decoder_steps > 0)
        else:
            go_back_to(run_dir, state, args.checkpoints_total_limit)
        write_json(run_dir / "config.json", config)
    accelerator.init_trackers("chest-radiograph-lora")

    # The decoder behind the latents, which stay what they are
    leave = LeaveRequest(accelerator.num_processes)
    if args.adapt_decoder_steps:
        with leave.at_once():
            config["vae_decoder"] = fit_decoder(args, accelerator, vae, stream, training_rows, bank, set_hash)
        if accelerator.is_main_process:
            write_json(run_dir / "config.json", config)

    share = range(accelerator.process_index, len(bank), accelerator.num_processes)

    @explain_out_of_memory("validating", "lower --validation_batch_size or --num_validation_images")
    def validate(step: int) -> bool:
        """Score the adapters as they stand, draw samples, keep them if they are the best; return whether to stop."""
        # Its batches are of other sizes than training's, for which nothing should be compiled
        uncompiled = torch.compiler.set_stance("force_eager") if args.compile else nullcontext()
        with uncompiled, eval_mode(live_unet, live_text_encoder), averaged(ema, lora_parameters):
            # One strength: the others, which evaluate.py has, would double what validation costs
            asked = dict(batch_size=args.validation_batch_size, indices=share, strengths=(HEADLINE,))
            scores = score_model(bank, live_unet, live_text_encoder, vae, noise_scheduler, **asked)
            if step == 0:
                mean = mean_film(data_dir, training_rows, args.resolution, args.seed, args.image_interpolation_mode)
                scores |= score_bounds(bank, vae, noise_scheduler, mean, **asked)
            scores = {name: accelerator.reduce(values.to(device), "sum").cpu() for name, values in scores.items()}
            if not all(values.isfinite().all() for values in scores.values()):
                raise Refused(
                    f"step {step}: validation films score no finite numbers. Begin another run (--output_dir) at a lower "
                    "--learning_rate or with --mixed_precision bf16 or no"
                )
            is_first = early_stopping.best is None
            is_best = early_stopping.update(step, scores[f"ssim/{HEADLINE}"].tolist()) if step > 0 else False
            sheet = draw_samples(live, args, accelerator, step) if args.num_validation_images else None
            row = {"step": step} | summarise(scores) | {"best_step": early_stopping.best_step}
            if is_best and accelerator.is_main_process:
                header = {"base": public_base(config["base"]), "fold": args.fold, "step": step}
                header |= {"resolution": args.resolution, "data_hash": set_hash, "metrics": row}
                header |= {"settings": public_settings(settings)}
                names, adapter = [WEIGHTS_NAME], adapter_state(live_unet, live_text_encoder)
                save_adapter(run_dir / WEIGHTS_NAME, adapter, header)
                (run_dir / KOHYA_NAME).unlink(missing_ok=True)  # an earlier best's
                if args.export == "kohya":
                    names.append(KOHYA_NAME)
                    save_kohya(run_dir / KOHYA_NAME, adapter, header)
                for name in names if is_first else ():  # a fault in how files are written shows in the first
                    off, effect = verify_adapter(run_dir / name, base.name, live_unet, live_text_encoder, *where)
                    tqdm.write(f"{name} in a fresh pipeline is off by {off:.0e}, where its effect is {effect:.0e}")
        if accelerator.is_main_process:
            validations.append(row)
            floor, ceiling = (validations[0]["bounds"]["ssim"][bound] for bound in ("mean_film", "ceiling"))
            row["ssim_normalised"] = (row["ssim"] - floor) / (ceiling - floor)
            append_jsonl(validation_log, [row])
            draw_curves(run_dir / "curves.png", read_jsonl(log) if log.exists() else [], validations)
            if sheet is not None:
                save_png(run_dir / "samples" / f"step-{step:06d}.png", sheet)
                track_samples(accelerator, sheet, step)
            accelerator.log({f"validation/{k}": v for k, v in row.items() if isinstance(v, float)}, step=step)
            tqdm.write(
                f"step {step}: SSIM {row['ssim']:.4f}, PSNR {row['psnr']:.2f} dB, MSE {row['mse']:.4f}"
                + (", the best so far" if is_best else "")
            )
        return early_stopping.should_stop

    def save(step: int, validated: bool, with_tensors: bool = True) -> None:
        """Write a checkpoint from which this command goes on as if it had never stopped."""
        if accelerator.is_main_process:
            finished = validated and (early_stopping.should_stop or step == max_train_steps)
            state = {
                "step": step, "position": position, "validated": validated, "finished": finished,
                "num_processes": accelerator.num_processes, "device": device.type, "settings": settings,
                "base_hash": base_hash, "early_stopping": asdict(early_stopping), "validations": validations,
            }  # fmt: skip
            if with_tensors:
                tensors = {
                    "adapters": {name: tensor.detach().cpu() for name, tensor in live_tensors.items()},
                    "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict(),
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                    "ema": ema.state_dict() if ema is not None else None,
                }  # fmt: skip
                save_checkpoint(run_dir, step, state, tensors)
                prune_checkpoints(run_dir, args.checkpoints_total_limit)
            else:
                amend_checkpoint(run_dir, step, state)
        accelerator.wait_for_everyone()

    def forward_backward(
        noisy_latents: Tensor, timesteps: Tensor, input_ids: Tensor, target: Tensor, place_weights: Tensor
    ) -> Tensor:
        """Predict noise or velocity, add the gradients of a micro-step and return its loss.

        Args: float32 [B, C, h, w], int64 [B], int64 [B, L], float32 [B, C, h, w], float32 [B, h, w].
        """
        with torch.set_grad_enabled(text_encoder.training):
            encoder_hidden_states = text_encoder(input_ids)[0]  # [B, L, D]
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        error = F.mse_loss(model_pred.float(), target, reduction="none")  # [B, C, h, w]
        loss = (error * place_weights[:, None]).mean(dim=(1, 2, 3))  # [B]
        loss = (loss * loss_weights[timesteps]).mean()
        accelerator.backward(loss)
        return loss.detach()

    batch_size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    stopped = state is not None and state["finished"]
    if args.auto_batch_size and not stopped:
        films = batch_size * accumulation
        batch_size = fitting_batch_size(accelerator, live, bank.latents.shape[1:], films, batch_size)
        accelerator.gradient_accumulation_steps = accumulation = films // batch_size
        say(f"--auto_batch_size: {accumulation} micro-steps of {batch_size} films a step")
    if state is None or not state["validated"]:
        with leave.at_once():
            stopped = validate(first_step)
        if state is not None:
            save(first_step, validated=True, with_tensors=False)
    unet.train()
    text_encoder.train(first_step < text_encoder_steps)
    last_step = first_step if stopped else max_train_steps
    micro_batches = deal_positions(
        position, last_step - first_step, accumulation, batch_size,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    # Read in this process: workers would die of the SIGTERM that is to be survived. Beside a GPU a thread reads ahead; on a
    # CPU it would cost OpenMP more than it saves (1.8 times the step, measured)
    batches = iter(DataLoader(stream, batch_sampler=micro_batches, pin_memory=device.type == "cuda"))
    if device.type == "cuda":
        batches = prefetch(batches)
    pending, recent_norms, replay, started = [], deque(maxlen=FLUSH_EVERY), None, time.monotonic()
    progress = tqdm(
        range(first_step + 1, last_step + 1), initial=first_step, total=last_step, desc=f"fold {args.fold}",
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    for step in progress:
        step_loss = torch.zeros((), device=device)
        if step > text_encoder_steps and text_encoder.training:
            text_encoder.eval()
            replay = None
            optimizer.zero_grad()  # gradients of zero would let its weights decay
        for _ in range(accumulation):
            batch = next(batches)
            with accelerator.accumulate(unet, text_encoder):
                # All draws of a film belong to its position in the stream, whatever the process or the batch
                places = batch.pop("position").tolist()
                generators = [
                    torch.Generator(device).manual_seed(derive_seed(args.seed, "draws", place)) for place in places
                ]
                if args.lora_dropout:  # the one draw that is a batch's
                    torch.manual_seed(derive_seed(args.seed, "dropout", places[0]))
                batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}

                # Clean latents z_0: one draw from each film's posterior, float32 [B, C, h, w]
                mean, std = batch["mean"], batch["std"]
                latents = (mean + std * randn_tensor(mean.shape, generators, device)) * scaling_factor

                # Forward process: noise each film to a timestep of its own
                noise = randn_tensor(latents.shape, generators, device)
                if args.noise_offset:
                    noise += args.noise_offset * randn_tensor((*latents.shape[:2], 1, 1), generators, device)
                num_timesteps = noise_scheduler.config.num_train_timesteps
                draws = [torch.randint(num_timesteps, (1,), generator=g, device=device) for g in generators]
                timesteps = torch.cat(draws)  # [B]
                perturbed = noise
                if args.input_perturbation:
                    perturbed = noise + args.input_perturbation * randn_tensor(noise.shape, generators, device)
                noisy_latents = noise_scheduler.add_noise(latents, perturbed, timesteps)

                # Condition on the caption, or for a share of the films on nothing (classifier-free guidance)
                draws = [torch.rand(1, generator=g, device=device) for g in generators]
                dropped = torch.cat(draws) < args.caption_dropout  # [B]
                input_ids = torch.where(dropped[:, None], empty_ids, batch["input_ids"])

                # Predict the noise, or the velocity, and weigh the error by place and by timestep. A box counts only beside
                # the caption that names its finding: without one it would draw findings into what guidance leads away from
                if noise_scheduler.config.prediction_type == "epsilon":
                    target = noise
                else:
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                place_weights = torch.where(dropped[:, None, None], 1.0, batch["place_weights"])  # [B, h, w]
                inputs = noisy_latents, timesteps, input_ids, target, place_weights
                if args.cuda_graph and replay is None:
                    learning = lora_parameters if text_encoder.training else unet_parameters
                    replay = capture_graph(forward_backward, inputs, learning)
                step_loss += (replay or forward_backward)(*inputs) / accumulation
        grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=replay is None)
        if ema is not None:
            ema.step(lora_parameters)
        rate = lr_scheduler.get_last_lr()[0]
        pending.append({"step": step, "loss": step_loss, "lr": rate, "grad_norm": grad_norm, "position": position})
        lr_scheduler.step()
        position += films_a_step

        # Read from the device, validate and save when it is due; a signal saves at once
        validation_due = step % validation_steps == 0 or step == last_step
        checkpoint_due = step % args.checkpointing_steps == 0
        leaving = leave.agreed()
        if step % FLUSH_EVERY == 0 or validation_due or checkpoint_due or leaving:
            names = [row["file_name"] for row in training_rows]
            loss_now = flush(pending, accelerator, log, names, stream, films_a_step, recent_norms)
            best = "-" if early_stopping.best is None else f"{early_stopping.best:.4f}"
            speed = films_a_step * (progress.format_dict["rate"] or 0)
            progress.set_postfix(loss=f"{loss_now:.4f}", best_SSIM=best, films_s=f"{speed:.1f}")
            pending.clear()
        if validation_due or checkpoint_due or leaving:
            save(step, validated=not validation_due)
        if leaving:
            raise KeyboardInterrupt(leaving)
        if validation_due:
            replay = None  # its memory is validation's; it is captured again
            optimizer.zero_grad()
            with leave.at_once():
                stopped = validate(step)
            save(step, validated=True, with_tensors=False)
        if stopped:
            break
    leave.close()

    # The result: the best adapter is in place already
    status = 0
    if accelerator.is_main_process:
        status = conclude(args, first_step, early_stopping, validations, started)
    accelerator.end_training()
    if lock is not None:
        lock.close()
    return status


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
