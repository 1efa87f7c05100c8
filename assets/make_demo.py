"""Make the bundled demo set: films of virtual patients, sampled from cxr-tiny as normal, with findings drawn in.

    python -m assets.make_demo

Every patient has several films: the first is a free sample, the others start from it with part of the noise put back
(SDEdit, Meng et al. 2022), so that they show the same chest at another moment. What is drawn into a film, where, and in which words it
is captioned is decided by `--seed` alone. No caption of the base's films named these findings: what an adapter learns
of them is LoRA's own work, and `evaluate.py` can measure it.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from tqdm.auto import tqdm

from assets.anatomy import SIDES, find_lungs
from assets.drawing import FINDINGS, NORMAL_PHRASES, SIDED, draw, phrase, virtual_findings
from assets.marks import LABEL_PHRASES, OPENINGS
from utils.files import write_bytes, write_jsonl
from utils.films import encode_png
from utils.hardware import use_all_cores
from utils.images import load_film, to_grey
from utils.pipeline import BUNDLED_BASE, ROOT, assemble, load_base, sample
from utils.refusal import ArgumentParser, run
from utils.report import contact_sheet, save_png
from utils.seeding import derive_seed

OPENING = "Chest radiograph of a child."
RESOLUTION = 128
STEPS, GUIDANCE, BATCH = 25, 3.0, 20
MIN_SEVERITY = 0.5  # the larger half of what is drawn elsewhere: minutes are enough to learn it
FOLLOW_UP_STRENGTH = 0.45  # of the noise: ribs and heart stay where they are


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_patients", type=int, default=120, help="virtual patients")
    parser.add_argument("--films_per_patient", type=int, default=3, help="films of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "assets" / "demo", help="where the set goes")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    use_all_cores()
    pipeline = assemble(load_base(BUNDLED_BASE))
    films = sample_patients(pipeline, args)
    rows = []
    for patient, visits in enumerate(films):
        for visit, film in enumerate(visits):
            rng = np.random.default_rng(derive_seed(args.seed, "findings", patient, visit))
            film, boxes, sentences = draw_findings(film, rng)
            name = f"images/virtual-{patient:03d}-{visit}.png"
            write_bytes(args.output_dir / name, encode_png(film))
            rows.append(
                {
                    "file_name": name,
                    "text": " ".join([OPENING, *sentences]),
                    "patient_id": f"virtual-{patient:03d}",
                    "findings": sorted({box["finding"] for box in boxes}),
                    "boxes": boxes,
                }
            )
    write_jsonl(args.output_dir / "metadata.jsonl", rows)
    save_png(args.output_dir / "samples.png", draw_samples(args.output_dir, rows).quantize(16))
    write_bytes(args.output_dir / "README.md", card(args, rows).encode())


def sample_patients(pipeline, args: argparse.Namespace) -> list[list[np.ndarray]]:
    """Return normal films by patient and visit, uint8 [128, 128] each."""
    seeds = [derive_seed(args.seed, "patient", patient) % 2**32 for patient in range(args.num_patients)]
    prompts = [normal_prompt(seed) for seed in seeds]
    firsts = sample(pipeline, prompts, seeds, RESOLUTION, STEPS, GUIDANCE, BATCH)
    films = [[first.numpy()] for first in tqdm(firsts, "patients", len(seeds))]
    again = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    for visit in tqdm(range(1, args.films_per_patient), "follow-ups"):
        for start in range(0, len(films), BATCH):
            chunk = range(start, min(start + BATCH, len(films)))
            images = again(
                prompt=[prompts[patient] for patient in chunk],
                image=[Image.fromarray(films[patient][0]).convert("RGB") for patient in chunk],
                strength=FOLLOW_UP_STRENGTH,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seeds[patient] + visit) for patient in chunk],
            ).images
            for patient, image in zip(chunk, images, strict=True):
                films[patient].append(to_grey(image).numpy())
    return films


def normal_prompt(seed: int) -> str:
    """Return a caption of a normal film, in some words of the base's own captions."""
    rng = random.Random(seed)
    return f"{rng.choice(OPENINGS)} {rng.choice(LABEL_PHRASES['normal'])}"


