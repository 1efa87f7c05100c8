"""What fitting the autoencoder's decoder to films is worth: the round trip of held-out films before and after.

    python -m tests.benchmarks.decoder --data FOLDER

FOLDER is a set that download.py wrote. Learning rates, and L1 with and without SSIM, are compared on the validation films;
what is best there is measured once, on the fold held out. The bar: the 95 % interval, by patient, of the held-out gain in
SSIM lies above 0. Typed again with the same --work, finished settings are not trained again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import utils.quiet  # noqa: F401

import torch

from utils.decoder import adapt_decoder, decoder_state, put_on_decoder, score_round_trip
from utils.folds import split_fold, with_folds
from utils.hardware import use_all_cores
from utils.latents import FilmDataset, cache_posteriors
from utils.metadata import read_metadata
from utils.metrics import bootstrap_interval
from utils.pipeline import BUNDLED_BASE, load_base
from utils.refusal import ArgumentParser, run
from utils.validation import film_bank

SETTINGS = ((3e-4, 1.0), (1e-3, 1.0), (3e-4, 0.0))  # learning rate, weight of SSIM in the loss


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that download.py wrote")
    parser.add_argument("--base", default=BUNDLED_BASE, help="folder or hub id")
    parser.add_argument("--fold", type=int, default=0, help="held out")
    parser.add_argument("--steps", type=int, default=400, help="of each setting")
    parser.add_argument("--batch_size", type=int, default=8, help="films a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of latents and decoders [a temporary one]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    use_all_cores()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, args.work or Path(temporary))


def compare(args: argparse.Namespace, work: Path) -> int:
    rows = with_folds(read_metadata(args.data), group_by="patient_id")
    training_rows, validation_rows, held_out_rows = split_fold(rows, args.fold, args.seed)
    base = load_base(args.base)
    vae, resolution = base.vae.to(memory_format=torch.channels_last).eval(), base.resolution
    posteriors = cache_posteriors(args.data, rows, vae, work, resolution)
    place = {row["file_name"]: i for i, row in enumerate(rows)}

    def bank(chosen: list[dict]):
        places = [place[row["file_name"]] for row in chosen]
        no_captions = torch.zeros(len(chosen), 1, dtype=torch.long)
        return film_bank(args.data, chosen, posteriors, places, no_captions, vae.config.scaling_factor, resolution)

    # Which setting, by the validation films alone
    validation, own = bank(validation_rows), decoder_state(vae)
    print(
        f"{len(training_rows)} films to fit, {len(validation_rows)} to validate, {args.steps} steps of {args.batch_size}"
    )
    results = {}
    for learning_rate, ssim_weight in SETTINGS:
        put_on_decoder(vae, own)
        header = adapt_decoder(
            work / f"lr{learning_rate:g}-ssim{ssim_weight:g}", vae,
            FilmDataset(args.data, training_rows, resolution), posteriors,
            [place[row["file_name"]] for row in training_rows], validation, record={}, max_train_steps=args.steps,
            learning_rate=learning_rate, batch_size=args.batch_size, micro_batch_size=4, seed=args.seed,
            ssim_weight=ssim_weight,
        )  # fmt: skip
        before, after = header["validation"]["before"], header["validation"]["after"]
        results[learning_rate, ssim_weight] = score_round_trip(validation, vae, 4)["ssim"], decoder_state(vae)
        print(f"lr {learning_rate:g}, L1 + {ssim_weight:g} (1 - SSIM): validation SSIM {before['ssim']:.4f} to "
              f"{after['ssim']:.4f}, PSNR {before['psnr']:.2f} to {after['psnr']:.2f} dB, best step {header['step']}")  # fmt: skip

    difference = results[SETTINGS[0]][0] - results[SETTINGS[2]][0]
    low, high = bootstrap_interval(difference.tolist(), validation.patients, args.seed)
    print(
        f"L1 + (1 - SSIM) against L1 alone, lr {SETTINGS[0][0]:g}: validation SSIM {difference.mean():+.4f} [{low:.4f}, {high:.4f}]"
    )

    # The best one, on patients that neither fitting nor choosing saw
    best = max(results, key=lambda setting: results[setting][0].mean())
    held_out = bank(held_out_rows)
    scores = []
    for state in (own, results[best][1]):
        put_on_decoder(vae, state)
        scores.append(score_round_trip(held_out, vae, batch_size=4))
    print(f"lr {best[0]:g}, L1 + {best[1]:g} (1 - SSIM) on {len(held_out)} held-out films of {len(set(held_out.patients))} "
          "patients, 95 % by patient")  # fmt: skip
    lowest = {}
    for name, digits in (("ssim", 4), ("psnr", 2)):
        before, after = (score[name] for score in scores)
        low, high = bootstrap_interval((after - before).tolist(), held_out.patients, args.seed)
        lowest[name] = low
        print(f"{name.upper()} {before.mean():.{digits}f} to {after.mean():.{digits}f}, gain {(after - before).mean():.{digits}f} "
              f"[{low:.{digits}f}, {high:.{digits}f}], {(after > before).sum()} films gain")  # fmt: skip
    passed = lowest["ssim"] > 0
    print(
        f"{'pass' if passed else 'fail'}: the interval of the held-out gain in SSIM begins at {lowest['ssim']:.4f}, bar 0"
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
