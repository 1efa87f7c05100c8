"""Measure the bundled base, cxr-tiny, on films that it never saw, and write its card.

    python -m assets.measure_cxr_tiny --films FOLDER --adult_films data

FOLDER is that of Kermany et al. 2018, as for `assets.train_cxr_tiny`; the fifth of its patients that was held out there
is what samples are compared with, by `assets/cxr-features`, which did not see those patients either. The adult films, an
imagefolder, are for the autoencoder's round trip. Writes metrics.json, samples.png and README.md beside the weights.
Ten minutes on two cores.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from assets.kermany import decode, read_labels
from assets.marks import LABEL_PHRASES, OPENINGS, RESOLUTION
from utils.distances import auroc, frechet_distance, kernel_distance, memorisation
from utils.features import LABELS, Extracted, extract, load_encoder
from utils.files import read_jsonl, write_bytes, write_json
from utils.hardware import use_all_cores
from utils.images import thumbnails, to_films
from utils.latents import FilmDataset, load_films
from utils.metadata import read_metadata
from utils.metrics import bootstrap_interval, psnr, ssim
from utils.pipeline import BUNDLED_BASE, ROOT, assemble, load_base, sample
from utils.refusal import ArgumentParser, run
from utils.report import contact_sheet, save_png
from utils.seeding import derive_seed

GUIDANCE, STEPS, BATCH = 2.0, 25, 25
SHOWN_PROMPTS = (
    "Chest radiograph of a child. Normal.",
    "Chest radiograph of a child. Bacterial pneumonia.",
    "Chest radiograph of a child. Viral pneumonia.",
    "Chest radiograph of a child. Normal. Safety pin over the right upper chest.",
    "Chest radiograph of a child. Normal. Safety pin over the left lower chest.",
    "Chest radiograph of a child. Normal. Tilted to the left. Zip over the right chest.",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--adult_films", type=Path, required=True, help="imagefolder of films of another kind")
    parser.add_argument("--model", type=Path, default=ROOT / BUNDLED_BASE, help="folder of the base")
    parser.add_argument("--num_samples", type=int, default=500, help="films to draw, and held-out films beside them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    use_all_cores()
    base, encoder = load_base(str(args.model)), load_encoder()
    rows, held_out = read_labels(args.films)
    films = torch.from_numpy(decode(args.films, rows, [RESOLUTION])[RESOLUTION])
    labels = np.array([LABELS.index(row["label"]) for row in rows])
    patients = np.array([row["patient_id"] for row in rows])

    # Two halves of the held-out patients: what samples are compared with, and what real films score in their place
    reference, other = split_patients(np.flatnonzero(held_out), patients, args.num_samples, args.seed)
    prompts, prompted = draw_prompts(labels[reference], args.seed)
    seeds = [derive_seed(args.seed, "sample", i) % 2**32 for i in range(len(prompts))]
    drawn = sample(assemble(base), prompts, seeds, RESOLUTION, STEPS, GUIDANCE, BATCH)
    samples = torch.stack(list(tqdm(drawn, "sampling", len(prompts))))
    with torch.no_grad():
        read = {"samples": extract(encoder, samples), "all": extract(encoder, films)}
    features = read["all"].features

    metrics = {
        "samples": len(samples),
        "reference_films": len(reference),
        "floor_films": len(other),
        "guidance_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "seed": args.seed,
        "frechet_distance": {
            "samples": frechet_distance(read["samples"].features, features[reference]),
            "real_floor": frechet_distance(features[other], features[reference]),
        },
        "kernel_distance": {
            "samples": kernel_distance(read["samples"].features, features[reference]),
            "real_floor": kernel_distance(features[other], features[reference]),
        },
        "auroc": {
            "samples": label_areas(read["samples"], prompted, [str(seed) for seed in seeds], args.seed),
            "held_out": label_areas(
                read["all"].at(torch.from_numpy(held_out)), labels[held_out], patients[held_out], args.seed
            ),
        },
        "audit": {
            space: {
                "samples": audit(of(samples), of(films), patients, ~held_out, held_out, args.seed),
                # What films score that nothing was trained on, one each of patients whom neither side has
                "real_floor": audit(
                    of(films[one_each(other, patients)]), of(films), patients, ~held_out, reference, args.seed
                ),
            }
            for space, of in (("features", lambda part: extract(encoder, part).features), ("pixels", thumbnails))
        },
        "round_trip": round_trip(args, base.vae),
    }
    write_json(args.model / "metrics.json", metrics)

    shown_seeds = list(range(6))
    shown = list(
        sample(
            assemble(base), [prompt for prompt in SHOWN_PROMPTS for _ in shown_seeds],
            shown_seeds * len(SHOWN_PROMPTS), RESOLUTION, STEPS, 4.0, len(shown_seeds),
        )
    )  # fmt: skip
    grid = [[film.numpy() for film in shown[i : i + 6]] for i in range(0, len(shown), 6)]
    footer = "Synthetic, not for diagnosis. Guidance 4, 25 steps, the same noise in every column, none left out."
    save_png(
        args.model / "samples.png",
        contact_sheet(grid, SHOWN_PROMPTS, [f"seed {seed}" for seed in shown_seeds], footer).quantize(16),
    )
    write_bytes(args.model / "README.md", card(args.model, metrics).encode())
    print(json.dumps(metrics, indent=1))


def split_patients(places: np.ndarray, patients: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of two sets of at most `count` films each, no patient in both."""
    order = sorted(set(patients[places]))
    random.Random(seed).shuffle(order)
    first = np.isin(patients[places], order[::2])
    rng = np.random.default_rng(seed)
    return tuple(np.sort(rng.permutation(part)[:count]) for part in (places[first], places[~first]))


