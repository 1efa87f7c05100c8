"""Measure an adapter on the fold that its training never touched, or all folds together.

    python evaluate.py --lora out/fold2              # -> out/fold2/evaluation/
    python evaluate.py --cross_validation out        # -> out/cross_validation/

Of one fold:

    report.html          open this first: all of it on one page, the pictures below included
    metrics.json         every figure with its interval, its floors and its ceiling
    films.jsonl          the same by film, for pooling and for statistics of your own
    readings.jsonl       by film what its caption asserts, and how strongly that is read in generated and real films
    captions.txt         captions of training that move the prediction further than in the base, and by how much
    features.safetensors the same films as points, for pooling
    films.png            real, rebuilt and generated films side by side. It shows patients: keep it to yourself
    nearest.png          the generated films that are most like a training film. It shows patients, too
    findings.png         for sets with drawn findings: prompted findings as drawn, by the base, by the adapter
    noise_levels.png     what the adapter gained over the base, by noise level

Of all folds: summary.json, summary.csv, folds.png and report.html. What an evaluation that was cut off had drawn and scored
waits beside these files, and the same command goes on from it.

Films, captions and readings are of patients where the set is; the page of all folds shows none.

How well does the model predict noise (MSE by timestep)? How well does it rebuild a real film from a known amount of
noise (SSIM, PSNR, MS-SSIM), between the mean training film and the autoencoder's own round trip? How near does a free
sample come to the one film whose caption it was given? That is asked for often and says little: two unrelated films are
nearly as near, and the blurred mean film is nearer. Are free samples, as a set, as near to held-out films as other real
films are, and do they vary as much? Are they nearer to films that training saw than to others? Do they show what their
captions say, as far as a classifier can read it in the real films, and does a classifier learn from them what it learns from
real ones? And for whom: the main figures by sex, age, view, and by whether training saw the caption.
"""

import argparse
import csv
import io
import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import utils.quiet  # noqa: F401

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from utils.alignment import (
    SIDE,
    Asked,
    LinearProbes,
    agreement,
    agreement_by_group,
    agreement_gain,
    assertions,
    compare_pairs,
    counterparts,
    views_of,
)
from utils.audit import audit, caption_pull, compare_pulls, count_copies, suspects
from utils.card import public_base, terms_of, write_card
from utils.cross_validation import (
    asked_of,
    columns_of,
    compare_runs,
    held_out_to_training,
    over_folds,
    read_folds,
    read_readings,
    same_readings,
    sets_over_folds,
    tstr_over_folds,
    unlike_figures,
    with_gains,
)
from utils.decoder import find_decoder, put_on_decoder, read_decoder, score_round_trip
from utils.encoders import SPACES, FilmSpace, measure_films
from utils.features import BUNDLED_ENCODER, extract, load_encoder
from utils.figures import (
    METRICS,
    REBUILT,
    summarise,
    summarise_decoder,
    summarise_groups,
)
from utils.files import require_writable, sha256_file, write_bytes, write_json, write_jsonl
from utils.findings import (
    calibrate,
    choose_prompts,
    follow_rates,
    has_readable_boxes,
    reader_rates,
    shown_labels,
    single_findings,
)
from utils.folds import draw_most_patients, draw_patients, draw_rows, patient_of
from utils.hardware import (
    allow_tf32,
    choose_mixed_precision,
    explain_out_of_memory,
    is_cuda_used,
    keep_freed_memory,
    use_all_cores,
)
from utils.latents import FilmDataset, cache_posteriors, hash_weights, is_cached, load_films, mean_film
from utils.linear import use_frozen_products
from utils.lora import find_adapter, read_adapter
from utils.metrics import bootstrap_interval, in_batches, num_scales
from utils.pages import in_short, report_fold, report_folds, write_fold_page, write_folds_page
from utils.pipeline import assemble, cast_frozen, load_base, put_on_adapter, sample, with_schedule
from utils.prompts import MAX_SEED
from utils.realism import compare_halves, compare_sets, distances_by_group, pair_similarity
from utils.refusal import ArgumentParser, Refused, run
from utils.report import contact_sheet, draw_folds, draw_noise_levels, save_png
from utils.runlog import films_of_run, package_versions, precision_name, read_config, read_split
from utils.seeding import derive_seed
from utils.subgroups import join_groups, subgroups, values_of
from utils.tokens import tokenize
from utils.unfinished import forget, keep
from utils.validation import (
    HEADLINE,
    STRENGTHS,
    FilmBank,
    decode,
    eval_mode,
    film_bank,
    noise_levels,
    rebuild,
    score_bounds,
    score_model,
)

