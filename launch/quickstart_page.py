"""Put a quickstart on one page: before and after, what it is worth, where to go next. Called by quickstart.sh.

python -m launch.quickstart_page out/quickstart
"""

import argparse
import html
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.files import read_jsonl, write_bytes
from utils.refusal import ArgumentParser, Refused, run
from utils.report import followed_table, headline_table, html_page, html_picture, html_table

INTRODUCTION = """<p>The bundled base model draws children's chest films, normal and with two kinds of pneumonia. No caption that
it was trained on named a pleural effusion, a pneumothorax, a nodule, a mass, an enlarged heart or a pacemaker beside a film.
{training} films of virtual patients, with such findings drawn in, taught them to a LoRA adapter: a few low-rank matrices
beside the frozen weights of the UNet and the text encoder, trained for {steps} steps in {minutes} on this machine. All films
on this page are synthetic.</p>"""

FOLLOWED = """<p>A small encoder reads {films} films of each model for the finding and the side that their prompts name.
<b>Chance</b> is how often it reads the finding where another one was asked for; the <b>ceiling</b> is how often it reads it
in films of the set that do show it. An adapter that works lies near the ceiling, and the base near chance. The encoder saw
neither these films nor this adapter, but it learnt findings that the same program drew into other films. Nodules and masses
are read as one, zones are not read.</p>"""

LEARNT = """<p>{films} films of {patients} virtual patients that were held out are each noised to a share of the noise schedule
and denoised again. SSIM (structural similarity, 1 for equal films) and PSNR (in decibels, higher is nearer) say how near it came
back, and mean something only between the floor (the mean training film in its place) and the ceiling (the autoencoder's own
round trip). A free sample is not meant to be near any one film; those rows are there because people ask for them.</p>"""

NEXT = """<ul>
<li><b>Your own prompts</b>: <code>.venv/bin/python generate.py --lora out/quickstart/fold0 --guidance_scale 3 --prompt "Chest
radiograph of a child. Right pneumothorax."</code></li>
<li><b>Real films</b>: <code>.venv/bin/python download.py --list_sources</code> names them; then
<code>.venv/bin/python train_lora.py --fold 0</code>, <code>generate.py</code> and <code>evaluate.py</code> work on
<code>data/</code> as they did here on <code>out/quickstart/data/</code>. The README tells what each takes and writes.</li>
<li><b>A GPU</b>: with CUDA the base is Stable Diffusion 1.5 at 512 px, from the hub:
<code>.venv/bin/python launch/doctor.py</code> ends with the command that trains it on your card.</li>
<li><b>All five folds</b>: <code>bash launch/cross_validate.sh</code> trains and evaluates each and puts them into one table: every
patient scored by a model that never saw him or her.</li>
</ul>"""

STYLE = "<style>.pair{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;flex:1 1 26em}</style>"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the finished quickstart")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    run_dir = args.folder / "fold0"
    evaluation = run_dir / "evaluation"
    sheets = {name: args.folder / "images" / name / "contact_sheet.png" for name in ("base", "adapter")}
    records = [
        run_dir / "config.json",
        run_dir / "log.jsonl",
        evaluation / "metrics.json",
        args.folder / "seconds.tsv",
    ]
    pictures = [*sheets.values(), run_dir / "curves.png", evaluation / "findings.png"]
    for path in [*records, *pictures]:
        if not path.exists():
            raise Refused(f"{path} is missing; run bash launch/quickstart.sh, which makes it")
    config, metrics = (json.loads(path.read_text(encoding="utf-8")) for path in (records[0], records[2]))
    seconds = Counter()
    for line in records[3].read_text(encoding="utf-8").splitlines():
        stage, spent = line.split("\t")
        seconds[stage] += int(spent)

    prompted = sum(rates["films"] for rates in metrics["prompt_followed"]["adapter"].values())
    parts = [
        INTRODUCTION.format(
            training=config["films"]["training"],
            steps=len(read_jsonl(run_dir / "log.jsonl")),
            minutes=spoken(seconds["training"]),
        ),
        "<h2>Before and after</h2>",
        "<p>Each row is a prompt; every column starts from the same noise, in both pictures. None is left out.</p>",
        '<div class="pair">',
        figure("The base without LoRA", sheets["base"]),
        figure("With the adapter", sheets["adapter"]),
        "</div>",
        "<h2>Are prompts followed?</h2>",
        FOLLOWED.format(films=prompted),
        html_table(*followed_table(metrics)),
        "<p>Three films a finding and side, with a film of the set that shows it:</p>",
        html_picture(evaluation / "findings.png"),
        "<h2>Did it learn the films, too?</h2>",
        LEARNT.format(films=metrics["films"], patients=metrics["patients"]),
        html_table(*headline_table(metrics)),
        "<h2>The run</h2>",
        "<p>Loss, SSIM on validation films (other patients again; the best step is kept), error by noise level, gradient.</p>",
        html_picture(run_dir / "curves.png"),
        html_table(
            ["stage", "time"],
            [
                *([stage, spoken(spent)] for stage, spent in seconds.items()),
                ["in all", spoken(seconds.total())],
            ],
        ),
        "<h2>Where to go next</h2>",
        NEXT,
    ]
    title = f"From text to chest film in {spoken(seconds.total())}"
    write_bytes(args.folder / "report.html", html_page(title, [STYLE, *parts]).encode())


def figure(caption: str, picture: Path) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{html_picture(picture)}</figure>"


def spoken(seconds: int) -> str:
    """Return "4 min 10 s" for 250."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(run(main, parse_args))
