"""A small encoder of chest films, bundled: features for distances, and readings of label and findings for alignment.

It works offline at 128 px where the networks of the literature (torchxrayvision's DenseNet, Inception) would have to
be downloaded. Distances in its features compare with one another only, never with a published FID.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from utils.files import write_bytes, write_json
from utils.pipeline import ROOT
from utils.refusal import Refused
from utils.validation import eval_mode

BUNDLED_ENCODER = ROOT / "assets" / "cxr-features"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
RESOLUTION = 128  # pixels a side
REDUCTION = 16  # pixels a position of the map, along a side
READ_CHANNELS = 16  # of the map, where findings are read

LABELS = ("normal", "bacterial pneumonia", "viral pneumonia")
# Sides are the patient's: the right is on the left of the film
FINDING_LABELS = (
    "right pleural effusion",
    "left pleural effusion",
    "right pneumothorax",
    "left pneumothorax",
    "right nodule or mass",
    "left nodule or mass",
    "cardiomegaly",
    "right pacemaker",
    "left pacemaker",
)


def finding_label(finding: str, side: str | None) -> str:
    """Return the one of FINDING_LABELS under which a drawn finding is read: `("mass", "left")` as a nodule or mass."""
    name = "nodule or mass" if finding in ("nodule", "mass") else finding
    return f"{side} {name}" if side else name


class Reading(NamedTuple):
    """What the encoder makes of films: features [B, F], label_logits [B, 3], finding_logits [B, 9]."""

    features: Tensor
    label_logits: Tensor
    finding_logits: Tensor


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385).

    Normalised over the batch: group norm of channels-last bf16 takes five times as long on a CPU, and in evaluation
    this is a fixed scale and offset, so that a film's features do not depend on its neighbours.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class FilmEncoder(nn.Module):
    """A residual network from films to features, a label and findings, 0.8 M parameters as bundled.

    The label is read from the features, of which pooling has taken the place; findings have a side and are read from
    the map [B, C, 8, 8] with every position weighed by itself.

    Args:
        widths: channels of the stem and of the three stages, each at half the resolution of the one before.
        depths: blocks of each stage.
        num_features: F.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (24, 48, 96, 160),
        depths: tuple[int, int, int] = (2, 2, 1),
        num_features: int = 64,
    ):
        super().__init__()
        self.config = {"widths": list(widths), "depths": list(depths), "num_features": num_features}
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages = []
        for in_channels, out_channels, depth in zip(widths[:3], widths[1:], depths, strict=True):
            stages.append(ResidualBlock(in_channels, out_channels, stride=2))
            stages += [ResidualBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1)]
        self.stages = nn.Sequential(*stages)
        self.to_features = nn.Linear(widths[3], num_features)
        self.label_head = nn.Linear(num_features, len(LABELS))
        self.finding_head = nn.Sequential(
            nn.Conv2d(widths[3], READ_CHANNELS, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(READ_CHANNELS * (RESOLUTION // REDUCTION) ** 2, len(FINDING_LABELS)),
        )

    def forward(self, films: Tensor) -> Reading:
        """Read grey films, uint8 [B, H, W]."""
        return self.read(to_input(films))

    def read(self, pixel_values: Tensor) -> Reading:
        """Read the encoder's own input, [B, 1, 128, 128] in [-1, 1]."""
        maps = self.stages(self.stem(pixel_values))  # [B, C, 8, 8]
        features = self.to_features(maps.mean(dim=(2, 3)))
        return Reading(features, self.label_head(features), self.finding_head(maps))


def to_input(films: Tensor) -> Tensor:
    """Return grey films, uint8 [B, H, W], as the encoder's input, float32 [B, 1, 128, 128] in [-1, 1]."""
    if films.dtype != torch.uint8 or films.ndim != 3:
        raise ValueError(f"films of type {films.dtype} and shape {list(films.shape)}; expected uint8 [B, H, W]")
    pixel_values = films[:, None].float() / 127.5 - 1.0
    if pixel_values.shape[2:] == (RESOLUTION, RESOLUTION):
        return pixel_values
    return F.interpolate(pixel_values, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Extracted:
    """What the encoder read in a set of films, float32 on the CPU.

    Attributes:
        features: [N, F].
        label_probabilities: [N, 3], of LABELS; a row sums to 1.
        finding_probabilities: [N, 9], of FINDING_LABELS; each by itself.
    """

    features: Tensor
    label_probabilities: Tensor
    finding_probabilities: Tensor

    def finding(self, name: str) -> Tensor:
        """Return the probability of one of FINDING_LABELS, [N]."""
        return self.finding_probabilities[:, FINDING_LABELS.index(name)]

    def at(self, places: Tensor) -> "Extracted":
        """Return what was read in some of the films, by their places or by a mask."""
        return Extracted(*(tensor[places] for tensor in vars(self).values()))


def extract(encoder: FilmEncoder, films: Tensor, batch_size: int = 64) -> Extracted:
    """Read films in fp32, a batch at a time and in evaluation mode.

    Args:
        encoder: on any device.
        films: uint8 [N, H, W].
        batch_size: films at a time; the result does not depend on it beyond rounding.
    """
    device = next(encoder.parameters()).device
    readings = []
    with eval_mode(encoder), tqdm(total=len(films), desc="reading films", unit="film") as bar:
        for chunk in films.split(batch_size):
            readings.append(encoder(chunk.to(device)))
            bar.update(len(chunk))
    features, label_logits, finding_logits = (torch.cat(parts).float().cpu() for parts in zip(*readings, strict=True))
    return Extracted(features, label_logits.softmax(dim=1), finding_logits.sigmoid())


def save_encoder(encoder: FilmEncoder, folder: Path) -> None:
    """Write the encoder's weights and configuration: kernels and matrices in fp16, norms and biases in fp32.

    Running variances of a norm span more than fp16 does. Equal encoders give equal bytes.
    """
    state = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    write_bytes(folder / WEIGHTS_NAME, save(state))
    write_json(folder / CONFIG_NAME, described(encoder))


def described(encoder: FilmEncoder) -> dict:
    """Return what `config.json` says of an encoder: a file that says anything else is another model's."""
    return {
        "architecture": type(encoder).__name__,
        "resolution": RESOLUTION,
        **encoder.config,
        "labels": list(LABELS),
        "findings": list(FINDING_LABELS),
    }


def load_encoder(folder: Path = BUNDLED_ENCODER) -> FilmEncoder:
    """Load an encoder in fp32 and evaluation mode, safetensors only.

    Raises:
        Refused: where a file is missing, broken, or of another model.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise Refused(
                f"{folder} holds no film encoder: {name} is missing; make it with "
                "python -m assets.train_cxr_features --films FOLDER"
            )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        with torch.device("meta"):  # no memory and no random weights before it is known what the file holds
            encoder = FilmEncoder(config["widths"], config["depths"], config["num_features"])
        if config != described(encoder):
            raise ValueError(f"{CONFIG_NAME} is not of this encoder")
        state = load((folder / WEIGHTS_NAME).read_bytes())
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        encoder.load_state_dict(state, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise Refused(f"{folder} cannot be loaded as a film encoder: {type(error).__name__}: {reason}") from error
    return encoder.eval().to(memory_format=torch.channels_last)  # on a CPU in two thirds of the time
