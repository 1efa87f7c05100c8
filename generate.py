"""Generate synthetic chest radiographs from text.

    python generate.py --prompt "PA chest radiograph of a 60-year-old man. Cardiomegaly." --lora out/fold2
    python generate.py --lora out/fold2 --from_fold                 # the captions of the fold that training never saw
    python generate.py --serve                                      # a page in the browser
    python generate.py --lora out/fold2 --grid view=PA,AP findings=none,pneumonia,effusion+cardiomegaly --num_images 4

Writes to images/ (--output_dir):

    <prompt>_<seed>_<hash>.png   8-bit grey (--bit_depth 16); how it was made is in its text chunks
    images.jsonl                 the same, a row an image, and what its caption asserts
    metadata.jsonl               makes the folder a data set: train_lora.py --train_data_dir images trains on it
    contact_sheet.png            this command's images, a row a prompt; of many the first 16 prompts, 8 images each
    dicom/                       the same images as DICOM Secondary Capture (--dicom)

Image j of any prompt starts from the noise of seed + j, so that prompts can be compared at equal noise; a data set to train on
needs other noise for every image (--own_noise). The hash is one of the prompt and of every setting: the same command leaves
finished images alone and goes on after a kill, another never overwrites them. A base on the hub is known by its name and
--revision alone. Several processes, on one machine or with one folder between them, share the work: accelerate launch generate.py ...
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import utils.quiet  # noqa: F401

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from utils.card import base_digest, public_base
from utils.decoder import find_decoder, put_on_decoder, read_decoder
from utils.files import require_space, require_writable, sha256_file, write_bytes
from utils.films import UnusableFilm
from utils.hardware import (
    allow_tf32,
    choose_mixed_precision,
    compile_problem,
    explain_out_of_memory,
    keep_freed_memory,
    use_all_cores,
)
from utils.images import grey_levels, load_film
from utils.kernels import compile_blocks, replay_predictions
from utils.linear import use_frozen_products
from utils.lora import find_adapter, read_adapter
from utils.metadata import read_metadata
from utils.pipeline import (
    SCHEDULERS,
    assemble,
    canonical_name,
    cast_frozen,
    default_base,
    load_base,
    merge_adapters,
    sample_pictures,
    scheduler_class,
    with_schedule,
)
from utils.prompts import AXES, MAX_SEED, Prompt, check_prompts, grid_prompts, labels_of, read_prompts
from utils.provenance import (
    DISCLAIMER,
    OF_A_FILM,
    claim_folder,
    eight_bits,
    encode_png,
    file_name,
    hold_record,
    is_to_train_on,
    keep,
    read_made,
    read_png,
    settle_records,
    table_row,
)
from utils.quality import QualityControl
from utils.refusal import ArgumentParser, Refused, run
from utils.report import contact_sheet, save_png
from utils.runlog import films_of_run, package_versions, precision_name, read_config, read_split
from utils.secondary_capture import LABEL, encode_dicom
from utils.seeding import derive_seed
from utils.tokens import fit_captions, read_of
from utils.webpage import EXAMPLES, MOST_IMAGES, Wish, build_page, find_adapters

SHEET_ROWS, SHEET_COLUMNS = 16, 8  # the contact sheet shows no more than that
LARGE_MAP = 32  # latents a side
SLICED_FROM = 512  # pixels: films go through the decoder one at a time
LISTED = 5  # long prompts told one by one
NEEDS = {  # flags that say nothing without another
    "strength": "init_image", "lora_scale": "lora", "train_data_dir": "from_fold", "share": "serve", "port": "serve",
}  # fmt: skip
OF_NO_PAGE = ("prompts_file", "grid", "from_fold", "train_data_dir", "dicom", "init_image", "strength", "own_noise")
FEW_NOISES = 10  # for five folds, and films to validate on
VERSIONS = ("torch", "diffusers", "transformers", "peft")  # that pixels may depend on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usage = "python generate.py [FLAG ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("what").add_argument
    add("--prompt", action="append", default=[], help="text of a film; repeat for more")
    add("--prompts_file", type=Path, metavar="FILE",
        help=".txt with a prompt a line; or .csv or .jsonl with a column prompt or text (and negative_prompt, seed, "
        "findings, view, age, sex), such as data/metadata.jsonl")  # fmt: skip
    add("--grid", nargs="+", action="extend", default=[], metavar="AXIS=A,B",
        help=f"a prompt for every combination of {', '.join(AXES)}; findings go together with +")  # fmt: skip
    add(
        "--from_fold",
        action="store_true",
        help="captions of the fold that the run of --lora held out; not to train on",
    )
    add("--train_data_dir", type=Path, help="films of that run [where it found them]")
    add("--negative_prompt", default="", help="what guidance leads away from [nothing]")
    add("--num_images", type=int, default=1, help="images per prompt [1]")
    add("--seed", type=int, default=0, help="image j starts from the noise of seed + j [0]")
    add(
        "--own_noise",
        action="store_true",
        help="other noise for every image of the command, not the same for each prompt; equal prompts are drawn each",
    )
    add("--init_image", type=Path, help="begin at this film (PNG, JPEG, DICOM) with noise added, not at noise")
    add("--strength", type=float, default=0.5, help="how much noise, in (0, 1]; 1 leaves next to nothing of it [0.5]")

    add = parser.add_argument_group("model").add_argument
    add("--lora", type=Path, nargs="+", action="extend", default=[], metavar="ADAPTER",
        help="a run's folder or a safetensors file; several are added up [none: the bare base]")  # fmt: skip
    add("--lora_scale", type=float, nargs="+", action="extend", help="weight of each adapter; 0 is the bare base [1]")
    add("--no_vae_decoder", action="store_true", help="take the base's decoder, not the one beside the adapter")
    add("--pretrained_model_name_or_path", metavar="BASE", help="folder or hub id [the adapter's own base]")
    add("--revision", help="branch, tag or commit of the base on the hub")
    add("--variant", help="infix of the base's weight files, such as fp16")
    add("--cache_dir", help="where hub downloads are kept")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", type=int, default=25, help="solver steps [25]")
    add("--guidance_scale", type=float, default=4.0, help="classifier-free guidance, 3 to 4 for films; 1 is none [4]")
    add("--scheduler", default="dpmsolver++",
        help=f"solver: {', '.join(SCHEDULERS)}, or the class of one of diffusers' that suit it; a wrong name lists them [dpmsolver++]")  # fmt: skip
    add("--resolution", type=int, help="side in pixels [the adapter's own, else the base's]")
    add("--batch_size", type=int, default=4, help="images at a time; short batches are filled up [4]")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="no is fp32; a T4 wants fp16 [accelerate's, else bf16 where native, else no]",
    )
    add("--compile", action="store_true", help="compile the UNet's blocks: pays for hundreds of images, on a GPU")
    add(
        "--no_cuda_graph", action="store_true", help="on a GPU, launch the UNet's kernels one by one, not as one graph"
    )

    add = parser.add_argument_group("quality control").add_argument
    add("--reference", type=Path, metavar="DATA",
        help="imagefolder of real films: flag images that are far from all of them (without the fold that --lora held out)")  # fmt: skip
    add("--reject", type=int, default=0, metavar="TIMES",
        help="redraw a flagged image from other noise, up to so many times [0]")  # fmt: skip

    add = parser.add_argument_group("a page instead").add_argument
    add("--serve", action="store_true", help="open a page in the browser: adapters from out/, beside their base")
    add("--share", action="store_true", help="give it a public address, as Colab needs; whoever has it can draw there")
    add("--port", type=int, help="port of the page [the first free one from 7860]")

    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=Path,
        help="folder of the images [images; images/page for --serve, whose trials are no data set]",
    )
    add("--bit_depth", type=int, choices=[8, 16], default=8, help="bits of a pixel [8]")
    add("--dicom", action="store_true", help="write DICOM Secondary Capture, too, also of images that are there")
    add("--burn_label", action="store_true", help=f'write "{LABEL}" into the DICOM films')
    args = parser.parse_args(argv)
    args.lora_scale = args.lora_scale or [1.0]
    args.output_dir = args.output_dir or Path("images/page" if args.serve else "images")
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    usual = vars(parse_args([]))
    given = {name for name, value in vars(args).items() if value != usual[name]}
    for name, needed in NEEDS.items() if not args.serve else ():
        if name in given and needed not in given:
            raise Refused(f"--{name} has no effect without --{needed}; add that, or leave it out")
    if not args.serve:
        return
    for name in OF_NO_PAGE:
        if name in given:
            raise Refused(f"--{name} is not for --serve, where prompts are typed into the page; leave it out")
    for name, count in (("prompt", len(args.prompt)), ("lora_scale", len(args.lora_scale))):
        if count > 1:
            raise Refused(f"{count} of --{name}; --serve begins with one, and others are typed into the page")
    if args.num_images > MOST_IMAGES:
        raise Refused(f"--num_images {args.num_images}; the page of --serve draws {MOST_IMAGES} at most")


def check_args(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant and machines that cannot do what is asked, before anything is loaded."""
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise Refused(f"--{name} {getattr(args, name)}; expected 1 or more")
    if args.reject < 0:
        raise Refused(f"--reject {args.reject}; expected 0 or more")
    if not 0 <= args.seed <= MAX_SEED:
        raise Refused(f"--seed {args.seed}; expected 0 to {MAX_SEED}")
    if args.port is not None and not 0 < args.port < 65536:
        raise Refused(f"--port {args.port}; expected 1 to 65535")
    if args.init_image is not None and args.dicom:
        raise Refused(
            "--dicom makes films of patients that do not exist, and --init_image films that show one; take one of them"
        )
    for name, value in [
        ("guidance_scale", args.guidance_scale),
        *(("lora_scale", value) for value in args.lora_scale),
    ]:
        if not math.isfinite(value):
            raise Refused(f"--{name} {value}; expected a finite number")
    if not 0 < args.strength <= 1:
        raise Refused(f"--strength {args.strength}; expected a number above 0, at most 1")
    if args.init_image is not None and int(args.num_inference_steps * args.strength) < 1:
        raise Refused(
            f"--strength {args.strength} leaves none of {args.num_inference_steps} steps; raise either of the two"
        )
    if args.negative_prompt and args.guidance_scale <= 1:
        raise Refused(
            f"--negative_prompt has no effect with --guidance_scale {args.guidance_scale}; expected more than 1"
        )
    if len(args.lora_scale) not in (1, max(1, len(args.lora))):
        raise Refused(
            f"{len(args.lora_scale)} of --lora_scale for {len(args.lora)} of --lora; expected one, or one each"
        )
    if args.from_fold and len(args.lora) != 1:
        raise Refused("--from_fold draws the captions that one run held out; expected --lora out/fold2")
    if args.burn_label and not args.dicom:
        raise Refused("--burn_label writes into DICOM films only, so that the others can be trained on; add --dicom")
    scheduler_class(args.scheduler)
    choose_mixed_precision(args.mixed_precision)