def draw_findings(film: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[dict], list[str]]:
    """Return the film with none, one or two findings, the box of each as fractions of the side, and their sentences."""
    lungs, boxes, sentences = find_lungs(film), [], []
    for finding, side, zone in virtual_findings(rng):
        film, mask = draw(film, finding, side, zone, rng, lungs, severity=float(rng.uniform(MIN_SEVERITY, 1)))
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        box = [round(float(edge) / RESOLUTION, 4) for edge in edges]
        boxes.append({"finding": finding, "side": side, "zone": zone, "box": box})
        sentences.append(phrase(finding, side, zone, rng))
    if not boxes:
        sentences.append(NORMAL_PHRASES[rng.integers(len(NORMAL_PHRASES))])
    return film, boxes, sentences


def draw_samples(folder: Path, rows: list[dict]) -> Image.Image:
    """Return a sheet with a row for normal films and one for each finding, up to three right and three left."""
    films, titles = [], []
    for finding in ("none", *FINDINGS):
        alone = [row for row in rows if [box["finding"] for box in row["boxes"]] == [finding]]
        if finding == "none":
            alone = [row for row in rows if not row["boxes"]]
        by_side = {side: [row for row in alone if side in sides(row)] for side in (*SIDES, None)}
        chosen = by_side["right"][:3] + by_side["left"][:3] + by_side[None][:6]
        films.append([load_film(folder / row["file_name"], RESOLUTION).numpy() for row in chosen])
        titles.append(f"{finding}, right | left" if finding in SIDED else finding)
    return contact_sheet(films, titles, [], "Synthetic films with findings drawn in. Not for diagnosis.")


def sides(row: dict) -> set[str | None]:
    return {box["side"] for box in row["boxes"]} or {None}


CARD = """# demo

{films} synthetic chest films of {patients} virtual patients, {per_patient} each, 128 px, for trying this software out. **No
patient is shown, and nothing here is for diagnosis, nor for training or testing anything that will be used for it.** CC BY
4.0, as the children's films of Kermany et al. 2018 that `assets/cxr-tiny` was trained on.

![one row a finding](samples.png)

`python -m assets.make_demo --seed {seed}`: normal films sampled from cxr-tiny ({steps} DPM-Solver++ steps, guidance
{guidance:g}), a patient's later ones from the first with {strength:.0%} of the noise put back, and findings of severity {severity:g} to 1
drawn in as `assets/drawing.py` describes, with what it leaves out. No caption that cxr-tiny was trained on named these
findings, which is the point: what an adapter shows of them it learnt from these films.

`metadata.jsonl`, one row a film: `file_name`; `text`, the caption, which states each finding and its side, and nothing else;
`patient_id`; `findings`; `boxes`, for each finding its side, its zone and `box`, the left, top, right and bottom edge of what
was drawn as fractions of the side. The patient's right is at the image's left.

| finding | films | right | left |
|---|---|---|---|
{table}
"""


def card(args: argparse.Namespace, rows: list[dict]) -> str:
    lines = [f"| none | {sum(not row['boxes'] for row in rows)} | | |"]
    for finding in FINDINGS:
        found = [box["side"] for row in rows for box in row["boxes"] if box["finding"] == finding]
        right, left = (str(found.count(side)) if finding in SIDED else "" for side in SIDES)
        lines.append(f"| {finding} | {len(found)} | {right} | {left} |")
    return CARD.format(
        films=len(rows),
        patients=args.num_patients,
        per_patient=args.films_per_patient,
        seed=args.seed,
        steps=STEPS,
        guidance=GUIDANCE,
        strength=FOLLOW_UP_STRENGTH,
        severity=MIN_SEVERITY,
        table="\n".join(lines),
    )


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
