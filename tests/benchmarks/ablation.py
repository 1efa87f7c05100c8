"""What is learnt from the text, and by which model: LoRA on both, on the UNet alone, and on both with captions shuffled.

    python -m tests.benchmarks.ablation

Trains the three on the bundled films with the recipe of launch/quickstart.sh, holding out folds 0 and 1 in turn, evaluates
each with evaluate.py, and compares the first with the other two, `--against`. Side by side: films rebuilt, generated films
as a set, and AUROC of what captions assert. If that AUROC measures the text, it falls to its floor for the model whose
captions were shuffled in training, while its films look no less real.

Films are drawn without guidance, as the model has learnt them, and with guidance by 3, as people draw them. Guidance
magnifies what a caption changes, which for captions shuffled in training is nothing but chance.

The bars, with either: the 95 % interval of the shuffled model's mean AUROC holds the floor, that of LoRA on both lies above
it. Without guidance: the shuffled model's kernel distance is at most 1.5 times as large. Typed again, finished runs are not
done again. An hour and a quarter on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from utils.pipeline import ROOT
from utils.refusal import ArgumentParser, run

VARIANTS = {
    "LoRA on both": ("both", ()),
    "LoRA on the UNet alone": ("unet", ("--text_encoder_rank", "0")),
    "LoRA on both, captions shuffled": ("shuffled", ("--shuffle_captions",)),
}
FOLDS = (0, 1)
RECIPE = (
    *("--pretrained_model_name_or_path", "assets/cxr-tiny", "--max_train_steps", "950", "--validation_steps", "950"),
    *("--max_validation_samples", "16", "--rank", "32", "--learning_rate", "3e-3", "--adam_beta2", "0.99"),
    *("--box_loss_weight", "0.4", "--caption_dropout", "0", "--num_validation_images", "0", "--report_to", "none"),
)
SAMPLING = ("--num_inference_steps", "12", "--num_prompted", "0")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/ablation"), help="folder of the runs [out/ablation]")
    parser.add_argument("--no_unet_alone", action="store_true", help="leave out LoRA on the UNet alone")
    parser.add_argument("--guidance", type=int, nargs="+", default=[1, 3], help="guidances films are drawn with [1 3]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    work = args.work
    variants = {title: of for title, of in VARIANTS.items() if not (of[0] == "unet" and args.no_unet_alone)}
    if not (work / "data" / "dataset.json").exists():
        script("download.py", "--output_dir", work / "data", "--cache_dir", work / "cache")
    for fold in FOLDS:
        for name, flags in variants.values():
            lora = work / name / f"fold{fold}"
            where = ("--train_data_dir", work / "data", "--cache_dir", work / "cache", "--output_dir", lora)
            if not (lora / "README.md").exists():
                script("train_lora.py", "--fold", fold, *where, *RECIPE, *flags)
            for scale in args.guidance:
                evaluation = evaluated(work, scale, name) / lora.name / "evaluation"
                if not (evaluation / "metrics.json").exists():
                    script(
                        "evaluate.py", "--lora", lora, *SAMPLING, "--guidance_scale", scale, "--output_dir", evaluation
                    )
    checks = {}
    for scale in args.guidance:
        summaries = {}
        for title, (name, _) in variants.items():
            summaries[title] = summary(evaluated(work, scale, name))
            if name != "both":
                against = summary(evaluated(work, scale, "both"), evaluated(work, scale, name))["against"]
                summaries[title]["gain"] = against
        print(f"\nguidance {scale}" if scale != 1 else "\nwithout guidance")
        table(summaries)
        checks |= {f"guidance {scale}, {check}": good for check, good in verdicts(summaries, scale == 1).items()}
    passed = all(checks.values())
    said = "; ".join(f"{check}{'' if good else ': below the bar'}" for check, good in checks.items())
    print(f"\n{'pass' if passed else 'fail'}: {said}")
    return 0 if passed else 1


def evaluated(work: Path, scale: int, name: str) -> Path:
    """Return the folder in which the folds of a variant are evaluated with films drawn at one guidance."""
    return work / f"guidance{scale}" / name


def summary(out: Path, other: Path | None = None) -> dict:
    """Return `summary.json` of a cross-validation, compared with another."""
    output_dir = out / ("summary" if other is None else f"against-{other.name}")
    against = () if other is None else ("--against", other)
    script("evaluate.py", "--cross_validation", out, *against, "--output_dir", output_dir)
    return json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))


def script(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def table(summaries: dict[str, dict]) -> None:
    """Print the variants side by side, and what LoRA on both gains over the others."""
    both = summaries["LoRA on both"]
    print(f"{both['films']} held-out films of {both['patients']} patients, folds {both['folds']}")
    heads = ("", "SSIM from 0.5", "kernel distance", "precision, recall", "AUROC of findings", "its floor")
    print("  ".join(head.ljust(32 if not head else 26) for head in heads))
    of_base = both["figures"]["base/ssim/0.5"]["pooled"]
    base, real = both["alignment"]["mean"]["base"], both["alignment"]["mean"]["real"]
    rows = [("base without LoRA", f"{of_base:.4f}", "", "", interval(base), "")]
    rows += [("real films", f"{both['figures']['bound/ssim/ceiling']['pooled']:.4f}", distance(both, "real"),
              reached(both, "real"), interval(real), "")]  # fmt: skip
    for title, part in summaries.items():
        mean = part["alignment"]["mean"]
        ssim = f"{part['figures']['adapter/ssim/0.5']['pooled']:.4f}"
        rows.append((title, ssim, distance(part, "generated"), reached(part, "generated"),
                     interval(mean["generated"]), interval(mean["shuffled"])))  # fmt: skip
    for row in rows:
        print("  ".join(cell.ljust(32 if place == 0 else 26) for place, cell in enumerate(row)))
    for title, part in list(summaries.items())[1:]:
        gain = part["gain"]
        print(f"\nLoRA on both over {title}, paired by film, 95 % by patient:")
        for name in ("ssim/0.3", "ssim/0.5", "ssim/0.7", "psnr/0.5"):
            print(f"  {name}: {interval(gain['figures'][name], 'gain')}")
        for label, figure in gain["alignment"].items():
            print(f"  AUROC, {label}: {interval(figure, 'gain')}")


def verdicts(summaries: dict[str, dict], as_learnt: bool) -> dict[str, bool]:
    """Return what must hold, and whether it does; of kernel distances only for films drawn as the model has learnt them."""
    both, shuffled = summaries["LoRA on both"], summaries["LoRA on both, captions shuffled"]
    floor = shuffled["alignment"]["mean"]["shuffled"]["mean"]
    deaf, told = (part["alignment"]["mean"]["generated"] for part in (shuffled, both))
    checks = {
        f"captions shuffled: AUROC {interval(deaf)} holds the floor, {floor:.2f}": deaf["interval"][0] <= floor <= deaf["interval"][1],
        f"true captions: AUROC {interval(told)} lies above it": told["interval"][0] > floor,
    }  # fmt: skip
    if as_learnt:
        kernels = [part["distribution"]["generated"]["kernel"] for part in (shuffled, both)]
        checks[f"kernel distance {kernels[0]:.2f} and {kernels[1]:.2f}"] = kernels[0] <= 1.5 * kernels[1]
    return checks


def interval(figure: dict, name: str = "mean") -> str:
    ends = figure["interval"]
    return f"{figure[name]:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")


def distance(summary: dict, kind: str) -> str:
    sets = summary["distribution"]
    return f"{sets[kind]['kernel']:.2f} +- {sets[f'{kind}_sd']['kernel']:.2f}"


def reached(summary: dict, kind: str) -> str:
    of = summary["distribution"][kind]
    return f"{of['precision']:.2f}, {of['recall']:.2f}"


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
