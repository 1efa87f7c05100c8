"""Feature spaces that films are measured in: the bundled encoder's, torchxrayvision's, Inception's. One function for all films.

The bundled one works offline; the other two are those of the literature, need `pip install -r requirements-eval.txt`, and
fetch their weights when they are first used. Distances compare within one space only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from utils.features import BUNDLED_ENCODER, load_encoder
from utils.images import thumbnails
from utils.refusal import Refused

XRV_WEIGHTS = "densenet121-res224-all"
XRV_READING_WEIGHTS = "densenet121-res224-mimic_ch"  # saw neither NIH nor Open-i, whose labels it is to be read for
XRV_SIDE = 224  # pixels


@dataclass(frozen=True)
class FilmSpace:
    """A feature space.

    Attributes:
        name: one of SPACES.
        note: what it is, and what it has seen, in a sentence.
        embed: grey films, uint8 [B, H, W] on any device -> features float32 [B, D] for distances, and [B, D'] that
            findings are read from: more than D where an encoder has readings of its own.
    """

    name: str
    note: str
    embed: Callable[[Tensor], tuple[Tensor, Tensor]]


def bundled_space(device: torch.device) -> FilmSpace:
    """Features of `assets/cxr-features`, [B, 64], and with them its log-odds of drawn findings."""
    encoder = load_encoder().to(device)

    def embed(films: Tensor) -> tuple[Tensor, Tensor]:
        reading = encoder(films.to(device))
        return reading.features, torch.cat([reading.features, reading.finding_logits], dim=1)

    note = (
        "64 features of the bundled encoder, which learnt children's films and drawn findings; its figures compare with one "
        "another only"
    )
    return FilmSpace(BUNDLED_ENCODER.name, note, embed)


def xrv_space(device: torch.device) -> FilmSpace:
    """The last features of torchxrayvision's DenseNet-121, [B, 1024] (Cohen et al. 2022, arXiv:2111.00595).

    Distances are those of the literature, by the network that saw every public set. Findings are read from one that saw
    MIMIC alone: the other learnt the labels of the very films that would be the ceiling.
    """
    try:
        from torchxrayvision.models import DenseNet
    except ImportError as error:
        raise _missing("xrv", "torchxrayvision", error) from error
    network, reader = (
        _fetched("xrv", partial(DenseNet, weights=weights)).to(device).eval()
        for weights in (XRV_WEIGHTS, XRV_READING_WEIGHTS)
    )

    def embed(films: Tensor) -> tuple[Tensor, Tensor]:
        pixels = to_xrv_input(films.to(device))
        return network.features2(pixels), reader.features2(pixels)

    note = (
        f"1,024 features of torchxrayvision's {XRV_WEIGHTS}, which saw Open-i, NIH, PadChest, CheXpert, MIMIC, RSNA and "
        f"Google's films; findings are read from those of {XRV_READING_WEIGHTS}, which flatter on MIMIC's films alone"
    )
    return FilmSpace("xrv", note, embed)


def to_xrv_input(films: Tensor) -> Tensor:
    """Return grey films, uint8 [B, H, W], as torchxrayvision wants them, float32 [B, 1, 224, 224] in [-1024, 1024]."""
    pixels = (films[:, None].float() / 255 * 2 - 1) * 1024
    return F.interpolate(pixels, (XRV_SIDE, XRV_SIDE), mode="bilinear", antialias=True)


def inception_space(device: torch.device) -> FilmSpace:
    """Pooled features of Inception-v3, [B, 2048], by torchmetrics and torch-fidelity (Heusel et al. 2017)."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise _missing("inception", "torchmetrics", error) from error
    try:
        network = _fetched("inception", lambda: NoTrainInceptionV3("inception-v3-compat", ["2048"])).to(device)
    except ModuleNotFoundError as error:
        raise _missing("inception", "torch-fidelity", error) from error

    def embed(films: Tensor) -> tuple[Tensor, Tensor]:
        features = network(films.to(device)[:, None].expand(-1, 3, -1, -1))
        return features, features

    return FilmSpace("inception", "2,048 features of Inception-v3, which saw photographs and no radiograph", embed)


SPACES = {BUNDLED_ENCODER.name: bundled_space, "xrv": xrv_space, "inception": inception_space}


def _missing(name: str, package: str, error: ImportError) -> Refused:
    return Refused(
        f"--features {name} needs {package} ({error}): pip install -r requirements-eval.txt, "
        f"or take --features {BUNDLED_ENCODER.name}, which is bundled"
    )


def _fetched(name: str, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Return a network whose weights may have to be downloaded."""
    try:
        return load()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a download and a pickle raise
        reason = " ".join(str(error).split())[:160]
        raise Refused(
            f"--features {name}: its weights cannot be fetched or read ({type(error).__name__}: {reason}); check the "
            f"connection, or take --features {BUNDLED_ENCODER.name}, which is bundled"
        ) from error


@torch.no_grad()
def measure_films(space: FilmSpace, batches: Iterable[Tensor], count: int) -> dict[str, Tensor]:
    """Measure films a batch at a time, so that a set of any size fits.

    Args:
        space: from SPACES.
        batches: uint8 [B, H, W] each.
        count: films in all, for the progress bar.

    Returns:
        float32 on the CPU: `features` [N, D] and `readable` [N, D'] as `embed` returns them, and `pixels` [N, 1024],
        from `images.thumbnails`.
    """
    measured: dict[str, list[Tensor]] = {"features": [], "readable": [], "pixels": []}
    with tqdm(total=count, desc="measuring films", unit="film") as bar:
        for films in batches:
            features, readable = space.embed(films)
            for name, part in (("features", features), ("readable", readable), ("pixels", thumbnails(films))):
                measured[name].append(part.float().cpu())
            bar.update(len(films))
    return {name: torch.cat(parts) for name, parts in measured.items()}
