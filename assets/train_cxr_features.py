"""Train the bundled film encoder, cxr-features, for distances, labels and findings: ten minutes on two cores.

    python -m assets.train_cxr_features --films FOLDER

FOLDER is that of Kermany et al. 2018 (CC BY 4.0): `images/` and a `labels.csv` of `file_name, patient_id, label`. Its
labels are read beside findings that `assets.drawing` draws into the same films. The fifth of the patients that
cxr-tiny never saw is not seen here either; what is measured on them goes into the card.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from assets import anatomy, drawing, marks
from assets.kermany import decode, read_labels
from utils.distances import auroc, frechet_distance
from utils.features import (
    FINDING_LABELS,
    LABELS,
    RESOLUTION,
    FilmEncoder,
    extract,
    finding_label,
    load_encoder,
    save_encoder,
    to_input,
)
from utils.files import sha256_file, write_bytes
from utils.hardware import has_native_bf16, use_all_cores
from utils.metrics import bootstrap_interval
from utils.refusal import ArgumentParser, run
from utils.seeding import derive_seed

DRAWN_SHARE, MARKED_SHARE = 0.5, 0.25  # of a batch: with findings, with marks alone
OVERLAYS = ("braid", "zip", "cable", "pin", "side marker")  # marks that move nothing: bright, and no finding
HELD_OUT_VARIANTS = 2  # drawn films a held-out film
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 2e-3, 0.05, 100
REDUNDANCY = 5e-3  # lambda of Barlow Twins
PROBE_WEIGHT = 0.5
BLUR_RADIUS = 4  # pixels, three standard deviations of the strongest blur


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--work_dir", type=Path, default=Path("cache/cxr-features"), help="where films are cached")
    parser.add_argument("--output_dir", type=Path, default=Path("assets/cxr-features"), help="where the encoder goes")
    parser.add_argument("--steps", type=int, default=1500, help="of `batch_size` films, each in two views")
    parser.add_argument("--batch_size", type=int, default=48, help="films a step")
    parser.add_argument("--variants", type=int, default=2, help="drawn films a training film")
    parser.add_argument("--max_films", type=int, help="of the table, drawn by chance; all by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    use_all_cores()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows, held_out = read_labels(args.films)
    if args.max_films:
        some = np.random.default_rng(args.seed).permutation(len(rows))[: args.max_films]
        rows, held_out = [rows[i] for i in some], held_out[some]
    films = decode(args.films, rows, [RESOLUTION])[RESOLUTION]
    plain = plain_films(films, rows)
    parts = [plain.at(np.flatnonzero(chosen)) for chosen in (~held_out, held_out)]
    drawn = [
        draw_films(args, part, name, variants)
        for part, name, variants in zip(parts, ("train", "held-out"), (args.variants, HELD_OUT_VARIANTS), strict=True)
    ]
    marked = [mark_films(part, derive_seed(args.seed, "marks", i)) for i, part in enumerate(parts)]
    start = time.perf_counter()
    encoder = train(args, parts[0], marked[0], drawn[0])
    minutes = (time.perf_counter() - start) / 60
    save_encoder(encoder, args.output_dir)
    stored = load_encoder(args.output_dir)  # what is on disk, fp16 and all, is measured
    measured = measure(stored, parts[1], marked[1], drawn[1], args.seed)
    print(measured)
    write_bytes(args.output_dir / "README.md", card(args, parts, drawn, minutes, measured).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Films


@dataclass(frozen=True)
class LabelledFilms:
    """Films and what is known of them.

    Attributes:
        films: uint8 [N, 128, 128].
        labels: index into LABELS, int64 [N].
        findings: of FINDING_LABELS, bool [N, 9].
        known: where `findings` can be trusted, bool [N, 9]. Pneumonia comes with effusions that nobody labelled.
        patients: [N].
    """

    films: Tensor
    labels: Tensor
    findings: Tensor
    known: Tensor
    patients: np.ndarray

    def __len__(self) -> int:
        return len(self.films)

    def at(self, places: np.ndarray | Tensor) -> "LabelledFilms":
        fields = (self.films, self.labels, self.findings, self.known)
        return LabelledFilms(*(field[places] for field in fields), self.patients[places])

    def __add__(self, other: "LabelledFilms") -> "LabelledFilms":
        pairs = [(self.films, other.films), (self.labels, other.labels)]
        pairs += [(self.findings, other.findings), (self.known, other.known)]
        return LabelledFilms(*map(torch.cat, pairs), np.concatenate([self.patients, other.patients]))


def cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return arrays from a file, made and written first where it does not exist."""
    if not path.exists():
        partial = path.with_suffix(".tmp")
        with open(partial, "wb") as file:
            np.savez(file, **make())
        partial.replace(path)
    with np.load(path) as stored:
        return dict(stored)


