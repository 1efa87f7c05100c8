"""Generate synthetic chest radiographs from text.

    python generate.py --prompt "PA chest radiograph of a 60-year-old man. Cardiomegaly." --lora out/fold2

Writes to images/ (--output_dir):

    <prompt>_<seed>_<hash>.png   8-bit grey; how it was made is in its text chunks
    images.jsonl                 the same, a row an image
    contact_sheet.png            this command's images, a row a prompt

Image j of any prompt starts from the noise of seed + j, so that prompts can be compared at equal noise. The hash is one
of everything an image depends on: the same command leaves finished images alone, another never overwrites them.
"""

import argparse
import hashlib
import io
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from utils.decoder import find_decoder, put_on_decoder, read_decoder
from utils.files import canonical_json, hold_lock, read_jsonl, sha256_file, write_bytes, write_jsonl
from utils.hardware import choose_mixed_precision, keep_freed_memory, use_all_cores
from utils.linear import use_frozen_products
from utils.lora import find_adapter, read_adapter
from utils.pipeline import (
    SCHEDULERS,
    assemble,
    canonical_name,
    cast_frozen,
    default_base,
    load_base,
    put_on_adapter,
    sample,
    with_schedule,
)
from utils.refusal import ArgumentParser, Refused, run
from utils.report import contact_sheet, save_png
from utils.tokens import fit_captions

