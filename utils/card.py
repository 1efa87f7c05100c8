"""The model card of an adapter: what it was trained on, what it is worth, what it is not for. No torch."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from utils.files import canonical_json, read_jsonl, sha256_file, write_bytes
from utils.metadata import TABLES, parse_table
from utils.release import HEADER_KEY, WEIGHTS_NAME, in_words, read_audit

LICENSES = {
    "assets/cxr-tiny": ("cc-by-4.0", "CC BY 4.0, as the films it was trained on (Kermany et al., Cell 2018)"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "creativeml-openrail-m",
        "CreativeML OpenRAIL-M, whose Attachment A goes with every derivative, adapters included: no medical advice and "
        "no interpretation of medical results, among others",
    ),
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")  # folders of a base that it is loaded from
READ = (".json", ".safetensors", ".txt")  # suffixes of files in them that decide what it draws
UNKNOWN = ("other", "see the base model's own page; its terms bind this adapter too")

CARD = """---
license: {license_id}
base_model: {base}
library_name: diffusers
tags: [stable-diffusion, lora, text-to-image, chest-x-ray, synthetic]
inference: false
---
# Chest-radiograph LoRA, fold {fold}

Text in, synthetic chest radiograph out. **For research and teaching. Not for diagnosis, screening or any clinical
decision.**

LoRA adapters on the UNet (rank {rank}) and the text encoder (rank {text_encoder_rank}) of `{base}`, {resolution} px.

```python
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("{base}", safety_checker=None)  # it knows photographs only
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline.load_lora_weights("pytorch_lora_weights.safetensors")
```

The samples are drawn with 25 steps and `guidance_scale=4`.

{schedule}{decoder}## Data

{training} films to train on and {validation} to validate, of other patients; {held_out} films of fold {fold}, of yet
other patients, were not touched. Source: {source}. Terms: {data_terms}.

## Validation

Step {best_step} of {last_step}, the best by SSIM of {validation} films rebuilt from half the noise schedule:

| | base without LoRA | this adapter | floor: mean film | ceiling: autoencoder |
|---|---|---|---|---|
| SSIM | {base_ssim:.4f} | {ssim:.4f} | {floor_ssim:.4f} | {ceiling_ssim:.4f} |
| PSNR, dB | {base_psnr:.2f} | {psnr:.2f} | {floor_psnr:.2f} | {ceiling_psnr:.2f} |
| MSE of the prediction | {base_mse:.4f} | {mse:.4f} | | |

These films chose the step, so the figures flatter; `evaluate.py` measures on the held-out fold. `curves.png` and
`samples/` show the whole run.

## Limits

{knows} SSIM says that films are rebuilt well, not that a
finding is right.

{audit}

## Licence

Base model: {license}.

Data: {data_terms}. {data_terms_in_full}
"""


KNOWS = "It knows the findings, views and ages of its captions and nothing else."
CONTROL = "**A control, not for use: its films were trained on with one another's captions, so no prompt means anything to it.**"

SCHEDULE = """It predicts something else than its base, or along another noise schedule; a solver that is not told draws noise:

```python
from diffusers import DDIMScheduler
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {options})
```

"""

DECODER = """`vae_decoder.safetensors` is the autoencoder's decoder, fitted to the training films, encoder untouched: the round trip
of the validation films went from SSIM {before[ssim]:.4f}, PSNR {before[psnr]:.2f} dB to {after[ssim]:.4f}, {after[psnr]:.2f} dB. The figures
below are with it. To decode with it elsewhere:

```python
from safetensors.torch import load_file
pipeline.vae.load_state_dict(load_file("vae_decoder.safetensors"), strict=False)
```

"""


def solver_options(settings: dict) -> str:
    """Return what a solver has to be told that the base's own configuration does not say, as keywords; "" for nothing."""
    told = {"prediction_type": settings["prediction_type"]} if settings.get("prediction_type") else {}
    if settings.get("rescale_betas_zero_snr"):
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in told.items()
    )


def write_card(run_dir: Path, data_dir: Path) -> None:
    """Write a finished run's card from its own files: `config.json`, `validation.jsonl`, the adapter and its audit.

    Args:
        run_dir: the run's folder.
        data_dir: whose `dataset.json` names source and terms, where there is one.
    """
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    validations = read_jsonl(run_dir / "validation.jsonl")
    with safe_open(run_dir / WEIGHTS_NAME, framework="np") as file:
        best_step = json.loads(file.metadata()[HEADER_KEY])["step"]
    card = model_card(config, data_dir, validations, best_step, read_audit(run_dir))
    write_bytes(run_dir / "README.md", card.encode())