def check_files(args: argparse.Namespace) -> None:
    """Refuse folders, films and tables that cannot be used, before weights load."""
    claim_folder(args.output_dir)
    require_writable(args.output_dir)
    if args.reference is not None:
        read_metadata(args.reference)
    read_init_image(args, SLICED_FROM)  # at any side: the base's own is known later


def gather_prompts(args: argparse.Namespace) -> tuple[list[Prompt], int]:
    """Return all that the command line asks for, and how many prompts that was before equal ones were put together.

    Its own, those of a file, of a grid, of a held-out fold.
    """
    prompts = typed_prompts(args.prompt)
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    if args.grid:
        prompts += grid_prompts(args.grid)
    if args.from_fold:
        prompts += held_out_prompts(args.lora[0], args.train_data_dir)
    if args.guidance_scale <= 1 and any(prompt.negative for prompt in prompts):
        raise Refused(
            f"the negative_prompt of {args.prompts_file} has no effect with --guidance_scale {args.guidance_scale}; expected "
            "more than 1, or a table without it"
        )
    prompts = [replace(prompt, negative=prompt.negative or args.negative_prompt) for prompt in prompts]
    return check_prompts(prompts, args.own_noise), len(prompts)


def typed_prompts(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(text.strip()) for text in texts if text.strip()]


