"""May an adapter leave the house? What its memorisation audit says, on its card and before an upload. No torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from utils.files import sha256_file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora_weights.safetensors"  # the same for A1111 and ComfyUI
DECODER_NAME = "vae_decoder.safetensors"  # beside it, where the decoder is adapted, too
HEADER_KEY = "chest_radiograph_lora"  # of what its header says of the run
EVALUATION = Path("evaluation") / "metrics.json"
LEAST_FILMS = 500  # generated, and real of training and held-out patients, one each, that it takes to pass
HIGHEST_SHARE = 0.6  # that the upper end of an interval may reach to pass
SHOWN_SHARE = 0.55  # a lower end beyond it is memorisation
# Times the near copies that are expected: an upper end up to it passes, a lower end beyond it is memorisation
MOST_NEAR_COPIES = 3
FEWEST = 20  # real films of either side, below which not even that is said: one odd film may be nearest to all others
LEAST_STEPS = 10  # of the solver: films of fewer are no sign of what the adapter draws
TOO_FEW, PASSED, FAILED, UNDECIDED = "too few films to say", "passed", "it memorises", "memorisation is not ruled out"
NOT_TO_UPLOAD = (FAILED, UNDECIDED)


def verdict(
    num_references: int, num_patients: int, spaces: Sequence[dict], copies: int, num_unmeasured: int = 0
) -> str:
    """Return what an audit says: TOO_FEW, PASSED, FAILED or UNDECIDED.

    A copy of the film that was asked for moves the share nearer to training. One of another film of training does not, where
    its patient is not among the references, nor is the share of one in ten felt there: near copies show both. Few of them
    hide among films that are near by chance, where a true copy still convicts.

    Args:
        num_references: real films of either side, one a patient; twice as many generated films are asked about.
        num_patients: of either side that there are. Where `--max_films` left out some, that is no reason to let pass.
        spaces: by space `interval`, of the share nearer to training, `near_copies_interval`, and `near_copies_expected`.
        copies: generated films that are a training film.
        num_unmeasured: training films that were not compared, of which others may be copies.
    """
    lows, highs = zip(*(of["interval"] for of in spaces), strict=True)
    times = [[end / of["near_copies_expected"] for end in of["near_copies_interval"]] for of in spaces]
    fewest, most = (max(ends) for ends in zip(*times, strict=True))
    if copies or ((max(lows) > SHOWN_SHARE or fewest > MOST_NEAR_COPIES) and num_references >= FEWEST):
        return FAILED
    if num_references < LEAST_FILMS:
        return TOO_FEW if num_patients < LEAST_FILMS else UNDECIDED
    passes = max(highs) <= HIGHEST_SHARE and most <= MOST_NEAR_COPIES and not num_unmeasured
    return PASSED if passes else UNDECIDED


def read_audit(run_dir: Path) -> dict | None:
    """Return the memorisation audit that evaluate.py made of what lies in a run's folder.

    Returns:
        As in `metrics.json`; None where there is none, or where it is of another adapter, another decoder,
        films of fewer than LEAST_STEPS, an earlier version that did not ask for as much, or damaged.
    """
    evaluation = run_dir / EVALUATION
    try:
        metrics = json.loads(evaluation.read_text(encoding="utf-8"))
        audited = metrics["adapter"]["sha256"], metrics.get("vae_decoder", {}).get("sha256")
        there = [run_dir / name for name in (WEIGHTS_NAME, DECODER_NAME)]
        is_current = audited == tuple(sha256_file(path) if path.is_file() else None for path in there)
        audit = metrics["memorisation"]
        is_whole = "copies" in audit and audit["sampling"]["num_inference_steps"] >= LEAST_STEPS
        return audit if is_current and is_whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def why_not_upload(run_dir: Path) -> str | None:
    """Return why a run's adapter is not to be uploaded, as a sentence, None where it may be."""
    audit = read_audit(run_dir)
    if audit is None:
        return (
            f"nobody has asked yet, of films of {LEAST_STEPS} steps or more, whether it repeats its training films; python "
            f"evaluate.py --lora {run_dir}, then the same command again"
        )
    return in_words(audit) if audit["verdict"] in NOT_TO_UPLOAD else None


def in_words(audit: dict | None) -> str:
    """Return what an audit found, as sentences."""
    if audit is None:
        return "Whether it repeats films that it was trained on has not been asked (evaluate.py asks)."
    spaces = {space: audit[space] for space in ("features", "pixels")}
    shares = " and ".join(
        "{:.3f} [{:.3f}, {:.3f}] in {}".format(of["probability"], *of["interval"], space)
        for space, of in spaces.items()
    )
    copies = " and ".join(
        "{:.1%} [{:.1%}, {:.1%}] in {}".format(of["near_copies"], *of["near_copies_interval"], space)
        for space, of in spaces.items()
    )
    expected = spaces["pixels"]["near_copies_expected"]
    unmeasured = (
        f" {audit['unmeasured']} more were not compared (--max_training_films)." if audit.get("unmeasured") else ""
    )
    sampling = audit["sampling"]
    return (
        f"Memorisation audit: {audit['verdict']}. Of {audit['generated']} films, generated in {sampling['num_inference_steps']} steps at "
        f"guidance {sampling['guidance_scale']:g}, half of them from the captions of {audit['references']} training patients, half from those of as many held-out ones, the share nearer to the former "
        f"is {shares}; 0.5 is expected where none is copied. Near copies, nearer to one of {audit['training_films']} training "
        f"films than 99 % of held-out films are, also for how far they are from other held-out films: {copies}; up to {expected:.1%} is "
        f"expected. {audit['copies']} are a training film itself: correlated with it beyond 0.99 and more than any held-out film is. "
        f"To pass takes {LEAST_FILMS} patients each, upper ends of the share up to {HIGHEST_SHARE} and of near copies up to "
        f"{MOST_NEAR_COPIES} times those expected; one copy, a lower end beyond {SHOWN_SHARE}, or beyond {MOST_NEAR_COPIES} times those expected, is memorisation.{unmeasured}{_captions_in_words(audit.get('captions'))}"
    )


def _captions_in_words(part: dict | None) -> str:
    """Return whether captions of training are recognised, as a sentence; `part` as `audit.compare_pulls` returns it."""
    if part is None:
        return ""
    low, high = part["interval"]
    return (
        f" Of {part['training']} captions of training and {part['held_out']} of others, each of a single film, the former move the prediction "
        f"from pure noise further in {part['probability']:.2f} [{low:.2f}, {high:.2f}] of pairs; 0.5 is expected where none "
        "is known by heart."
    )