def plain_films(films: np.ndarray, rows: list[dict]) -> LabelledFilms:
    """Return the films as they were published, with no finding but for what a pneumonia may hide."""
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    effusion = torch.tensor(["effusion" in finding for finding in FINDING_LABELS])
    return LabelledFilms(
        films=torch.from_numpy(films),
        labels=labels,
        findings=torch.zeros(len(rows), len(FINDING_LABELS), dtype=torch.bool),
        known=~((labels != LABELS.index("normal"))[:, None] & effusion),
        patients=np.array([row["patient_id"] for row in rows]),
    )


def draw_films(args: argparse.Namespace, plain: LabelledFilms, name: str, variants: int) -> LabelledFilms:
    """Return each film `variants` times with one or two findings drawn in, or the same from the cache.

    Films keep their label: what is drawn is independent of it, and reading one must not depend on the other.
    """
    sources = [sha256_file(Path(module.__file__)) for module in (anatomy, drawing, marks)]
    key = derive_seed(*sources, args.seed, name, variants, len(plain))

    def make() -> dict[str, np.ndarray]:
        seeds = [[derive_seed(args.seed, name, i, j) for j in range(variants)] for i in range(len(plain))]
        with ProcessPoolExecutor() as pool:
            made = pool.map(draw_variants, plain.films.numpy(), seeds, chunksize=16)
            films, findings = zip(*tqdm(made, f"drawing, {name}", len(plain)), strict=True)
        return {"films": np.concatenate(films), "findings": np.concatenate(findings)}

    stored = cached(args.work_dir / f"drawn-{name}-{key:016x}.npz", make)
    repeated = plain.at(np.arange(len(plain)).repeat(variants))
    findings = torch.from_numpy(stored["findings"])
    return LabelledFilms(
        torch.from_numpy(stored["films"]), repeated.labels, findings, repeated.known | findings, repeated.patients
    )


def draw_variants(film: np.ndarray, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return one film with findings drawn in by each seed, uint8 [V, 128, 128], and which, bool [V, 9].

    Every other one has marks over it, so that these tell neither for nor against a finding. Nodules and masses lie
    anywhere in their zone.
    """
    lungs, films, findings = anatomy.find_lungs(film), [], np.zeros((len(seeds), len(FINDING_LABELS)), dtype=bool)
    for variant, seed in enumerate(seeds):
        rng, places, drawn = np.random.default_rng(seed), [], film
        while not places:
            places = drawing.virtual_findings(rng)
        for finding, side, zone in places:
            drawn, _ = drawing.draw(drawn, finding, side, zone, rng, lungs=lungs, off_centre=np.inf)
            findings[variant, FINDING_LABELS.index(finding_label(finding, side))] = True
        films.append(lay_marks(drawn, seed) if variant % 2 else drawn)
    return np.stack(films), findings


def mark_films(plain: LabelledFilms, seed: int) -> LabelledFilms:
    """Return each film with marks over it, by a seed of its own: bright metal that is no finding."""
    marked = [lay_marks(film, derive_seed(seed, i)) for i, film in enumerate(plain.films.numpy())]
    return replace(plain, films=torch.from_numpy(np.stack(marked)))


def lay_marks(film: np.ndarray, seed: int) -> np.ndarray:
    """Return a film with one to three marks over it."""
    rng, image = random.Random(seed), Image.fromarray(film)
    for kind in rng.choices(OVERLAYS, k=rng.choice((1, 2, 3))):
        image, _ = marks.DRAW[kind](image, rng)
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(args: argparse.Namespace, plain: LabelledFilms, marked: LabelledFilms, drawn: LabelledFilms) -> FilmEncoder:
    """Train on label, findings and agreement of two views of a film.

    Pooled features would learn three labels and nothing else. Two terms make them worth a distance: a linear probe
    that reads the findings from them, dropped afterwards, and Barlow Twins, which fills all of their dimensions with
    what tells one film from another.
    """
    torch.manual_seed(args.seed)
    encoder = FilmEncoder().to(memory_format=torch.channels_last)
    probe = nn.Linear(encoder.config["num_features"], len(FINDING_LABELS))
    parameters = [*encoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, args.steps, pct_start=min(0.3, WARMUP / args.steps), cycle_momentum=False
    )
    with tqdm(total=args.steps, desc="training", unit="step", mininterval=5) as bar:
        for step in range(args.steps):
            generator = torch.Generator().manual_seed(derive_seed(args.seed, "batch", step))
            batch = draw_batch(plain, marked, drawn, args.batch_size, generator)
            pixel_values = to_input(batch.films).repeat(2, 1, 1, 1)  # two views: [2 B, 1, 128, 128]
            pixel_values = augment(pixel_values, generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_native_bf16()):
                features, label_logits, finding_logits = (part.float() for part in encoder.read(pixel_values))
            findings, known = batch.findings.float().repeat(2, 1), batch.known.repeat(2, 1)
            losses = {
                "label": F.cross_entropy(label_logits, batch.labels.repeat(2), label_smoothing=0.05),
                "finding": masked_bce(finding_logits, findings, known),
                "probe": PROBE_WEIGHT * masked_bce(probe(features), findings, known),
                "views": barlow_twins(*features.chunk(2)),
            }
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 50 == 0 or step + 1 == args.steps:
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in losses.items()}, refresh=False)
    return encoder


def draw_batch(
    plain: LabelledFilms, marked: LabelledFilms, drawn: LabelledFilms, size: int, generator: torch.Generator
) -> LabelledFilms:
    num_marked, num_drawn = round(MARKED_SHARE * size), round(DRAWN_SHARE * size)
    first, second, third = (
        films.at(torch.randint(len(films), (count,), generator=generator))
        for films, count in ((plain, size - num_marked - num_drawn), (marked, num_marked), (drawn, num_drawn))
    )
    return first + second + third


def masked_bce(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Return the binary cross-entropy, a mean over films of the sum over known findings; all [B, 9]."""
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known).sum(dim=1).mean()


def barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    """Return the loss of Zbontar et al. 2021 (arXiv:2103.03230, Eq. 1) by feature, for two views [B, F] of B films."""
    first, second = (
        (view - view.mean(dim=0)) / (view.var(dim=0, unbiased=False) + 1e-5).sqrt() for view in (first, second)
    )
    correlation = first.T @ second / len(first)  # [F, F]
    diagonal = correlation.diagonal()
    redundant = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + REDUNDANCY * redundant) / len(diagonal)


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Return films in another position, sharpness and exposure, [B, 1, H, W] in [-1, 1]; never mirrored.

    Blur up to one pixel is what an autoencoder does to a film: readings must survive it.
    """
    count = len(pixel_values)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.07, 0.07), uniform(0.92, 1.08)  # radians
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, uniform(-0.1, 0.1)], dim=1), torch.stack([sin, cos, uniform(-0.1, 0.1)], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixel_values.shape), align_corners=False)
    moved = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    blurred = blur(moved, uniform(-1.0, 1.0).clamp(min=0.05))  # every other film stays sharp
    gamma, contrast, offset, noise = (
        uniform(*ends)[:, None, None, None] for ends in ((-0.35, 0.35), (0.8, 1.2), (-0.1, 0.1), (0, 0.02))
    )
    grey = (blurred / 2 + 0.5).clamp(0, 1) ** gamma.exp()
    grey = (grey - 0.5) * contrast + 0.5 + offset + noise * torch.randn(grey.shape, generator=generator)
    return grey.clamp(0, 1) * 2 - 1


def blur(pixel_values: Tensor, sigma: Tensor) -> Tensor:
    """Return films [B, 1, H, W] under Gaussians of standard deviations `sigma` [B] in pixels."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernels = (-0.5 * (offsets / sigma[:, None]).square()).softmax(dim=1)[:, None, None]  # [B, 1, 1, K]
    padded = F.pad(pixel_values.transpose(0, 1), (BLUR_RADIUS,) * 4, mode="reflect")  # [1, B, H, W]
    across = F.conv2d(padded, kernels, groups=len(sigma))
    return F.conv2d(across, kernels.transpose(2, 3), groups=len(sigma)).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What it is worth