SHOWN = 6  # films in films.png
SHOWN_SUSPECTS = 8  # generated films in nearest.png
VARIED_PROMPTS, SAMPLES_A_PROMPT = 16, 4  # whose films are compared with one another
LEAST_SHARED = 5  # captions, each of several patients, for real films to be compared with one another, too
ENCODED_AT_ONCE = 64  # films
MOST_CAPTIONS = 512  # of training, and others, whose pull is compared
MOST_PAIRS = 64  # of captions with and without findings


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usage = "python evaluate.py [FLAG ...]"
    parser = ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("what").add_argument
    add("--lora", type=Path, metavar="RUN", help="folder of a training run, such as out/fold2")
    add("--cross_validation", type=Path, metavar="OUT", help="folder of evaluated runs fold<k>: one table of them all")
    add(
        "--against",
        type=Path,
        metavar="OUT",
        help="with --cross_validation: another such folder; which does better on the same films?",
    )
    add(
        "--num_prompted",
        type=int,
        default=216,
        help="films of each model read for the finding they were prompted with; 0: none [216]",
    )
    add("--features", choices=list(SPACES), default=BUNDLED_ENCODER.name,
        help="space that sets of films are compared in; xrv and inception need requirements-eval.txt [cxr-features]")  # fmt: skip
    add("--no_vae_decoder", action="store_true", help="decode with the base's own decoder, not the run's adapted one")
    add("--max_films", type=int, default=512, help="measure at most so many held-out films, drawn by --seed [512]")
    add(
        "--max_training_films",
        type=int,
        default=10_000,
        help="compare with at most so many training films; if that is not all, the audit cannot pass [10000]",
    )
    add("--seed", type=int, default=0, help="seed of samples, pairs and resampling [0]")

    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", type=int, default=25, help="solver steps of the free samples [25]")
    add("--guidance_scale", type=float, default=4.0, help="their classifier-free guidance [4]")
    add("--batch_size", type=int, default=16, help="films at a time [16]")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="no is fp32 [fp16 on a GPU where the run had it, else accelerate's, else bf16 where native, else no]",
    )

    add = parser.add_argument_group("files").add_argument
    add("--train_data_dir", type=Path, help="the films [where the run found them]")
    add("--cache_dir", help="latents and hub downloads [where the run kept them]")
    add("--output_dir", type=Path, help="folder of the report [<run>/evaluation, or <out>/cross_validation]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if (args.lora is None) == (args.cross_validation is None):
        given = "nothing" if args.lora is None else "both --lora and --cross_validation"
        raise Refused(f"{given} given; expected either --lora out/fold2 or --cross_validation out")
    if args.against is not None and args.cross_validation is None:
        raise Refused("--against compares cross-validations; expected --cross_validation out --against other")
    if not 0 <= args.seed <= MAX_SEED or not math.isfinite(args.guidance_scale):
        raise Refused(
            f"--seed {args.seed} --guidance_scale {args.guidance_scale}; expected a seed from 0 to {MAX_SEED}, a finite scale"
        )
    for name in ("max_films", "max_training_films", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise Refused(f"--{name} {getattr(args, name)}; expected 1 or more")
    if args.num_prompted < 0:
        raise Refused(f"--num_prompted {args.num_prompted}; expected 0 or more")
    if args.lora is not None:
        with explain_out_of_memory("evaluating", "lower --batch_size"):
            evaluate_fold(args)
    else:
        output_dir = args.output_dir or args.cross_validation / "cross_validation"
        cross_validate(args.cross_validation, output_dir, args.seed, args.against)


def evaluate_fold(args: argparse.Namespace) -> None:
    """Measure one adapter on its held-out fold."""
    run_dir, output_dir = args.lora, args.output_dir or args.lora / "evaluation"
    config = read_config(run_dir)
    settings = config["settings"]
    adapter_file = find_adapter(run_dir)
    adapter, header = read_adapter(adapter_file)
    decoder_file = None if args.no_vae_decoder else find_decoder(run_dir)
    decoder, decoder_header = read_decoder(decoder_file) if decoder_file else ({}, {})
    data_dir = films_of_run(config, args.train_data_dir)
    require_writable(output_dir)

    # The fold that was held out, and the training films that floors are fitted on
    rows, training_rows, held_out_rows = read_split(config, run_dir, data_dir)
    if settings["max_train_samples"] is not None:
        training_rows = draw_rows(training_rows, settings["max_train_samples"], settings["seed"])
    num_patients = min(len(set(map(patient_of, part))) for part in (training_rows, held_out_rows))
    whole_fold, held_out_rows = held_out_rows, draw_most_patients(held_out_rows, args.max_films, args.seed)

    # The model as it was trained
    in_fp16 = settings["mixed_precision"] == "fp16" and is_cuda_used()  # a GPU without bf16, where fp32 takes hours
    precision = choose_mixed_precision(args.mixed_precision or ("fp16" if in_fp16 else None))
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.num_processes > 1:
        raise Refused("evaluate.py is for one process; start it with python evaluate.py, folds side by side")
    allow_tf32(accelerator.mixed_precision != "no")
    use_all_cores()
    device = accelerator.device
    space = SPACES[args.features](device)
    cache_dir = args.cache_dir or config.get("cache_dir")
    base = load_base(config["base"], settings["revision"], settings["variant"], cache_dir)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cpu" or config["resolution"] >= 512:
        base.vae.enable_slicing()  # film by film, which stays in a processor's cache, or takes a fraction of the memory
    base_hash = hash_weights(base.unet) + hash_weights(base.text_encoder) + hash_weights(base.vae)
    base = with_schedule(base, settings["prediction_type"], settings.get("rescale_betas_zero_snr", False))
    pipeline = assemble(base)
    put_on_adapter(pipeline, adapter)
    cast_frozen(base.unet, accelerator.mixed_precision)
    for model in (base.unet, base.text_encoder, base.vae):
        model.requires_grad_(False).eval()
    if device.type == "cpu":
        use_frozen_products(base.unet, base.text_encoder, base.vae)
    unet, text_encoder = (
        accelerator.prepare_model(model, evaluation_mode=True)
        for model in (base.unet.to(memory_format=torch.channels_last), base.text_encoder)
    )
    vae, noise_scheduler = base.vae.to(device, memory_format=torch.channels_last), base.noise_scheduler
    resolution, interpolation = config["resolution"], settings["image_interpolation_mode"]
    # The cache of all films, which training has filled; without it the held-out films alone
    caching = dict(vae=vae, cache_dir=Path(cache_dir or "cache"), resolution=resolution, interpolation=interpolation)
    reads_findings = args.num_prompted > 0 and all(map(has_readable_boxes, rows))
    if reads_findings and not single_findings(held_out_rows):
        print("no held-out film shows exactly one finding: whether prompts are followed is not asked")
        reads_findings = False
    cached_rows = rows if reads_findings or is_cached(data_dir, rows, **caching) else held_out_rows
    posteriors = cache_posteriors(data_dir, cached_rows, **caching, batch_size=args.batch_size, owner=str(output_dir))
    place = {row["file_name"]: i for i, row in enumerate(cached_rows)}
    captions = [row["text"] for row in held_out_rows]
    bank = film_bank(
        data_dir, held_out_rows, posteriors, [place[row["file_name"]] for row in held_out_rows],
        tokenize(base.tokenizer, captions), vae.config.scaling_factor, resolution, interpolation,
    )  # fmt: skip
    print(f"fold {config['fold']}: {len(bank)} held-out films of {len(set(bank.patients))} patients, "
          f"{precision_name(accelerator.mixed_precision)} on {device.type}")  # fmt: skip

    # What was drawn and scored before this evaluation was cut off is not drawn and scored again
    asked = {name: vars(args)[name] for name in ("seed", "num_inference_steps", "guidance_scale", "batch_size")}
    files = [sha256_file(file) for file in (adapter_file, decoder_file) if file]
    computed_by = [device.type, accelerator.mixed_precision, package_versions()]
    once = partial(keep, output_dir, [base_hash, config["data_hash"], settings, files, asked, computed_by])

    # Every score by film: the base as it was, the adapter, with the run's decoder if it has one, and what bounds them
    scored = dict(vae=vae, noise_scheduler=noise_scheduler, batch_size=args.batch_size, metrics=REBUILT)
    draw = partial(draw_films, args, pipeline, resolution, once)
    held_out = [row["file_name"] for row in held_out_rows]

    def score(name: str) -> dict[str, Tensor]:
        return once(name, held_out, lambda: score_model(bank, unet, text_encoder, **scored))

    with eval_mode(unet, text_encoder):
        pipeline.disable_lora()
        scores = {f"base/{k}": v for k, v in score("base").items()}
        of_base = draw(captions, "generating, base")
        pipeline.enable_lora()
        if decoder:
            films_before = score("own decoder")
            scores |= {f"own_decoder/{k}": v for k, v in films_before.items() if not k.startswith("mse")}
            round_trip = score_round_trip(bank, vae, args.batch_size, metrics=REBUILT)
            scores |= {f"own_decoder/{k}/ceiling": v for k, v in round_trip.items()}
            put_on_decoder(vae, decoder)
            print(f"decoder {decoder_file}, fitted to radiographs; --no_vae_decoder takes the base's own")
        scores |= {f"adapter/{k}": v for k, v in score("adapter").items()}
        mean = mean_film(data_dir, training_rows, resolution, settings["seed"], interpolation)
        scores |= {f"bound/{k}": v for k, v in score_bounds(bank, mean_film=mean, **scored).items()}
        shown = [bank.patients.index(patient) for patient in dict.fromkeys(bank.patients)][:SHOWN]
        rebuilt = rebuilt_films(bank, unet, text_encoder, vae, noise_scheduler, shown)

        # Free samples of the held-out captions, with findings left out, of training captions, of some several times
        generated = draw(captions, "generating")
        num_audited = min(len(set(map(patient_of, part))) for part in (training_rows, held_out_rows))
        known, unknown = (draw_patients(part, num_audited, args.seed) for part in (training_rows, held_out_rows))
        of_known = draw([row["text"] for row in known], "generating, captions of training films")
        repeated, alike = shared_captions(captions, bank.patients, [row["text"] for row in unknown])
        seeds = list(range(args.seed, args.seed + SAMPLES_A_PROMPT))
        varied = draw(
            [caption for caption in repeated for _ in seeds], "generating, one caption several times", seeds * len(repeated)
        )  # fmt: skip
        pairs = counterparts(held_out_rows, MOST_PAIRS, args.seed)
        without_findings = draw(
            [captions[j] for _, j in pairs], "generating, findings left out", [args.seed + i for i, _ in pairs]
        )
        pull = partial(
            caption_pull, unet, text_encoder, empty_ids=tokenize(base.tokenizer, [""]), latent_shape=bank.latents.shape[1:],
            timestep=noise_scheduler.config.num_train_timesteps - 1, batch_size=args.batch_size, device=device,
        )  # fmt: skip
        # Those of a single film are in training or not by chance alone; a common caption is in it for what it says
        times = Counter(row["text"] for row in rows)
        single, of_others = (
            [
                row["text"]
                for row in draw_most_patients(
                    [row for row in part if times[row["text"]] == 1], MOST_CAPTIONS, args.seed
                )
            ]
            for part in (training_rows, whole_fold)
        )
        common = [row["text"] for row in draw_most_patients(training_rows, MOST_CAPTIONS, args.seed)]
        of_training = list(dict.fromkeys(single + common))
        pulls = [
            pull(input_ids=tokenize(base.tokenizer, part)) if part else torch.empty(0)
            for part in (of_training, of_others)
        ]
        pipeline.disable_lora()
        further = pulls[0] - pull(input_ids=tokenize(base.tokenizer, of_training))
        pipeline.enable_lora()

        # Are prompts followed? Only a table that says what is where can tell
        if reads_findings:
            all_films = load_films(FilmDataset(data_dir, rows, resolution, interpolation))
            means = posteriors.read(range(len(rows)))[0].to(device).split(args.batch_size)
            round_trip = torch.cat([decode(vae, mean * vae.config.scaling_factor) for mean in means])
            fitted = {row["file_name"] for row in training_rows}
            followed, findings_sheet = follow_prompts(
                args, pipeline, once, rows, fitted, config["fold"], all_films, round_trip
            )

    measured_rows = draw_rows(training_rows, args.max_training_films, args.seed)
    measured_names = {row["file_name"] for row in measured_rows}
    measured_rows = measured_rows + [row for row in known if row["file_name"] not in measured_names]
    drawn = Drawn(
        held_out_rows=held_out_rows, training_rows=measured_rows, known=known, unknown=unknown,
        training_captions={row["text"] for row in training_rows}, bank=bank,
        training_films=FilmDataset(data_dir, measured_rows, resolution, interpolation), mean=mean, generated=generated,
        of_base=of_base, of_known=of_known, varied=varied, alike=alike, without_findings=without_findings, pairs=pairs,
        num_patients=num_patients, num_unmeasured=len(training_rows) - len(measured_rows),
    )  # fmt: skip
    scores |= score_free_samples(drawn, args.seed)
    levels = noise_levels(noise_scheduler)

    # Figures, each with a bootstrap interval by patient
    metrics = {
        "fold": config["fold"],
        "base": public_base(config["base"]),
        "adapter": {"sha256": sha256_file(adapter_file), "step": header.get("step")},
        "films": len(bank),
        "training_films": len(training_rows),
        "patients": len(set(bank.patients)),
        "seed": args.seed,
        "data_hash": config["data_hash"],
        "sampling": {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "max_films": args.max_films,
        },
        "mixed_precision": accelerator.mixed_precision,
        "predicts": noise_scheduler.config.prediction_type,
        "features": space.name,
        "features_note": space.note,
        "num_folds": config["num_folds"],
        "resolution": resolution,
        "settings": {k: v for k, v in settings.items() if k != "fold" and not k.endswith("_data_hash")},
        "versions": package_versions(),
        "terms": terms_of(config["base"], data_dir),
    } | summarise(scores, bank.patients, levels, args.seed)
    if decoder:
        file = {"sha256": sha256_file(decoder_file), "step": decoder_header.get("step")}
        metrics["vae_decoder"] = file | summarise_decoder(scores, bank.patients, args.seed)
    if reads_findings:
        metrics["prompt_followed"] = followed
    of_sets, features, readings, nearest = summarise_sets(drawn, space, resolution, args.seed)
    metrics |= of_sets
    metrics["memorisation"]["captions"] = compare_pulls(pulls[0][: len(single)], pulls[1], args.seed)
    metrics["memorisation"]["sampling"] = metrics["sampling"]
    suspected = further.argsort(descending=True, stable=True)[:SHOWN_SUSPECTS].tolist()
    lines = "".join(f"{further[i]:.3f}\t{of_training[i]}\n" for i in suspected)
    write_bytes(output_dir / "captions.txt", lines.encode())
    groups = subgroups([row["groups"] for row in readings])
    of_films = summarise_groups(scores, groups, bank.patients, levels, args.seed)
    metrics["by_group"] = join_groups(of_films, metrics["by_group"])

    # Files, for statistics and for people; those of an earlier evaluation are no longer whole
    (output_dir / "metrics.json").unlink(missing_ok=True)
    write_bytes(output_dir / "features.safetensors", save(features))
    write_jsonl(output_dir / "readings.jsonl", readings)
    write_jsonl(
        output_dir / "films.jsonl",
        (
            {"file_name": row["file_name"], "patient_id": patient}
            | {name: values[i].item() for name, values in scores.items()}
            for i, (row, patient) in enumerate(zip(held_out_rows, bank.patients, strict=True))
        ),
    )
    draw_pictures(output_dir, drawn, shown, rebuilt, nearest)
    if reads_findings:
        save_png(output_dir / "findings.png", findings_sheet)
    draw_noise_levels(output_dir / "noise_levels.png", metrics)
    tables, said = report_fold(metrics)
    gain = metrics["rebuilt"][str(HEADLINE)]["ssim"]["gain"]
    short = in_short(gain, metrics["distribution"], metrics["alignment"], [metrics["memorisation"]["verdict"]])
    write_fold_page(output_dir, metrics, short, tables, said, run_dir / "curves.png")
    write_json(output_dir / "metrics.json", metrics)  # last: where it lies, the evaluation is whole
    forget(output_dir)
    if args.output_dir is None and (run_dir / "README.md").is_file():
        write_card(run_dir, data_dir)  # with what the audit found
    for table, _ in tables.values():
        print_table(*table)
        print()
    print("\n".join([*said, "", *short]))
    print(f"look at {output_dir / 'report.html'}")


@dataclass(frozen=True)
class Drawn:
    """The films of an evaluation, real and generated, uint8 [N, H, W] where they are tensors.

    Attributes:
        held_out_rows, training_rows: of the table: those measured, N, and of training as many as features are taken of.
        known, unknown: rows of one film each of as many patients of training and held out, M.
        training_captions: all that the model learnt from.
        bank: the held-out films.
        training_films: those of `training_rows`, with every film of `known` among them.
        mean: the mean training film, uint8 [H, W].
        generated, of_base: from the held-out captions, by the adapter and by the base, [N].
        of_known: from the captions of `known`, [M].
        varied: from some captions, SAMPLES_A_PROMPT each in a row.
        alike: places of held-out films of each of those captions, of different patients; none where too few are shared.
        without_findings: from the second caption and the first film's noise of each of `pairs`.
        pairs: places of held-out films, one with findings, its counterpart without.
        num_patients: of training or held out, whichever are fewer, also those that are not measured.
        num_unmeasured: training films beside `training_rows`.
    """

    held_out_rows: list[dict]
    training_rows: list[dict]
    known: list[dict]
    unknown: list[dict]
    training_captions: set[str]
    bank: FilmBank
    training_films: FilmDataset
    mean: Tensor
    generated: Tensor
    of_base: Tensor
    of_known: Tensor
    varied: Tensor
    alike: list[list[int]]
    without_findings: Tensor
    pairs: list[tuple[int, int]]
    num_patients: int
    num_unmeasured: int

    def random_pairs(self, seed: int) -> Tensor | None:
        """Return for each held-out film one of another patient, None where there is only one patient."""
        patients = self.bank.patients
        return self.bank.films[other_patients(patients, seed)] if len(set(patients)) > 1 else None


def score_free_samples(drawn: Drawn, seed: int) -> dict[str, Tensor]:
    """Return the similarity of each held-out film with the sample of its caption, another film, and the mean film."""
    bank = drawn.bank
    candidates_of = {"generated": drawn.generated, "mean_film": drawn.mean.expand_as(bank.films)}
    if (others := drawn.random_pairs(seed)) is not None:
        candidates_of["random_pair"] = others
    return {
        f"free/{kind}/{name}": in_batches(metric, candidates, bank.films).double()
        for kind, candidates in candidates_of.items()
        for name, metric in METRICS.items()
    }


def summarise_sets(
    drawn: Drawn, space: FilmSpace, resolution: int, seed: int
) -> tuple[dict, dict[str, Tensor], list[dict], list[tuple[int, int, float]]]:
    """Measure films as points in a feature space, and compare sets of them.

    Returns:
        `distribution`, `variety`, `memorisation`, `alignment`, `counterfactual`, `tstr` and, of sets, `by_group` of
        `metrics.json`; the features of held-out films and of those generated from their captions; rows of
        `readings.jsonl`; and the suspects of `audit.suspects`.
    """
    bank, measure = drawn.bank, partial(measure_films, space)
    films_of = {
        "held_out": bank.films, "generated": drawn.generated, "base": drawn.of_base, "known": drawn.of_known,
        "counterpart": drawn.without_findings, "mean_film": drawn.mean.expand_as(bank.films),
    }  # fmt: skip
    batches = {name: films.split(ENCODED_AT_ONCE) for name, films in films_of.items()}
    batches["training"] = DataLoader(drawn.training_films, ENCODED_AT_ONCE)
    counts = {name: len(films) for name, films in films_of.items()} | {"training": len(drawn.training_films)}
    spaces = {name: measure(of, counts[name]) for name, of in batches.items() if counts[name]}
    features = {name: measured["features"] for name, measured in spaces.items()}
    training_patients = [patient_of(row) for row in drawn.training_rows]
    sets = {name: features[name] for name in ("generated", "base", "mean_film")}
    compared = compare_sets(features["held_out"], bank.patients, sets, features["training"], training_patients, seed)
    copies = count_copies(*(spaces[name]["pixels"] for name in ("generated", "held_out", "training")))
    metrics: dict = {"distribution": {"encoder": space.name, "copies": copies} | (compared or {})}

    captions, others = [row["text"] for row in drawn.held_out_rows], drawn.random_pairs(seed)
    alike = pairs_of(bank.films, drawn.alike) if drawn.alike else None
    starts = range(0, len(drawn.varied), SAMPLES_A_PROMPT)
    of_caption = [range(start, start + SAMPLES_A_PROMPT) for start in starts]
    metrics["variety"] = {
        "scales": num_scales(resolution),
        "one_caption": pair_similarity(*pairs_of(drawn.varied, of_caption), seed),
        "real_films": None if others is None else pair_similarity(others, bank.films, bank.patients, seed),
        "real_films_of_one_caption": alike and pair_similarity(*alike, seed),
    }

    # A film from the caption of one film each of as many patients of training and held out, beside those films
    of_unknown, of_trained = (
        [place_of[row["file_name"]] for row in rows]
        for rows, place_of in (
            (drawn.unknown, {row["file_name"]: i for i, row in enumerate(drawn.held_out_rows)}),
            (drawn.known, {row["file_name"]: i for i, row in enumerate(drawn.training_rows)}),
        )
    )
    asked = {name: torch.cat([spaces["generated"][name][of_unknown], of]) for name, of in spaces["known"].items()}
    audited = ("features", "pixels")
    metrics["memorisation"] = audit(
        {name: asked[name] for name in audited}, {name: spaces["training"][name][of_trained] for name in audited},
        {name: spaces["held_out"][name][of_unknown] for name in audited}, spaces["training"], spaces["held_out"],
        bank.patients, drawn.num_patients, seed, drawn.num_unmeasured,
    )  # fmt: skip
    nearest = suspects(asked["pixels"], spaces["training"]["pixels"], spaces["held_out"]["pixels"], SHOWN_SUSPECTS)

    # What captions assert, read in films by linear probes that were fitted on the training patients' films
    readable = {name: measured["readable"] for name, measured in spaces.items()}
    asserted, mirrored = assertions(drawn.held_out_rows), {}
    if any(SIDE in told for told in asserted):
        flipped = {name: (films.flip(-1) for films in of) for name, of in batches.items() if counts[name]}
        mirrored = {name: measure(of, counts[name])["readable"] for name, of in flipped.items()}
    for part in (readable, mirrored) if mirrored else (readable,):
        part["known_real"] = part["training"][of_trained]
    probes = LinearProbes(drawn.training_rows, drawn.held_out_rows, readable, mirrored, seed)
    read = {name: probes.read(name) for name in ("generated", "base", "held_out", "counterpart") if name in readable}
    is_new = [caption not in drawn.training_captions for caption in captions]
    scores = {"generated": read["generated"], "base": read["base"], "real": read["held_out"]}
    views = views_of(drawn.held_out_rows, asserted)
    asked_of_films = Asked(asserted, bank.patients, views=views, seed=seed)
    metrics["alignment"] = agreement(asked_of_films, scores, is_new)
    metrics["counterfactual"] = (
        compare_pairs(
            drawn.held_out_rows, drawn.pairs,
            {"generated": {label: of[[i for i, _ in drawn.pairs]] for label, of in read["generated"].items()},
             "counterpart": read["counterpart"], "real": read["held_out"]},
        ) if drawn.pairs else {}
    )  # fmt: skip
    metrics["tstr"] = probes.tstr(drawn.known, drawn.held_out_rows)
    values = values_of(drawn.held_out_rows, views, drawn.training_captions)
    training_views = views_of(drawn.training_rows, assertions(drawn.training_rows))
    of_training = subgroups(values_of(drawn.training_rows, training_views, drawn.training_captions))
    groups = subgroups(values)
    of_reading = agreement_by_group(asked_of_films, {kind: scores[kind] for kind in ("generated", "real")}, groups)
    near = distances_by_group(features, groups, bank.patients, features["training"], of_training)
    metrics["by_group"] = {
        name: {value: {"auroc": of_reading[name][value], "kernel": near[name][value]} for value in of}
        for name, of in groups.items()
    }
    readings = [
        {"file_name": row["file_name"], "patient_id": patient, "view": view, "new_caption": new}
        | {"groups": of_film, "asserted": told}
        | {kind: {label: float(of[i]) for label, of in by_label.items()} for kind, by_label in scores.items()}
        for i, (row, patient, view, new, of_film, told) in enumerate(
            zip(drawn.held_out_rows, bank.patients, views, is_new, values, asserted, strict=True)
        )
    ]
    return metrics, {name: features[name] for name in ("held_out", "generated", "base")}, readings, nearest


def draw_pictures(
    output_dir: Path,
    drawn: Drawn,
    shown: Sequence[int],
    rebuilt: dict[float, Tensor],
    nearest: Sequence[tuple[int, int, float]],
) -> None:
    """Draw films.png and nearest.png.

    Args:
        shown: places of held-out films, of different patients.
        rebuilt: those films rebuilt, by strength.
        nearest: as `audit.suspects` returns it.
    """
    bank, captions = drawn.bank, [drawn.held_out_rows[i]["text"] for i in shown]
    rows = [
        [film.numpy() for film in (bank.films[i], *(of[row] for of in rebuilt.values()), drawn.generated[i])]
        for row, i in enumerate(shown)
    ]
    heads = ["of the set", *(f"rebuilt {strength}" for strength in STRENGTHS), "generated"]
    note = "The first column shows films of the set, the rebuilt ones resemble them: if they are of patients, not to be shared."
    save_png(output_dir / "films.png", contact_sheet(rows, captions, heads, note))
    place_of = {row["file_name"]: i for i, row in enumerate(drawn.held_out_rows)}
    asked = torch.cat([drawn.generated[[place_of[row["file_name"]] for row in drawn.unknown]], drawn.of_known])
    captions = [row["text"] for row in (*drawn.unknown, *drawn.known)]
    sheet = contact_sheet(
        [[asked[i].numpy(), drawn.training_films[j].numpy()] for i, j, _ in nearest],
        [f"{ratio:.2f} of the distance to the nearest held-out film: {captions[i]}" for i, _, ratio in nearest],
        ["generated", "of training"],
        f"The generated films that are nearest to one of {len(drawn.training_films)} training films for how far they are from "
        f"{len(bank)} held-out ones, in pixels. Not to be shared: the second column shows films of the set.",
    )
    save_png(output_dir / "nearest.png", sheet)


def follow_prompts(
    args: argparse.Namespace,
    pipeline: StableDiffusionPipeline,
    once: Callable,
    rows: Sequence[dict],
    fitted: set[str],
    held_out_fold: int,
    films: Tensor,
    round_trip: Tensor,
) -> tuple[dict, Image.Image]:
    """Generate films from captions of held-out films of one finding, with the base and with the adapter, and read them.

    Args:
        args: the command line.
        pipeline: with the adapter on.
        once: `unfinished.keep` of this evaluation.
        rows: the whole table, with boxes.
        fitted: file names of the training films, on which the reader is calibrated.
        held_out_fold: whose captions are prompts.
        films, round_trip: of all rows, as they are and after the autoencoder, uint8 [N, H, W].

    Returns:
        The part of `metrics.json`, and a picture: a row a finding and side, as drawn, by the base, by the adapter.
    """
    encoder = load_encoder().to(pipeline.device)
    folds = [row["fold"] for row in rows]
    rates = {
        "reader": reader_rates(extract(encoder, films), rows, folds),
        "reader_after_round_trip": reader_rates(extract(encoder, round_trip), rows, folds),
    }
    training = [i for i, row in enumerate(rows) if row["file_name"] in fitted]
    read = extract(encoder, round_trip[training])  # generated films leave the autoencoder, too
    thresholds = calibrate(read, [shown_labels(rows[i]) for i in training])
    candidates = [prompt for prompt in single_findings(rows) if folds[prompt.row] == held_out_fold]
    prompts = choose_prompts(candidates, args.num_prompted)
    seeds = [args.seed + i for i in range(len(prompts))]
    generated = {}
    for model in ("base", "adapter"):
        pipeline.disable_lora() if model == "base" else pipeline.enable_lora()
        generated[model] = draw_films(
            args, pipeline, films.shape[1], once, [prompt.caption for prompt in prompts], f"prompted, {model}", seeds
        )  # fmt: skip
        rates[model] = follow_rates(extract(encoder, generated[model]), prompts, thresholds)

    labels = [prompt.label for prompt in prompts]
    each = min(3, *(labels.count(label) for label in set(labels)))  # films of each model in a row
    sheet = []
    for label in sorted(set(labels)):
        first = [i for i, other in enumerate(labels) if other == label][:each]
        columns = [films[prompts[first[0]].row], *generated["base"][first], *generated["adapter"][first]]
        sheet.append([film.numpy() for film in columns])
    heads = ["of the set", *(model if i == 0 else "" for model in ("base", "adapter") for i in range(each))]
    note = f"Prompts name the row's finding, seeds {args.seed} on; base and adapter start from the same noise. Not for diagnosis."
    return {"thresholds": thresholds, **rates}, contact_sheet(sheet, sorted(set(labels)), heads, note)


def draw_films(
    args: argparse.Namespace,
    pipeline: StableDiffusionPipeline,
    resolution: int,
    once: Callable,
    captions: Sequence[str],
    doing: str,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Generate a film a caption, of seeds from --seed on where none are given, uint8 [len(captions), H, W].

    `once` is `unfinished.keep` of this evaluation.
    """
    seeds = seeds or [args.seed + i for i in range(len(captions))]
    if not captions:
        return torch.empty(0, resolution, resolution, dtype=torch.uint8)

    def make() -> dict[str, Tensor]:
        films = sample(
            pipeline, captions, seeds, resolution, args.num_inference_steps, args.guidance_scale, args.batch_size
        )
        return {"films": torch.stack(list(tqdm(films, doing, len(captions), unit="film")))}

    return once(doing, [list(captions), list(seeds)], make)["films"]


def pairs_of(films: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[str]]:
    """Return all pairs of films within groups of places: one film, the other, and the group of each pair."""
    pairs = [(i, j, str(n)) for n, places in enumerate(groups) for i, j in itertools.combinations(places, 2)]
    one, other, named = zip(*pairs, strict=True)
    return films[list(one)], films[list(other)], list(named)


def shared_captions(
    captions: Sequence[str], patients: Sequence[str], order: Sequence[str]
) -> tuple[list[str], list[list[int]]]:
    """Return captions to draw several films from, and places of real films of each, of different patients, to be as varied.

    Captions that most patients share come first, SAMPLES_A_PROMPT of whose films are taken. Where fewer than LEAST_SHARED
    are shared at all, any captions, and no places: real films of others would say nothing about these.

    Args:
        captions, patients: of the held-out films.
        order: the captions in the order in which equally common ones are taken.
    """
    films: dict[str, dict[str, int]] = {caption: {} for caption in order}
    for place, (caption, patient) in enumerate(zip(captions, patients, strict=True)):
        if caption in films:
            films[caption].setdefault(patient, place)
    shared = sorted((caption for caption in films if len(films[caption]) > 1), key=lambda text: -len(films[text]))
    if len(shared) < LEAST_SHARED:
        return list(films)[:VARIED_PROMPTS], []
    chosen = shared[:VARIED_PROMPTS]
    return chosen, [list(films[caption].values())[:SAMPLES_A_PROMPT] for caption in chosen]


def rebuilt_films(
    bank: FilmBank, unet, text_encoder, vae, noise_scheduler, indices: Sequence[int]
) -> dict[float, Tensor]:
    """Return some films rebuilt, by strength, uint8 [len(indices), H, W]."""
    chunk = list(indices)
    latents, noise = bank.latents[chunk].to(vae.device), bank.noise(chunk).to(vae.device)
    encoder_hidden_states = text_encoder(bank.input_ids[chunk].to(vae.device))[0]
    return {
        strength: decode(vae, rebuild(unet, noise_scheduler, latents, noise, encoder_hidden_states, strength))
        for strength in STRENGTHS
    }


def other_patients(patients: Sequence[str], seed: int) -> list[int]:
    """Return for each film another one, drawn by seed, of another patient; itself where there is only one patient."""
    generator = np.random.default_rng(derive_seed(seed, "random pair"))
    chosen = []
    for i, patient in enumerate(patients):
        candidates = [j for j, other in enumerate(patients) if other != patient]
        chosen.append(int(generator.choice(candidates)) if candidates else i)
    return chosen


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def cross_validate(out: Path, output_dir: Path, seed: int, against: Path | None) -> None:
    """Put the evaluations of all folds into one table: mean and spread over folds, and pooled over films."""
    folds, films_by_fold, folders = read_folds(out)
    require_writable(output_dir)
    numbers = [fold["fold"] for fold in folds]
    films = [row for rows in films_by_fold for row in rows]
    patients = [row["patient_id"] for row in films]

    # Every figure by film, averaged within folds, then over folds; and over all films at once
    sizes, summary = [len(rows) for rows in films_by_fold], {}
    starts, num_folds = [sum(sizes[:i]) for i in range(len(sizes))], folds[0]["num_folds"]
    ratio = held_out_to_training(folds)
    columns = with_gains(films)
    for name, values in sorted(columns.items()):
        means = [statistics.fmean(values[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
        low, high = bootstrap_interval(values, patients, seed)
        pooled = {"pooled": statistics.fmean(values), "pooled_interval": [low, high]}
        summary[name] = over_folds(means, ratio) | pooled
    record = {
        "folds": numbers, "num_folds": num_folds, "films": len(films), "patients": len(set(patients)),
        "films_by_fold": sizes, "seed": seed, "base": folds[0]["base"], "data_hash": folds[0]["data_hash"],
        "figures": summary,
    }  # fmt: skip

    # What films show, and for whom, over all films at once; what they are as sets, of all folds and by fold
    readings = read_readings(folders)
    scores = {kind: columns_of(readings, kind) for kind in ("generated", "base", "real")}
    asked = asked_of(readings, seed)
    record["alignment"] = agreement(asked, scores, [row["new_caption"] for row in readings])
    record["tstr"] = tstr_over_folds(folds)
    read_of = {kind: scores[kind] for kind in ("generated", "real")}
    by_reading = agreement_by_group(asked, read_of, subgroups([row["groups"] for row in readings]))
    groups_of = {row["file_name"]: row["groups"] for row in readings}
    groups = subgroups([groups_of[row["file_name"]] for row in films])
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    levels = [int(level) for level in folds[0]["noise_prediction_mse"]]
    by_film = summarise_groups(tensors, groups, patients, levels, seed)
    auroc = {name: {value: {"auroc": area} for value, area in of.items()} for name, of in by_reading.items()}
    record["by_group"] = join_groups(by_film, auroc)
    features = [load_file(folder / "features.safetensors") for folder in folders]
    real, generated, base = (
        torch.cat([fold[name] for fold in features]) for name in ("held_out", "generated", "base")
    )
    record["distribution"] = {"encoder": folds[0]["distribution"]["encoder"]} | (
        compare_halves(real, {"generated": generated, "base": base}, patients, seed) or {}
    )
    record["sets"] = sets_over_folds(folds)
    record["verdicts"] = [fold["memorisation"]["verdict"] for fold in folds]

    # Another cross-validation, film by film
    if against is not None:
        other_folds, others, other_folders = read_folds(against)
        for name in ("data_hash", "resolution", "num_folds", "features", "sampling", "seed", "mixed_precision"):
            if folds[0].get(name) != other_folds[0].get(name):
                raise Refused(
                    f"{out} and {against} differ in {name}; only runs evaluated alike, on the same films, compare"
                )
        unlike, reason = unlike_figures(folds[0], other_folds[0])
        record["against"] = compare_runs(films, [row for rows in others for row in rows], unlike, seed)
        record["against"]["alignment"] = {}
        record["against"]["left_out"] = [f"{', '.join(unlike)}: {reason}"] if unlike else []
        other_of = {row["file_name"]: row for row in read_readings(other_folders)}
        other_readings = [other_of[row["file_name"]] for row in readings]
        if same_readings(scores["real"], columns_of(other_readings, "real")):
            others = columns_of(other_readings, "generated")
            record["against"]["alignment"] = agreement_gain(asked, scores["generated"], others)
        else:
            record["against"]["left_out"].append("AUROC of captions: the probes differ, by training films or seed")
        record["against"]["folder"] = against.resolve().name  # a path may hold a name

    # Files, for statistics and for people
    write_json(output_dir / "summary.json", record)
    table = io.StringIO()
    writer = csv.writer(table)
    by_fold = (f"fold{number}" for number in numbers)
    writer.writerow(["figure", "mean", "sd", "low", "high", *by_fold, "pooled", "pooled_low", "pooled_high"])
    for name, row in (summary | record["sets"]).items():
        pooled = [row["pooled"], *row["pooled_interval"]] if "pooled" in row else [""] * 3
        writer.writerow([name, row["mean"], row["sd"], *row["interval"], *row["by_fold"], *pooled])
    write_bytes(output_dir / "summary.csv", table.getvalue().encode())
    draw_folds(output_dir / "folds.png", record, HEADLINE)
    title = (
        f"Cross-validation, {len(folds)} of {num_folds} folds: {len(films)} films of {len(set(patients))} "
        "patients, each scored by a model that never saw the patient"
    )
    tables = report_folds(record, folds[0]["features_note"], HEADLINE)
    gain = record["figures"][f"gain/ssim/{HEADLINE}"]
    gain = {"mean": gain["pooled"], "interval": gain["pooled_interval"]}
    short = in_short(gain, record["distribution"], record["alignment"], record["verdicts"])
    write_folds_page(output_dir, title, record, short, tables, folds)
    print(title)
    for table, _ in tables.values():
        print_table(*table)
        print()
    for reason in record["against"]["left_out"] if against is not None else ():
        print(f"not compared: {reason}")
    print("\n".join(short))
    print(f"look at {output_dir / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
