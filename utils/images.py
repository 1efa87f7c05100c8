"""Films as tensors: 8-bit grey for people and metrics, three channels in [-1, 1] for the autoencoder."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.films import decode_film, find_borders, to_square, without_borders


def load_film(path: Path, resolution: int, interpolation: str = "lanczos") -> Tensor:
    """Read one film as every part of the project sees it: square, 8-bit, grey.

    Args:
        path: an image file of any depth that `films.decode_film` reads.
        resolution: side of the result in pixels.
        interpolation: name of a Pillow filter, used where the film has another size.

    Returns:
        uint8, [resolution, resolution].

    Raises:
        films.UnusableFilm: where the file is no usable film.
    """
    grey = decode_film(path)
    if grey.shape != (resolution, resolution):  # else it is one that download.py made, whose borders are padding
        grey = without_borders(grey, find_borders(grey))
    film, _ = to_square(grey, resolution, Image.Resampling[interpolation.upper()])
    return torch.from_numpy(np.array(film))


def to_pixel_values(films: Tensor) -> Tensor:
    """Return grey films, uint8 [B, H, W], as the autoencoder's input, float32 [B, 3, H, W] in [-1, 1]."""
    return (films.float() / 127.5 - 1.0)[:, None].expand(-1, 3, -1, -1)


def thumbnails(films: Tensor, side: int = 32) -> Tensor:
    """Return films, uint8 [B, H, W], as rows of side x side mean grey levels, of mean 0 and deviation 1 in each film.

    What copies of a film have in common, and films of like patients do not.

    Returns:
        float32 [B, side * side]; zeros where a film is blank.
    """
    means = F.adaptive_avg_pool2d(films[:, None].float(), side).flatten(1)
    deviations = means.std(dim=1, keepdim=True)
    return (means - means.mean(dim=1, keepdim=True)) / torch.where(deviations > 0, deviations, 1.0)


def to_films(pixel_values: Tensor) -> Tensor:
    """Return decoder output, [B, 3, H, W] about [-1, 1], as grey films, uint8 [B, H, W] on the CPU.

    Rounds as `diffusers` does and weighs the channels as Pillow's `convert("L")` does (ITU-R 601-2), bit for bit, so
    that a film from our loop and one from a stock pipeline are the same film.
    """
    return grey_levels((pixel_values.float() / 2 + 0.5).clamp(0, 1).cpu()).to(torch.uint8)


def grey_levels(pictures: Tensor, bits: int = 8) -> Tensor:
    """Return a pipeline's pictures as grey levels, weighed as in `to_films`.

    Args:
        pictures: float32 [B, 3, H, W] in [0, 1].
        bits: 8 or 16, of a level.

    Returns:
        int64 [B, H, W], 0 to 2^bits - 1.
    """
    red, green, blue = (pictures * (2**bits - 1)).round().to(torch.int64).unbind(dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def to_grey(image: Image.Image) -> Tensor:
    """Return a pipeline's RGB image as a grey film, uint8 [H, W]."""
    return torch.from_numpy(np.array(image.convert("L")))