def draw_prompts(labels: np.ndarray, seed: int) -> tuple[list[str], np.ndarray]:
    """Return a prompt for every film of the reference, in the words of training and with its label, and the labels."""
    prompts = []
    for index, label in enumerate(labels):
        rng = random.Random(derive_seed(seed, "prompt", index))
        prompts.append(f"{rng.choice(OPENINGS)} {rng.choice(LABEL_PHRASES[LABELS[label]])}")
    return prompts, labels


def label_areas(read: Extracted, labels: np.ndarray, groups: Sequence[str], seed: int) -> dict:
    """Return the AUROC, with its interval, of two readings: pneumonia or normal, and which kind of pneumonia."""
    normal, bacterial, viral = read.label_probabilities.T
    sick = labels != LABELS.index("normal")
    groups = np.asarray(groups)
    return {
        "pneumonia_or_normal": auroc(-normal, sick, groups, seed),
        "viral_or_bacterial": auroc(
            (viral - bacterial)[torch.from_numpy(sick)], labels[sick] == 2, groups[sick], seed
        ),
    }


def one_each(places: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return the places of the first film of each patient."""
    return places[np.unique(patients[places], return_index=True)[1]]


def audit(
    generated: Tensor, films: Tensor, patients: np.ndarray, train: np.ndarray, held_out: np.ndarray, seed: int
) -> dict:
    """Return how often rows of `generated` lie nearer to films of `train` than of `held_out`, as for `metrics.json`.

    Args:
        generated, films: features or pixels, [N, D] and [M, D].
        patients: whose film it is, [M].
        train, held_out: which films, bool [M] or their places.
        seed: of the choice of as many of each.
    """
    found = memorisation(generated, films[train], films[held_out], seed, patients[train], patients[held_out])
    return {
        "probability": found.probability,
        "interval": found.interval,
        "generated": found.num_generated,
        "references": found.num_references,
    }


@torch.no_grad()
def round_trip(args: argparse.Namespace, vae: AutoencoderKL) -> dict:
    """Return SSIM and PSNR of adult films after the autoencoder, and of their mean film in place of each."""
    rows = read_metadata(args.adult_films)
    films = load_films(FilmDataset(args.adult_films, rows, RESOLUTION))
    patients = [str(row["patient_id"] or row["file_name"]) for row in rows]
    vae = vae.to(memory_format=torch.channels_last)
    rebuilt = []
    for chunk in tqdm(films.split(32), "round trip"):
        pixel_values = chunk[:, None].expand(-1, 3, -1, -1) / 127.5 - 1.0
        rebuilt.append(to_films(vae.decode(vae.encode(pixel_values).latent_dist.mean).sample))
    mean = films.float().mean(dim=0).round().to(torch.uint8).expand_as(films)
    figures = {"films": len(films)}
    for name, metric in (("ssim", ssim), ("psnr", psnr)):
        values = metric(torch.cat(rebuilt), films)
        interval = bootstrap_interval(values.tolist(), patients, args.seed)
        figures[name] = {
            "mean": values.mean().item(),
            "interval": interval,
            "mean_film": metric(mean, films).mean().item(),
        }
    return figures


CARD = """# cxr-tiny v1

The bundled base model: a Stable Diffusion of {parameters:.1f} million parameters, 128 px, in diffusers' layout
(`StableDiffusionPipeline.from_pretrained("assets/cxr-tiny")`), small enough to be adapted on two CPU cores. It knows children's
chest films, normal and with pneumonia, and was told nothing of adults or of other findings, which is what makes LoRA's
work visible. **Synthetic films for research and teaching. Not for diagnosis.**

![samples](samples.png)

## Films

Children's films of Kermany et al. 2018 (Cell 172(5), CC BY 4.0): 4,159 of 2,331 patients, squashed to 128 x 128. 1,057 films of
582 other patients were held out from all of its parts. Captions state the label in several phrasings; three quarters of
what the UNet saw carries marks of our own (`assets/marks.py`: safety pins, cables, zips, braids and side markers, tilt,
exposure, collimation and grid cut-off, by side and level), so that "left", "right", "upper" and "lower" mean something in
pixels. No finding was drawn; pneumonia may come with findings that nobody labelled.

## Recipe

`python -m assets.train_cxr_tiny --films FOLDER`, seed 0, two CPU cores, bf16 autocast; `curve-*.jsonl` hold the curves.

- **Autoencoder**: AutoencoderKL, factor 8, 8 latent channels, widths 32-64-96-128; 4,800 steps of 16 crops of 64 px in 38
  minutes, 15 % of them with lines, discs, boxes or letters drawn on; L1 + 0.2 (1 - SSIM) + 1e-4 KL, Muon; then each latent channel brought to mean 0 and deviation 1 (`scaling_factor`
  1). It was trained by a draft of that script with the same recipe; random draws differ.
- **Text encoder**: CLIP, 128 wide, 4 layers; 400 steps of reading sentences of our own (`assets/sentences.py`), and on beside
  the UNet.
- **UNet**: widths 64-128-160, cross-attention at every level, velocity prediction on the noise schedule of Stable Diffusion
  1.5, all timesteps weighed alike, 10 % empty captions, average over steps; {unet_steps:,} steps of 32 films.

Weights are stored in fp16 and load as fp32.

## Measured

`python -m assets.measure_cxr_tiny`, seed {seed}; 95 % intervals by bootstrap over patients, of samples over samples.
{samples} samples at guidance {guidance_scale:g} (the picture: 4), {num_inference_steps} DPM-Solver++ steps, prompts with the labels of the {reference_films} held-out films
they are compared with; the floor is {floor_films} real films of yet other held-out patients in their place. Features: `assets/cxr-features`.
Guidance makes samples typical of their prompt: they are read more surely than films are, and vary less.

| | samples | real films (floor) |
|---|---|---|
| Frechet distance, FD-{samples} | {frechet[samples]:.3f} | {frechet[real_floor]:.3f} |
| kernel distance | {kernel_samples} | {kernel_real} |
| AUROC, pneumonia or normal, against prompt or label | {auroc_samples} | {auroc_real} |
| AUROC, viral or bacterial | {kind_samples} | {kind_real} |

| memorisation: P(nearer to a training film than to a held-out one), 0.5 is none | samples | real films never trained on (floor) |
|---|---|---|
| in features | {audit_features} | {audit_features_floor} |
| in pixels, 32 x 32 | {audit_pixels} | {audit_pixels_floor} |

The audit asks {audit_films} training films and {audit_films} held-out ones, one a patient ({floor_films_asked} of each for the
floor, asked about {floor_films_generated} films of yet other patients): the nearest of more films, or of more patients, would be nearer
without any memory. Its intervals are over generated films and over real ones.

| round trip of the autoencoder, {round_films} adult films that it never saw | this model | mean film (floor) |
|---|---|---|
| SSIM | {ssim_trip} | {ssim_floor:.4f} |
| PSNR, dB | {psnr_trip} | {psnr_floor:.2f} |

## Limits

Children of one hospital, three labels, 128 px; softer than a film. Anatomy is plausible, not right. Prompts about findings it
was never told of change little until an adapter teaches them, but where one names a side and a level, pins and cables may
turn up unasked.
"""


def card(folder: Path, metrics: dict) -> str:
    def with_interval(mean: float, interval: Sequence[float], digits: int = 3) -> str:
        return f"{mean:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"

    def kernel(name: str) -> str:
        mean, error = metrics["kernel_distance"][name]
        return f"{mean:.4f} (standard error {error:.4f})"

    def audited(found: dict) -> str:
        return with_interval(found["probability"], found["interval"])

    base = load_base(str(folder))
    steps = read_jsonl(folder / "curve-unet.jsonl")[-1]["step"]
    areas, trip = metrics["auroc"], metrics["round_trip"]
    return CARD.format(
        **{name: value for name, value in metrics.items() if not isinstance(value, dict)},
        parameters=sum(p.numel() for part in (base.unet, base.vae, base.text_encoder) for p in part.parameters())
        / 1e6,
        frechet=metrics["frechet_distance"],
        kernel_samples=kernel("samples"),
        kernel_real=kernel("real_floor"),
        auroc_samples=with_interval(*areas["samples"]["pneumonia_or_normal"]),
        auroc_real=with_interval(*areas["held_out"]["pneumonia_or_normal"]),
        kind_samples=with_interval(*areas["samples"]["viral_or_bacterial"]),
        kind_real=with_interval(*areas["held_out"]["viral_or_bacterial"]),
        unet_steps=steps,
        audit_features=audited(metrics["audit"]["features"]["samples"]),
        audit_features_floor=audited(metrics["audit"]["features"]["real_floor"]),
        audit_pixels=audited(metrics["audit"]["pixels"]["samples"]),
        audit_pixels_floor=audited(metrics["audit"]["pixels"]["real_floor"]),
        audit_films=metrics["audit"]["features"]["samples"]["references"],
        floor_films_asked=metrics["audit"]["features"]["real_floor"]["references"],
        floor_films_generated=metrics["audit"]["features"]["real_floor"]["generated"],
        round_films=trip["films"],
        ssim_trip=with_interval(trip["ssim"]["mean"], trip["ssim"]["interval"], 4),
        ssim_floor=trip["ssim"]["mean_film"],
        psnr_trip=with_interval(trip["psnr"]["mean"], trip["psnr"]["interval"], 2),
        psnr_floor=trip["psnr"]["mean_film"],
    )


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