def measure(encoder: FilmEncoder, plain: LabelledFilms, marked: LabelledFilms, drawn: LabelledFilms, seed: int) -> str:
    """Return Markdown tables of what the encoder reads in films of patients that it never saw."""
    read = extract(encoder, plain.films)
    normal = read.label_probabilities[:, LABELS.index("normal")]
    sick = (plain.labels != LABELS.index("normal")).numpy()
    bacterial, viral = (read.label_probabilities[:, i] for i in (1, 2))
    rows = [
        ("pneumonia or normal", area_of(-normal, sick, plain.patients, seed)),
        (
            "viral or bacterial",
            area_of((viral - bacterial)[sick], plain.labels[sick] == 2, plain.patients[sick], seed),
        ),
    ]
    lines = ["| held-out films | films | AUROC |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {area} |" for name, (count, area) in rows]

    both = plain + marked + drawn
    others = [extract(encoder, part.films).finding_probabilities for part in (marked, drawn)]
    probabilities = torch.cat([read.finding_probabilities, *others])
    lines += ["", "| drawn finding | with / without | AUROC | balanced accuracy at 0.5 |", "|---|---|---|---|"]
    for place, finding in enumerate(FINDING_LABELS):
        known = both.known[:, place].numpy()
        there, scores = both.findings[known, place].numpy(), probabilities[known, place]
        _, area = area_of(scores, there, both.patients[known], seed)
        hits = (scores > 0.5).numpy() == there
        accuracy = np.mean([hits[chosen].mean() if chosen.any() else np.nan for chosen in (there, ~there)])
        lines.append(f"| {finding} | {there.sum()} / {(~there).sum()} | {area} | {accuracy:.3f} |")

    lines += ["", "| side of a drawn finding | films | right |", "|---|---|---|"]
    for place, finding in enumerate(FINDING_LABELS):
        if not finding.startswith("right "):
            continue
        pair = [place, FINDING_LABELS.index(finding.replace("right", "left"))]
        chosen = (both.findings[:, pair].sum(dim=1) == 1).numpy()
        correct = (
            probabilities[chosen][:, pair].argmax(dim=1) == both.findings[chosen][:, pair].int().argmax(dim=1)
        ).float()
        low, high = bootstrap_interval(correct.tolist(), both.patients[chosen], seed)
        mean = correct.mean().item()
        lines.append(f"| {finding.removeprefix('right ')} | {len(correct)} | {mean:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join([*lines, "", *measure_distances(encoder, plain, drawn, read.features)])


def area_of(scores: Tensor, labels: np.ndarray | Tensor, patients: np.ndarray, seed: int) -> tuple[int, str]:
    area, (low, high) = auroc(scores, labels, patients, seed)
    return len(scores), f"{area:.3f} [{low:.3f}, {high:.3f}]"


def measure_distances(encoder: FilmEncoder, plain: LabelledFilms, drawn: LabelledFilms, features: Tensor) -> list[str]:
    """Return a table of Frechet distances from one half of the patients to the other half, changed in known ways."""
    order = sorted(set(plain.patients))
    first = np.isin(plain.patients, order[::2])
    reference, films = features[first], plain.films[~first]
    if min(len(reference), len(films)) <= features.shape[1]:
        return []
    softer = blur(to_input(films), torch.full((len(films),), 1.0))[:, 0]
    changes = {
        "as they are": films,
        "blurred, sigma 1 px": ((softer + 1) * 127.5).round().to(torch.uint8),
        "mirrored": films.flip(2),
        "with findings drawn in": drawn.films[::HELD_OUT_VARIANTS][~first],
    }
    lines = [f"| {len(films)} films of other patients, to {len(reference)} | Frechet distance |", "|---|---|"]
    for name, changed in changes.items():
        lines.append(f"| {name} | {frechet_distance(reference, extract(encoder, changed).features):.4g} |")
    return lines


CARD = """# cxr-features

An encoder of frontal chest films at {resolution} px: {parameters:,} parameters, {num_features} features for
Frechet and kernel distances and nearest neighbours, three labels and nine drawn findings with their sides.
`utils/features.py` loads it. **For the evaluation of synthetic films in this project. Not for diagnosis, nor for
any decision about a patient.**

Made by `python -m assets.train_cxr_features` with seed {seed}: {steps} steps of {batch_size} films in two views,
{minutes:.0f} minutes.

## Films

Children's films of Kermany et al. 2018 (Cell 172(5), CC BY 4.0), squashed to a square: {train} of {train_patients}
patients, the same with marks over them (pins, cables, zips, braids, side markers of `assets/marks.py`, which are no
findings and must not be taken for any), and {train_drawn} with findings drawn in by `assets/drawing.py`, every other
one with marks too. {held_out} films of {held_out_patients} other patients, which cxr-tiny did not see either, were held out; they,
the same with marks, and {held_out_drawn} with findings, by seeds not used in training, are what the findings are measured
on. The label is real; the findings are drawn.

## Measured on held-out patients

95 % intervals by bootstrap over patients.

{measured}

## Limits

- Drawn findings are an idea of findings. That the encoder reads them says nothing about real effusions,
  pneumothoraces or nodules.
- Children of one hospital. Films of adults are far from all it knows, and distances between adult sets are coarser
  for it.
- Trained to read slightly blurred films like sharp ones, it is a mild judge of sharpness; SSIM and PSNR of rebuilt
  films are not.
- Its distances are comparable with one another alone: a published FID is another quantity.
"""


def card(
    args: argparse.Namespace, parts: list[LabelledFilms], drawn: list[LabelledFilms], minutes: float, measured: str
) -> str:
    encoder = FilmEncoder()
    return CARD.format(
        resolution=RESOLUTION,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        num_features=encoder.config["num_features"],
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        minutes=minutes,
        train=len(parts[0]),
        train_patients=len(set(parts[0].patients)),
        train_drawn=len(drawn[0]),
        held_out=len(parts[1]),
        held_out_patients=len(set(parts[1].patients)),
        held_out_drawn=len(drawn[1]),
        measured=measured,
    )


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
