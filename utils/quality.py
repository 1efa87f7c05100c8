"""What is wrong with a generated film, as far as it can be told without a reader: colour, blankness, saturation, strangeness."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.distances import nearest_neighbours
from utils.encoders import bundled_space, measure_films
from utils.folds import draw_most_patients, held_out_of, patient_of
from utils.images import grey_levels
from utils.latents import FilmDataset
from utils.metadata import dataset_hash, read_metadata
from utils.refusal import Refused

MOST_COLOUR = 8.0  # grey levels that channels differ by, in the mean over pixels
LEAST_CONTRAST = 12.0  # grey levels, standard deviation over pixels
MOST_SATURATED = 0.7  # share of pixels that are quite black, or quite white
MOST_REFERENCE_FILMS = 1_000
LEAST_PATIENTS = 10
FARTHEST = 0.99  # quantile of how far real films are from one another


class QualityControl:
    """Looks at pictures as they come from the autoencoder.

    Attributes:
        reference_sha256: of the real films that pictures are compared with, None without any.
    """

    def __init__(self, reference: Path | None, resolution: int, device: torch.device, adapters: Sequence[dict] = ()):
        """Measure the reference.

        Args:
            reference: an imagefolder of real films, of which 1,000 at most are taken, one a patient first; None: pictures are
                not asked how near they are to real ones.
            resolution: of the pictures.
            device: where features are computed.
            adapters: headers of those that draw. Of the set that one was trained on, its held-out fold is left out: images
                must not be chosen by films that what is trained on them may be tested on.
        """
        self.reference_sha256 = None
        if reference is None:
            return
        rows = read_metadata(reference)
        held_out = set().union(*(held_out_of(rows, header) for header in adapters))
        rows = [row for row in rows if row["file_name"] not in held_out]
        self.reference_sha256 = dataset_hash(rows)
        rows = draw_most_patients(rows, MOST_REFERENCE_FILMS, seed=0)
        patients = list(map(patient_of, rows))
        if len(set(patients)) < LEAST_PATIENTS:
            raise Refused(
                f"{reference} holds films of {len(set(patients))} patients; expected at least {LEAST_PATIENTS} to tell what "
                "is far from them"
            )
        self.space = bundled_space(device)
        films = DataLoader(FilmDataset(reference, rows, resolution), 64)
        self.real = measure_films(self.space, films, len(rows))["features"]
        _, whose = np.unique(patients, return_inverse=True)
        others, _ = nearest_neighbours(self.real, self.real, torch.from_numpy(whose))
        self.radius = others.quantile(FARTHEST).item()

    @torch.no_grad()
    def flags(self, picture: Tensor) -> list[str]:
        """Return what is wrong with a picture, float32 [3, H, W] in [0, 1]; nothing for a film that passes.

        "colour": its channels differ by more than 8 grey levels in the mean. "blank": the standard deviation of its grey
        levels is below 12. "saturated": more than 70 % of it is quite black, or quite white. "far from real films": it is
        farther from the nearest real film, in the bundled encoder's features, than 99 % of real films are from the nearest
        of other patients; one real film in a hundred would be flagged so.
        """
        found = []
        if (picture.amax(dim=0) - picture.amin(dim=0)).mean() * 255 > MOST_COLOUR:
            found.append("colour")
        film = grey_levels(picture[None]).to(torch.uint8)
        if film.float().std() < LEAST_CONTRAST:
            found.append("blank")
        if max((film == 0).float().mean(), (film == 255).float().mean()) > MOST_SATURATED:
            found.append("saturated")
        if self.reference_sha256 is not None:
            features = self.space.embed(film)[0].float().cpu()
            if nearest_neighbours(features, self.real)[0].item() > self.radius:
                found.append("far from real films")
        return found
