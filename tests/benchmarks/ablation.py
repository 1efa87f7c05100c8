"""What is learnt from the text, and by which model: LoRA on both, on the UNet alone, and on both with captions shuffled.

    python -m tests.benchmarks.ablation

Trains the three on the bundled films with the recipe of launch/quickstart.sh, holding out folds 0 and 1 in turn, evaluates
each with evaluate.py, and compares the first with the other two, `--against`. Side by side: films rebuilt, generated films
as a set, and AUROC of what captions assert. If that AUROC measures the text, it falls to its floor for the model whose
captions were shuffled in training, while its films look no less real.

The bars: the 95 % interval of the shuffled model's mean AUROC holds the floor, that of LoRA on both lies above it; and the
shuffled model's kernel distance is at most 1.5 times as large. Typed again, finished runs are not done
again. An hour on two cores.
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


SAMPLING = ("--num_inference_steps", "12", "--guidance_scale", "3", "--num_prompted", "0")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/ablation"), help="folder of the runs [out/ablation]")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    work = args.work
    if not (work / "data" / "dataset.json").exists():
        script("download.py", "--output_dir", work / "data", "--cache_dir", work / "cache")
    for fold in FOLDS:
        for name, flags in VARIANTS.values():
            lora = work / name / f"fold{fold}"
            where = ("--train_data_dir", work / "data", "--cache_dir", work / "cache", "--output_dir", lora)
            if not (lora / "README.md").exists():
                script("train_lora.py", "--fold", fold, *where, *RECIPE, *flags)
            if not (lora / "evaluation" / "metrics.json").exists():
                script("evaluate.py", "--lora", lora, *SAMPLING)
    summaries = {}
    for title, (name, _) in VARIANTS.items():
        against = () if name == "both" else ("--against", work / name)
        output_dir = work / name / "summary"
        script("evaluate.py", "--cross_validation", work / name, "--output_dir", output_dir)
        summaries[title] = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
        if against:
            output_dir = work / "both" / f"against-{name}"
            script("evaluate.py", "--cross_validation", work / "both", *against, "--output_dir", output_dir)
            summaries[title]["gain"] = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))["against"]
    return table(summaries)


def script(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def table(summaries: dict[str, dict]) -> int:
    """Print the variants side by side, what LoRA on both gains over the others, and the verdict."""
    both = summaries["LoRA on both"]
    print(f"\n{both['films']} held-out films of {both['patients']} patients, folds {both['folds']}")
    heads = ("", "SSIM from 0.5", "kernel distance", "precision, recall", "AUROC of findings", "its floor")
    print("  ".join(head.ljust(32 if not head else 26) for head in heads))
    of_base = both["figures"]["base/ssim/0.5"]["pooled"]
    base, real = both["alignment"]["mean"]["base"], both["alignment"]["mean"]["real"]
    rows = [("base without LoRA", f"{of_base:.4f}", "", "", interval(base), "")]
    rows += [("real films", f"{both['figures']['bound/ssim/ceiling']['pooled']:.4f}", distance(both, "real"),
              reached(both, "real"), interval(real), "")]  # fmt: skip
    for title, summary in summaries.items():
        mean = summary["alignment"]["mean"]
        ssim = f"{summary['figures']['adapter/ssim/0.5']['pooled']:.4f}"
        rows.append((title, ssim, distance(summary, "generated"), reached(summary, "generated"),
                     interval(mean["generated"]), interval(mean["shuffled"])))  # fmt: skip
    for row in rows:
        print("  ".join(cell.ljust(32 if place == 0 else 26) for place, cell in enumerate(row)))
    for title, summary in list(summaries.items())[1:]:
        gain = summary["gain"]
        print(f"\nLoRA on both over {title}, paired by film, 95 % by patient:")
        for name in ("ssim/0.3", "ssim/0.5", "ssim/0.7", "psnr/0.5"):
            print(f"  {name}: {interval(gain['figures'][name], 'gain')}")
        for label, figure in gain["alignment"].items():
            print(f"  AUROC, {label}: {interval(figure, 'gain')}")

    shuffled = summaries["LoRA on both, captions shuffled"]
    floor = shuffled["alignment"]["mean"]["shuffled"]["mean"]
    deaf, told = (summary["alignment"]["mean"]["generated"] for summary in (shuffled, both))
    kernels = [summary["distribution"]["generated"]["kernel"] for summary in (shuffled, both)]
    checks = {
        f"captions shuffled: AUROC {interval(deaf)} holds the floor, {floor:.2f}": deaf["interval"][0] <= floor <= deaf["interval"][1],
        f"true captions: AUROC {interval(told)} lies above it": told["interval"][0] > floor,
        f"kernel distance {kernels[0]:.2f} and {kernels[1]:.2f}": kernels[0] <= 1.5 * kernels[1],
    }  # fmt: skip
    passed = all(checks.values())
    said = "; ".join(f"{check}{'' if good else ': below the bar'}" for check, good in checks.items())
    print(f"{'pass' if passed else 'fail'}: {said}")
    return 0 if passed else 1


def interval(figure: dict, name: str = "mean") -> str:
    ends = figure["interval"]
    return f"{figure[name]:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")


def distance(summary: dict, kind: str) -> str:
    part = summary["distribution"]
    return f"{part[kind]['kernel']:.2f} +- {part[f'{kind}_sd']['kernel']:.2f}"


def reached(summary: dict, kind: str) -> str:
    part = summary["distribution"][kind]
    return f"{part['precision']:.2f}, {part['recall']:.2f}"


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