DISCLAIMER = "Synthetic: made by a diffusion model from text. Not for diagnosis."
SHEET_ROWS, SHEET_COLUMNS = 16, 8  # the contact sheet shows no more than that


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("what").add_argument
    add("--prompt", action="append", default=[], help="text of a film; repeat for more")
    add("--prompts_file", type=Path, help="text file with a prompt a line")
    add("--num_images", type=int, default=1, help="images a prompt [1]")
    add("--seed", type=int, default=0, help="image j starts from the noise of seed + j [0]")

    add = parser.add_argument_group("model").add_argument
    add("--lora", type=Path, help="adapter: a run's folder or a safetensors file [none: the bare base]")
    add("--lora_scale", type=float, default=1.0, help="weight of the adapter; 0 is the bare base [1]")
    add("--no_vae_decoder", action="store_true", help="keep the base's decoder where one lies beside the adapter")
    add("--pretrained_model_name_or_path", metavar="BASE", help="folder or hub id [the adapter's own base]")
    add("--revision", help="branch, tag or commit of the base on the hub")
    add("--variant", help="infix of the base's weight files, such as fp16")
    add("--cache_dir", help="where hub downloads are kept")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", type=int, default=25, help="solver steps [25]")
    add("--guidance_scale", type=float, default=4.0, help="classifier-free guidance; 1 is none [4]")
    add("--scheduler", choices=sorted(SCHEDULERS), default="dpmsolver++", help="solver [dpmsolver++]")
    add("--resolution", type=int, help="side in pixels [the adapter's own, else the base's]")
    add("--batch_size", type=int, default=4, help="images at a time; short batches are filled up [4]")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[accelerate's, else bf16 where native, else no]")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("images"), help="folder of the images [images]")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant and machines that cannot do what is asked, before anything is loaded."""
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise Refused(f"--{name} {getattr(args, name)}; expected 1 or more")
    if args.seed < 0:
        raise Refused(f"--seed {args.seed}; expected 0 or more")
    for name in ("guidance_scale", "lora_scale"):
        if not math.isfinite(getattr(args, name)):
            raise Refused(f"--{name} {getattr(args, name)}; expected a finite number")
    choose_mixed_precision(args.mixed_precision)


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line and of a file, without blank ones."""
    lines = []
    if file is not None:
        if not file.is_file():
            raise Refused(f"no prompts at {file}; expected a text file with a prompt a line")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Refused(f"{file} is no text file in UTF-8 ({error.reason})") from error
    kept = [text.strip() for text in [*prompts, *lines] if text.strip()]
    if not kept:
        raise Refused('no prompt; expected --prompt "PA chest radiograph of a 60-year-old man. Cardiomegaly."')
    return list(dict.fromkeys(kept))


def file_name(image: dict) -> str:
    """Return a name that says what an image shows and differs for images that differ in anything."""
    words = re.sub(r"[^a-z0-9]+", "-", image["prompt"].lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(canonical_json(image).encode()).hexdigest()[:8]
    return f"{words}_{image['seed']}_{digest}.png"


def encode_png(film: torch.Tensor, image: dict) -> bytes:
    """Return a film, uint8 [H, W], as PNG with its provenance in text chunks; equal films give equal bytes."""
    chunks = PngInfo()
    chunks.add_text("Synthetic", "YES")
    chunks.add_text("Disclaimer", DISCLAIMER)
    for name, value in image.items():
        chunks.add_itxt(name, "none" if value is None else str(value))
    buffer = io.BytesIO()
    Image.fromarray(film.numpy()).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def add_to_record(output_dir: Path, names: Sequence[str], images: Sequence[dict]) -> None:
    """Add rows to `images.jsonl`, also for images that an earlier call was killed before it could name."""
    record = output_dir / "images.jsonl"
    lock = hold_lock(output_dir / ".lock")
    if lock is None:
        raise Refused(f"another generate.py is writing {record}; the images are there, the same command names them")
    rows = {row["file_name"]: row for row in read_jsonl(record)} if record.exists() else {}
    for name, image in zip(names, images, strict=True):
        rows[name] = {"file_name": name} | image | {"synthetic": True, "sha256": sha256_file(output_dir / name)}
    write_jsonl(record, rows.values())
    lock.close()


def main(args: argparse.Namespace) -> None:
    check_args(args)
    prompts = read_prompts(args.prompt, args.prompts_file)

    # The base, and the adapter on it
    adapter, header, adapter_file, decoder_file = {}, {}, None, None
    if args.lora is not None:
        adapter_file = find_adapter(args.lora)
        adapter, header = read_adapter(adapter_file)
        decoder_file = None if args.no_vae_decoder else find_decoder(adapter_file)
    accelerator = Accelerator(mixed_precision=choose_mixed_precision(args.mixed_precision))
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    trained, base_name = header.get("settings", {}), args.pretrained_model_name_or_path
    if base_name is None and "base" in header:
        revision, variant = args.revision or trained["revision"], args.variant or trained["variant"]
    else:
        revision, variant = args.revision, args.variant
    base_name = canonical_name(base_name or header.get("base") or default_base())
    base = load_base(base_name, revision, variant, args.cache_dir)
    base = with_schedule(base, trained.get("prediction_type"), trained.get("rescale_betas_zero_snr", False))
    resolution = args.resolution or header.get("resolution") or base.resolution
    if resolution % base.pixel_multiple:
        raise Refused(f"--resolution {resolution}; this base needs a multiple of {base.pixel_multiple}")
    pipeline = assemble(base, args.scheduler)
    if adapter:
        put_on_adapter(pipeline, adapter, args.lora_scale)
    if decoder_file is not None:
        put_on_decoder(base.vae, read_decoder(decoder_file)[0])
    cast_frozen(base.unet, accelerator.mixed_precision)
    for model in (base.unet, base.text_encoder, base.vae):
        model.requires_grad_(False).eval()
    if accelerator.device.type == "cpu":
        use_frozen_products(base.unet, base.text_encoder, base.vae)
    base.vae.to(accelerator.device, memory_format=torch.channels_last)
    for model in (base.unet.to(memory_format=torch.channels_last), base.text_encoder):
        accelerator.prepare_model(model, evaluation_mode=True)
    print(
        f"base {base_name}, adapter {adapter_file or 'none'}, {accelerator.mixed_precision} on {accelerator.device.type}"
    )
    if decoder_file is not None:
        print(f"decoder {decoder_file}, fitted to radiographs; --no_vae_decoder takes the base's own")

    for prompt, fitted in zip(prompts, fit_captions(base.tokenizer, prompts), strict=True):
        if fitted != prompt:
            print(f"longer than {base.tokenizer.model_max_length} tokens, drawn from its beginning: {fitted}")

    # What is asked for, less what an earlier call of the same command has made
    images = [
        {
            "prompt": prompt, "seed": args.seed + j, "base": base_name, "base_revision": revision,
            "adapter_sha256": sha256_file(adapter_file) if adapter_file else None, "lora_scale": args.lora_scale,
            "decoder_sha256": sha256_file(decoder_file) if decoder_file else None,
            "num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale,
            "scheduler": args.scheduler, "resolution": resolution, "mixed_precision": accelerator.mixed_precision,
            "batch_size": args.batch_size,
        }
        for prompt in prompts
        for j in range(args.num_images)
    ]  # fmt: skip
    names = [file_name(image) for image in images]
    missing = [i for i in range(len(images)) if not (args.output_dir / names[i]).exists()]

    # One generator an image: it does not depend on what else is asked for
    films = sample(
        pipeline, [images[i]["prompt"] for i in missing], [images[i]["seed"] for i in missing], resolution,
        args.num_inference_steps, args.guidance_scale, args.batch_size,
    )  # fmt: skip
    for i, film in zip(missing, tqdm(films, total=len(missing), desc="generating", unit="image"), strict=True):
        write_bytes(args.output_dir / names[i], encode_png(film, images[i]))
    add_to_record(args.output_dir, names, images)

    # What a person looks at
    shown = [
        [
            np.asarray(Image.open(args.output_dir / names[row * args.num_images + j]))
            for j in range(min(args.num_images, SHEET_COLUMNS))
        ]
        for row in range(min(len(prompts), SHEET_ROWS))
    ]
    seeds = [f"seed {args.seed + j}" for j in range(len(shown[0]))]
    sheet = contact_sheet(shown, prompts[: len(shown)], seeds, DISCLAIMER)
    save_png(args.output_dir / "contact_sheet.png", sheet)
    print(
        f"{len(missing)} new of {len(images)} images in {args.output_dir}; look at {args.output_dir}/contact_sheet.png"
    )


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