def public_base(base: str) -> str:
    """Return a base model as what leaves the machine names it: a folder by its last part, for its path may hold a name."""
    return Path(base).name if base not in LICENSES and Path(base).is_dir() else base


def base_digest(base: str) -> str | None:
    """Return a SHA-256 of the files of a base model in a folder, whose last part may be another's name, too.

    None for the bundled base and for one on the hub, which are known by their name.
    """
    if base in LICENSES or not Path(base).is_dir():
        return None
    files = sorted(path for part in PARTS for path in Path(base, part).glob("*") if path.suffix in READ)
    listed = [[path.parent.name, path.name, sha256_file(path)] for path in files]
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()


def public_config(config: dict) -> dict:
    """Return a run's `config.json` as it may leave the machine: without its folders, the base as `public_base` has it."""
    kept = {name: value for name, value in config.items() if name not in ("train_data_dir", "cache_dir")}
    return kept | {"base": public_base(config["base"]), "settings": public_settings(config["settings"])}


def public_settings(settings: dict) -> dict:
    """Return a run's settings as they may leave the machine."""
    name = "pretrained_model_name_or_path"
    return settings | ({name: public_base(settings[name])} if name in settings else {})


def terms_of(base: str, data_dir: Path) -> list[str]:
    """Return the licence of a base model, and that of each source of a data set with its terms in full."""
    return [f"base model: {LICENSES.get(base, UNKNOWN)[1]}"] + [
        f"{part['source']}: {part['license']}. {part['terms']}" for part in _sources(data_dir)
    ]


def _sources(data_dir: Path) -> list[dict]:
    """Return `source`, `license` and `terms` of each part of a data set: as download.py noted them, else as its rows have them."""
    dataset = data_dir / "dataset.json"
    if dataset.is_file():
        return json.loads(dataset.read_text(encoding="utf-8")).get("sources", [])
    tables = [path for path in (data_dir / name for name in TABLES) if path.is_file()]
    rows = [row for path in tables for row in parse_table(path.name, path.read_bytes(), ())]
    named = dict.fromkeys((row["source"], row["license"]) for row in rows if row.get("source") and row.get("license"))
    return [{"source": source, "license": license, "terms": ""} for source, license in named]


def model_card(
    config: dict, data_dir: Path, validations: list[dict], best_step: int, audit: dict | None = None
) -> str:
    """Return the card as Markdown with the front matter of the Hugging Face hub, without dates or paths.

    Args:
        config: content of the run's `config.json`.
        data_dir: whose `dataset.json` names source and terms, where there is one.
        validations: rows of `validation.jsonl`; the first is the base without LoRA.
        best_step: step of the adapter.
        audit: from `release.read_audit`.
    """
    sources = _sources(data_dir)
    license_id, license_text = LICENSES.get(config["base"], UNKNOWN)
    baseline, best = validations[0], next(row for row in validations if row["step"] == best_step)
    bounds = baseline["bounds"]
    return CARD.format(
        **config["films"],
        schedule=SCHEDULE.format(options=options) if (options := solver_options(config["settings"])) else "",
        decoder=DECODER.format(**config["vae_decoder"]) if config.get("vae_decoder") else "",
        base=public_base(config["base"]),
        fold=config["fold"],
        resolution=config["resolution"],
        rank=config["settings"]["rank"],
        text_encoder_rank=config["settings"]["text_encoder_rank"],
        source=" and ".join(part["source"] for part in sources) or "a folder of the user's own",
        data_terms="; ".join(dict.fromkeys(part["license"] for part in sources)) or "those of the films' owner",
        data_terms_in_full=" ".join(dict.fromkeys(part["terms"] for part in sources)),
        audit=in_words(audit),
        knows=CONTROL if config["settings"].get("shuffle_captions") else KNOWS,
        license_id=license_id,
        license=license_text,
        best_step=best_step,
        last_step=validations[-1]["step"],
        **{f"base_{metric}": baseline[metric] for metric in ("ssim", "psnr", "mse")},
        **{metric: best[metric] for metric in ("ssim", "psnr", "mse")},
        **{f"floor_{metric}": bounds[metric]["mean_film"] for metric in ("ssim", "psnr")},
        **{f"ceiling_{metric}": bounds[metric]["ceiling"] for metric in ("ssim", "psnr")},
    )