def held_out_prompts(run_dir: Path, data_dir: Path | None) -> list[Prompt]:
    """Return the captions of the films that a run was not trained on, with what the table says of them."""
    config = read_config(run_dir)
    _, _, held_out = read_split(config, run_dir, films_of_run(config, data_dir))
    return [Prompt(row["text"], labels=labels_of(row) | {"held_out": True}) for row in held_out]


def read_adapters(
    args: argparse.Namespace,
) -> tuple[list[Path], list[float], list[tuple[dict, dict]], dict, dict[str, Path]]:
    """Return what is known of the adapters that are asked for.

    Returns:
        Their files and weights, tensors and header of each, a header for all, {} where other tools wrote them, and
        decoders by hash. An adapter of weight 0 tells its base and resolution, not what is predicted.

    Raises:
        Refused: for adapters of different bases or resolutions, or each with a decoder of its own.
    """
    files = [find_adapter(path) for path in args.lora]
    adapters = [read_adapter(file) for file in files]
    for name in ("base", "resolution", "revision", "variant", "rescale_betas_zero_snr"):
        # The settings may have them as they were asked for, None; the header as they were resolved
        told = [header.get("settings", {}) | header for _, header in adapters]
        values = {of.get(name) or None: file for file, of in zip(files, told, strict=True) if "base" in of}
        if len(values) > 1:
            listed = ", ".join(f"{file} has {value}" for value, file in values.items())
            raise Refused(f"the adapters differ in their {name} ({listed}); expected adapters of one {name}")
    scales = args.lora_scale * (len(files) if len(args.lora_scale) == 1 else 1)
    beside = [find_decoder(file) for file, scale in zip(files, scales, strict=True) if scale]
    decoders = {} if args.no_vae_decoder else {sha256_file(path): path for path in beside if path}
    if len(decoders) > 1:
        listed = " and ".join(map(str, decoders.values()))
        raise Refused(f"each adapter has a decoder of its own beside it ({listed}); add --no_vae_decoder")
    return files, scales, adapters, next((header for _, header in adapters if header), {}), decoders


def base_of(adapter: Path, named: str) -> str:
    """Return the base model that an adapter names; one in a folder, of which it has the last part, as its run's record has it."""
    try:
        recorded = read_config(adapter.parent)["base"]
    except (Refused, KeyError, TypeError):  # no run's folder
        return named
    return recorded if public_base(recorded) == named else named


@explain_out_of_memory("loading the model", "end what else uses the device, or take --mixed_precision fp16")
def load_model(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[StableDiffusionPipeline, dict, QualityControl]:
    """Return a pipeline with adapters merged into it, what its images have to say of it, and what looks at them."""
    files, scales, adapters, header, decoders = read_adapters(args)
    settings, base_name = header.get("settings", {}), args.pretrained_model_name_or_path
    if base_name is None and "base" in header:
        revision, variant = args.revision or settings.get("revision"), args.variant or settings.get("variant")
    else:
        revision, variant = args.revision, args.variant
    told = (base_of(file, of["base"]) for file, (_, of) in zip(files, adapters, strict=True) if "base" in of)
    base_name = canonical_name(base_name or next(told, None) or default_base())
    base = load_base(base_name, revision, variant, args.cache_dir)
    # An adapter that names no prediction was trained on the base's own
    own = base.noise_scheduler.config.prediction_type
    taught = [of["settings"] for (_, of), scale in zip(adapters, scales, strict=True) if scale and "settings" in of]
    kinds = {of.get("prediction_type") or own for of in taught}
    trained = taught[0] if taught else {}
    if len(kinds) > 1:
        raise Refused(
            f"the adapters differ in their prediction_type ({' and '.join(sorted(kinds))}); expected adapters of one"
        )
    base = with_schedule(base, trained.get("prediction_type"), trained.get("rescale_betas_zero_snr", False))
    resolution = header.get("resolution") or base.resolution if args.resolution is None else args.resolution
    if resolution < 1 or resolution % base.pixel_multiple:
        raise Refused(f"--resolution {resolution}; this base needs a multiple of {base.pixel_multiple}")

    pipeline = assemble(base, args.scheduler)
    most = base.noise_scheduler.config.num_train_timesteps // 2 - 1  # beyond it solvers begin amid the noise schedule
    most = min(most, pipeline.scheduler.config.get("original_inference_steps", most))
    if args.num_inference_steps > most:
        raise Refused(
            f"--num_inference_steps {args.num_inference_steps}; {args.scheduler} has room for {most} on this base's noise "
            "schedule"
        )
    try:
        merge_adapters(pipeline, [(state, scale) for (state, _), scale in zip(adapters, scales, strict=True)])
    except Refused as refusal:
        if header.get("base", base_name) in (base_name, public_base(base_name)):
            raise
        raise Refused(f"{files[0]} is an adapter for {header['base']}, not for {base_name}: {refusal}") from refusal
    for path in decoders.values():
        put_on_decoder(base.vae, read_decoder(path)[0])

    cast_frozen(base.unet, accelerator.mixed_precision)
    for model in (base.unet, base.text_encoder, base.vae):
        model.requires_grad_(False).eval()
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        use_frozen_products(base.unet, base.text_encoder, base.vae)
    if on_cpu or resolution >= SLICED_FROM:  # a film at a time stays in the processor's cache, or fits into memory
        base.vae.enable_slicing()
    # On a CPU the group norm of large maps in channels-last order adds up by thread and by place in the batch
    in_order = on_cpu and resolution // base.vae_scale_factor >= LARGE_MAP
    layout = torch.contiguous_format if in_order else torch.channels_last
    base.vae.to(accelerator.device, memory_format=torch.channels_last)
    for model in (base.unet.to(memory_format=layout), base.text_encoder):
        accelerator.prepare_model(model, evaluation_mode=True)
    if args.compile:
        if problem := compile_problem(accelerator.device):
            raise Refused(f"--compile does not work here ({problem}); leave it out")
        compile_blocks(base.unet)
    if replays(args, accelerator):
        replay_predictions(base.unet)

    named = ", ".join(f"{file} x {scale:g}" for file, scale in zip(files, scales, strict=True)) or "none"
    accelerator.print(
        f"base {base_name}, adapter {named}, {precision_name(accelerator.mixed_precision)} on {accelerator.device.type}"
    )
    made_for = [public_base(of.get("base", base_name)) for _, of in adapters]
    for file, name in zip(files, made_for, strict=True):
        if name != public_base(base_name):
            accelerator.print(f"{file} was made for {name}, and is put on {public_base(base_name)}")
    for path in decoders.values():
        accelerator.print(f"decoder {path}, fitted to radiographs; --no_vae_decoder takes the base's own")
    quality = QualityControl(args.reference, resolution, accelerator.device, [header for _, header in adapters])
    described = {
        "base": public_base(base_name), "base_revision": revision, "base_variant": variant,
        "adapters": [
            {"sha256": sha256_file(file), "scale": scale} | ({"made_for": name} if name != public_base(base_name) else {})
            for file, scale, name in zip(files, scales, made_for, strict=True) if scale
        ],
        "decoder_sha256": next(iter(decoders), None), "resolution": resolution,
        "mixed_precision": accelerator.mixed_precision, "device": accelerator.device.type, "compiled": args.compile,
        "reference_sha256": quality.reference_sha256,
    }  # fmt: skip
    if digest := base_digest(base_name):  # a name of its own, so that images of other bases keep their names
        described["base_sha256"] = digest
    return pipeline, described, quality


def replays(args: argparse.Namespace, accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda" and not args.no_cuda_graph


def memory_advice(args: argparse.Namespace, accelerator: Accelerator) -> str:
    return "lower --batch_size or --resolution" + (", or add --no_cuda_graph" if replays(args, accelerator) else "")


def long_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[Prompt]) -> list[str]:
    """Return in words what of which prompts is drawn, where the text encoder's window does not hold all of it."""
    texts = [text for prompt in prompts for text in (prompt.text, prompt.negative) if text]
    fitted = fit_captions(pipeline.tokenizer, texts)
    read = read_of(pipeline.tokenizer, fitted)
    long = [(drawn, drawn != kept) for text, kept, drawn in zip(texts, fitted, read, strict=True) if drawn != text]
    notes = [
        f"longer than {pipeline.tokenizer.model_max_length} tokens, "
        f"{'cut within a sentence' if cut else 'drawn from its beginning'}: {drawn}"
        for drawn, cut in long[:LISTED]
    ]
    return notes + ([f"{len(long) - LISTED} more prompts are longer, too"] if len(long) > LISTED else [])


def noise_seed(request: dict, attempt: int) -> int:
    """Return the seed of the noise that an image starts from when it is drawn for the first, second, ... time."""
    return derive_seed(request["seed"], "drawn anew", attempt) if attempt else request["seed"]


def requests_of(args: argparse.Namespace, prompts: Sequence[Prompt], described: dict) -> list[dict[str, dict]]:
    """Return all that is asked for: by prompt, the requests of its images by their file's name, in the order of seeds.

    Args:
        described: model and settings, which go into every request. A request holds all that an image depends on.
    """
    by_prompt = []
    for number, prompt in enumerate(prompts):
        first = args.seed + (number * args.num_images if args.own_noise else 0)
        first = first if prompt.seed is None else prompt.seed
        about = {"prompt": prompt.text, "negative_prompt": prompt.negative}
        requests = [{**about, "seed": first + j, **described} for j in range(args.num_images)]
        by_prompt.append({file_name(request): request for request in requests})
    return by_prompt


def draw(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: StableDiffusionPipeline, quality: QualityControl,
    init_image: torch.Tensor | None, requests: dict[str, dict], labels: dict[str, dict], due: dict[str, int],
) -> None:  # fmt: skip
    """Draw this process's share of what is due.

    One generator an image: it does not depend on what else is asked for, nor on which process draws it.

    Args:
        init_image: uint8 [resolution, resolution] or None.
        requests, labels: of every image, by its file's name.
        due: how often each that has to be drawn was drawn before, from `find_due`.
    """
    versions = {name: version for name, version in package_versions().items() if name in VERSIONS}
    pending = list(due.items())[accelerator.process_index :: accelerator.num_processes]
    silent = not accelerator.is_main_process
    with tqdm(total=len(pending), desc="generating", unit="image", disable=silent) as bar:
        while pending:
            asked = [requests[name] for name, _ in pending]
            seeds = [noise_seed(requests[name], attempt) for name, attempt in pending]
            pictures = sample_pictures(
                pipeline, [request["prompt"] for request in asked], seeds, asked[0]["resolution"], args.num_inference_steps,
                args.guidance_scale, args.batch_size, [request["negative_prompt"] for request in asked], init_image, args.strength,
            )  # fmt: skip
            again = []
            for (name, attempt), seed, picture in zip(pending, seeds, pictures, strict=True):
                flags = quality.flags(picture)
                if flags and attempt < args.reject:
                    again.append((name, attempt + 1))
                    continue
                made = requests[name] | {
                    "noise_seed": seed, "attempts": attempt + 1, "flags": flags, "labels": labels[name], "versions": versions,
                }  # fmt: skip
                film = grey_levels(picture[None], args.bit_depth)[0].numpy().astype(f"uint{args.bit_depth}")
                keep(args.output_dir, name, encode_png(film, made), made)
                bar.update()
            pending = again


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    check_args(args)
    prompts, num_given = ([], 0) if args.serve else gather_prompts(args)
    check_files(args)
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))  # of processes that have less to draw
    accelerator = Accelerator(mixed_precision=choose_mixed_precision(args.mixed_precision), kwargs_handlers=[timeout])
    allow_tf32(accelerator.mixed_precision != "no")
    use_all_cores()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if args.serve:
        serve(args, accelerator)
        return
    if len(prompts) < num_given and accelerator.is_main_process:
        print(f"{len(prompts)} different prompts of {num_given}; equal ones are drawn once")

    # The base with the adapters in it, what looks at its films, and where they begin
    pipeline, model, quality = load_model(args, accelerator)
    output_dir, resolution = args.output_dir, model["resolution"]
    init_image, begun = read_init_image(args, resolution)
    if init_image is not None:
        accelerator.print("images that begin at a film show its patient: share them no further than that film")
    for note in long_prompts(pipeline, prompts):
        accelerator.print(note)

    # What is asked for, less what an earlier call of the same command has made
    by_prompt = requests_of(args, prompts, model | settings_of(args) | begun)
    requests = {name: request for images in by_prompt for name, request in images.items()}
    labels = {name: prompt.labels for prompt, images in zip(prompts, by_prompt, strict=True) for name in images}
    # One process looks, as processes that saw different folders would share out different lists
    (due,) = broadcast_object_list(
        [find_due(output_dir, requests, args.reject) if accelerator.is_main_process else {}]
    )
    if accelerator.is_main_process:
        require_space(output_dir, len(due) * resolution**2 * args.bit_depth // 8, "the images")
        output_dir.mkdir(parents=True, exist_ok=True)
        settle_records(output_dir, [name for name in requests if (output_dir / name).exists()])
    accelerator.wait_for_everyone()  # now all know what is due, and nobody has drawn yet
    with explain_out_of_memory("generating", memory_advice(args, accelerator)):
        draw(args, accelerator, pipeline, quality, init_image, requests, labels, due)
    accelerator.wait_for_everyone()

    # The same as DICOM, from the images as they lie there, with all that is known of them from this command or another
    rows = settle_records(output_dir, list(requests), labels) if accelerator.is_main_process else []
    (known,) = broadcast_object_list([{row["file_name"]: row["labels"] for row in rows}])
    if args.dicom:
        mine = list(requests)[accelerator.process_index :: accelerator.num_processes]
        with tqdm(mine, desc="DICOM", unit="film", disable=not accelerator.is_main_process) as bar:
            for name in bar:
                film, made = read_png(output_dir / name), read_made(output_dir / name) | {"labels": known[name]}
                path = (output_dir / "dicom" / name).with_suffix(".dcm")
                dicom = encode_dicom(film, made, args.burn_label)
                with hold_record(output_dir):  # an equal command may be at the same film
                    write_bytes(path, dicom)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return

    # What a person looks at
    shown = [
        [eight_bits(read_png(output_dir / name)) for name in list(images)[:SHEET_COLUMNS]]
        for images in by_prompt[:SHEET_ROWS]
    ]
    in_step = not args.own_noise and all(prompt.seed is None for prompt in prompts)
    seeds = [f"seed {args.seed + j}" if in_step else "" for j in range(len(shown[0]))]
    footer = DISCLAIMER if init_image is None else OF_A_FILM
    sheet = contact_sheet(shown, [prompt.text for prompt in prompts[:SHEET_ROWS]], seeds, footer)
    with hold_record(output_dir):
        save_png(output_dir / "contact_sheet.png", sheet)
    tell_quality(rows)
    noises = [table_row(row)["patient_id"] for row in rows if is_to_train_on(row)]
    if len(set(noises)) < FEW_NOISES <= len(noises) and in_step and init_image is None:
        print(f"all from {len(set(noises))} noises, too few for a data set; add --own_noise to train on such images")
    print(f"{len(due)} new of {len(requests)} images in {output_dir}; look at {output_dir}/contact_sheet.png")


def find_due(folder: Path, names: Iterable[str], reject: int) -> dict[str, int]:
    """Return the images to be drawn, and how often each was before: those not there, and flagged ones up to `reject` times."""
    due = {}
    for name in names:
        if not (folder / name).exists():
            due[name] = 0
        elif reject and (made := read_made(folder / name))["flags"] and made["attempts"] <= reject:
            due[name] = made["attempts"]
    return due


def settings_of(args: argparse.Namespace) -> dict:
    """Return the settings of sampling that an image depends on."""
    names = ("scheduler", "num_inference_steps", "guidance_scale", "batch_size", "bit_depth")
    return {name: getattr(args, name) for name in names}


def read_init_image(args: argparse.Namespace, resolution: int) -> tuple[torch.Tensor | None, dict]:
    """Return the film that images begin at, uint8 [resolution, resolution], None where at noise; and what they say of it."""
    if args.init_image is None:
        return None, {"init_image_sha256": None, "strength": None}
    try:
        film, digest = load_film(args.init_image, resolution), sha256_file(args.init_image)
    except (OSError, UnusableFilm) as error:
        raise Refused(f"--init_image {args.init_image} is no film that can be read ({error})") from error
    return film, {"init_image_sha256": digest, "strength": args.strength}


def serve(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Open a page on which the base and an adapter draw prompts, until ^C; its images are those of the command line."""
    if accelerator.num_processes > 1:
        raise Refused("--serve is for one process; start it with python generate.py --serve")

    held: OrderedDict[tuple, tuple] = OrderedDict()  # the base, and one adapter in it

    def loaded(asked: argparse.Namespace) -> tuple[StableDiffusionPipeline, dict, QualityControl]:
        key = (*(sha256_file(find_adapter(path)) for path in asked.lora), asked.lora_scale[0] if asked.lora else 1.0)
        if key not in held:
            while len(held) > 1:
                held.popitem(last=False)
            accelerator.free_memory()  # it remembers all models that it prepared, and forgets them
            accelerator.free_memory()  # after it has collected garbage: now they go
            held[key] = load_model(asked, accelerator)
        held.move_to_end(key)
        return held[key]

    with tempfile.TemporaryDirectory() as shown:  # a visitor is given copies, and nothing else of --output_dir

        def answer(wish: Wish) -> tuple[dict[Path, list[str]], list[str]]:
            asked = with_flags(
                args, **vars(wish) | {"lora": [wish.lora] if wish.lora else [], "lora_scale": [wish.lora_scale]}
            )
            check_args(asked)
            prompts = check_prompts(
                replace(prompt, negative=wish.negative_prompt) for prompt in typed_prompts([wish.prompt])
            )
            with explain_out_of_memory("generating", memory_advice(args, accelerator)):
                pipeline, model, quality = loaded(asked)
                _, begun = read_init_image(asked, model["resolution"])
                (requests,) = requests_of(asked, prompts, model | settings_of(asked) | begun)
                due = find_due(args.output_dir, requests, args.reject)
                draw(asked, accelerator, pipeline, quality, None, requests, dict.fromkeys(requests, {}), due)
            rows = settle_records(args.output_dir, list(requests))
            copies = {Path(shutil.copy(args.output_dir / row["file_name"], shown)): row["flags"] for row in rows}
            return copies, long_prompts(pipeline, prompts)

        first = Wish(
            prompt=args.prompt[0] if args.prompt else EXAMPLES[0], negative_prompt=args.negative_prompt, lora=None,
            lora_scale=args.lora_scale[0], seed=args.seed, num_images=args.num_images,
            guidance_scale=args.guidance_scale, num_inference_steps=args.num_inference_steps,
        )  # fmt: skip
        for path in args.lora:
            if not find_adapters([path]):
                raise Refused(f"no adapter at {path}; expected a run's folder, a folder of runs, or a file")
        page = build_page(answer, args.lora or [Path("out")], first)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            page.launch(share=args.share, server_port=args.port, footer_links=[])
        except OSError as error:
            raise Refused(f"the page cannot be opened ({error}); name another --port") from error


def with_flags(args: argparse.Namespace, **changes) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changes)


def tell_quality(rows: Sequence[dict]) -> None:
    """Say how many images quality control has flagged, or had drawn anew."""
    counts = Counter(flag for row in rows for flag in row["flags"])
    if counts:
        listed = ", ".join(f"{count} {flag}" for flag, count in counts.most_common())
        flagged = sum(bool(row["flags"]) for row in rows)
        print(
            f"{flagged} of {len(rows)} images flagged ({listed}): left out of metadata.jsonl; --reject 3 draws such anew"
        )
    if anew := sum(row["attempts"] > 1 for row in rows):
        print(f"{anew} of {len(rows)} images drawn anew")
    if held_out := sum(row["labels"].get("held_out", False) for row in rows):
        print(f"{held_out} of {len(rows)} images have captions of a held-out fold: left out of metadata.jsonl, too")


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
