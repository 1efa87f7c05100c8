"""The autoencoder's posterior of every film, computed once, and the endless stream of training films over it.

The frozen encoder costs 39 % of a Stable Diffusion LoRA step and gives the same answer each time. What it gives is a
Gaussian per film (mean and standard deviation), so the cache keeps both and a training step still draws its own
latents (Rombach et al. 2022, arXiv:2112.10752, Sec. 3.1; Kingma and Welling 2014, arXiv:1312.6114).
"""

import hashlib
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils.boxes import box_loss_weights
from utils.files import canonical_json, require_space, sha256_file, write_json
from utils.films import PREPROCESSING, UnusableFilm
from utils.images import load_film, to_pixel_values
from utils.refusal import Refused
from utils.seeding import derive_seed
from utils.tokens import TokenizedCaptions

FILES = ("mean", "std", "checksum")
STARTED = "started"  # there when a cache's files have their full size, so that a build can go on


class FilmDataset(Dataset):
    """Films read from disk when asked for, uint8 [resolution, resolution] each; an unreadable one is refused by name."""

    def __init__(self, directory: Path, rows: Sequence[dict], resolution: int, interpolation: str = "lanczos"):
        self.directory, self.rows, self.resolution, self.interpolation = directory, rows, resolution, interpolation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        row = self.rows[index]
        path = self.directory / row["file_name"]
        try:
            if row.get("sha256") and sha256_file(path) != row["sha256"]:
                raise UnusableFilm("not the file whose SHA-256 the table has")
            return load_film(path, self.resolution, self.interpolation)
        except (OSError, UnusableFilm) as error:
            raise Refused(
                f"{path} cannot be read ({error}); `python download.py --check {self.directory}` lists all such films"
            ) from error


def refusals_in_words(loader: DataLoader) -> Iterator[Tensor]:
    """Yield a loader's batches; what a worker process refuses is said without the traceback that torch wraps it in."""
    try:
        yield from loader
    except Refused as error:
        raise Refused(str(error).rpartition(f"{Refused.__name__}: ")[2].strip()) from error


def load_films(dataset: FilmDataset) -> Tensor:
    """Return all films of a data set at once, uint8 [N, resolution, resolution]."""
    return torch.cat(list(DataLoader(dataset, batch_size=64)))


def mean_film(
    directory: Path,
    rows: Sequence[dict],
    resolution: int,
    seed: int,
    interpolation: str = "lanczos",
    most: int = 1000,
) -> Tensor:
    """Return the pixel mean of training films, uint8 [resolution, resolution].

    The floor of every image metric: it scores 0.76 in SSIM against real films where one real film scores 0.62 against
    another. At most `most` films, drawn by seed, enter: more do not change it.
    """
    order = np.random.default_rng(derive_seed(seed, "mean film")).permutation(len(rows))[:most]
    films = FilmDataset(directory, [rows[i] for i in sorted(order)], resolution, interpolation)
    total = sum(batch.double().sum(dim=0) for batch in DataLoader(films, batch_size=64))
    return (total / len(films)).round().to(torch.uint8)


def posterior_key(
    directory: Path, rows: Sequence[dict], vae: AutoencoderKL, resolution: int, interpolation: str, mirrored: bool
) -> str:
    """Return the name of a cache: a hash of what its content depends on, so that a stale one is never found.

    Of the autoencoder that is the encoder: another decoder leaves the posteriors as they are. Not of how the device rounds that
    encodes (TF32 or not): less than the noise that is drawn for every film.
    """
    parts = {
        "films": [row.get("sha256") or sha256_file(directory / row["file_name"]) for row in rows],
        "vae": hash_weights(vae, ("encoder.", "quant_conv.")),
        "resolution": resolution,
        "interpolation": interpolation,
        "mirrored": mirrored,
        "preprocessing": PREPROCESSING,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:24]


def hash_weights(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """Return the SHA-256 of those weights of a model whose names begin so, whatever their type and device."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            weights.update(name.encode())
            weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()


class Posteriors:
    """Memory-mapped posterior of every film, in the order of the rows.

    Attributes:
        mean, std: float32 [N, C, h, w] each.
        checksum: CRC-32 over a film's mean and std, uint32 [N]; 0 where a film is not encoded yet.
    """

    def __init__(self, folder: Path, num_films: int, writable: bool = False):
        """Map a cache's files, for its builder `writable`."""
        self.folder = folder
        try:
            self.mean, self.std, self.checksum = (
                np.load(folder / f"{name}.npy", mmap_mode="r+" if writable else "r") for name in FILES
            )
        except (OSError, ValueError) as error:
            raise Refused(f"{folder} is no whole latent cache ({error}); delete that folder") from error
        if not self.mean.shape == self.std.shape or not len(self.mean) == len(self.checksum) == num_films:
            raise Refused(f"{folder} holds {self.mean.shape}, expected {num_films} films; delete that folder")

    def is_whole(self, film: int) -> bool:
        """Return whether a film is encoded and its numbers are those that were written."""
        return checksum_of(self.mean[film], self.std[film]) == self.checksum[film]

    def read(self, films: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and std of some films, float32 [B, C, h, w] each.

        Raises:
            Refused: where the disk gives back other numbers than were written.
        """
        for film in films:
            if not self.is_whole(film):
                raise Refused(f"film {film} in {self.folder} is damaged; delete that folder, it is made again")
        return torch.from_numpy(self.mean[list(films)]), torch.from_numpy(self.std[list(films)])


def checksum_of(mean: np.ndarray, std: np.ndarray) -> int:
    """Return the CRC-32 of a film's mean and std, float32 [C, h, w] each."""
    return zlib.crc32(np.ascontiguousarray(std), zlib.crc32(np.ascontiguousarray(mean)))


def is_cached(
    directory: Path, rows: Sequence[dict], vae: AutoencoderKL, cache_dir: Path, resolution: int, interpolation: str
) -> bool:
    """Return whether `cache_posteriors` would find these films encoded."""
    key = posterior_key(directory, rows, vae, resolution, interpolation, mirrored=False)
    return (cache_dir / "latents" / key / "index.json").is_file()


def cache_posteriors(
    directory: Path,
    rows: Sequence[dict],
    vae: AutoencoderKL,
    cache_dir: Path,
    resolution: int,
    interpolation: str = "lanczos",
    mirrored: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
    owner: str = "",
) -> Posteriors:
    """Return the posteriors of `rows`, encoding them first where no earlier run has.

    Processes encode a share each into one set of files, which gets its final name when all shares are finite. They are
    those of one machine: films of several lie on one page of a file, and of a page that two machines write to, a
    network folder keeps one machine's. A build that a kill cut short goes on at the batch where it was.

    Args:
        directory: folder that the rows' `file_name` is relative to.
        rows: films to encode, of all folds, so that one cache serves them all.
        vae: autoencoder on its device, in fp32.
        cache_dir: the cache is the folder `latents/<key>` in it.
        resolution, interpolation: size of the films and how they are brought to it.
        mirrored: encode the mirror images instead (`--random_flip`).
        batch_size, num_workers: films at a time, reading processes.
        process_index, num_processes: which share is ours of how many; a process beyond those waits for them.
        wait_for_everyone: the barrier between all processes.
        owner: name of the run, so that two runs may build the same cache at once.

    Raises:
        Refused: for a film that cannot be read, or whose posterior is not finite, by name.
    """
    folder = cache_dir / "latents" / posterior_key(directory, rows, vae, resolution, interpolation, mirrored)
    partial = folder.with_name(f"{folder.name}.{derive_seed(owner):016x}.tmp")
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (len(rows), vae.config.latent_channels, side, side)
    # The first process alone decides whether there is work: a cache that another run finishes meanwhile would else
    # send one process home and leave the others waiting for it
    if process_index == 0:
        if (folder / "index.json").is_file():
            shutil.rmtree(partial, ignore_errors=True)
        elif not (partial / STARTED).is_file():
            shutil.rmtree(partial, ignore_errors=True)
            allocate(partial, shape)
    wait_for_everyone()
    if not partial.is_dir():
        return Posteriors(folder, len(rows))
    if process_index < num_processes:
        films = FilmDataset(directory, rows, resolution, interpolation)
        share = range(process_index, len(rows), num_processes)
        encode_into(partial, films, share, vae, mirrored, batch_size, num_workers, has_bar=process_index == 0)
    wait_for_everyone()
    if process_index == 0:
        write_json(partial / "index.json", {"shape": shape, "resolution": resolution, "mirrored": mirrored})
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():
                raise
            shutil.rmtree(partial)  # another run was quicker
    wait_for_everyone()
    return Posteriors(folder, len(rows))


def encode_into(
    folder: Path,
    films: FilmDataset,
    share: range,
    vae: AutoencoderKL,
    mirrored: bool,
    batch_size: int,
    num_workers: int,
    has_bar: bool,
) -> None:
    """Encode a share of the films into the files of a cache, but for those that are whole there.

    Raises:
        Refused: for a film that cannot be read, or whose posterior is not finite, by name.
    """
    files = Posteriors(folder, len(films), writable=True)
    batches = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
    # Batches are those of an unbroken build, so that its numbers come out to the last digit
    batches = [batch for batch in batches if not all(map(files.is_whole, batch))]
    with tqdm(
        total=len(share), initial=len(share) - sum(map(len, batches)), desc="encoding films", unit="film",
        disable=not has_bar,
    ) as bar:  # fmt: skip
        loader = refusals_in_words(DataLoader(films, batch_sampler=batches, num_workers=num_workers))
        for where, batch in zip(batches, loader, strict=True):
            mean, std = encode(vae, batch.flip(-1) if mirrored else batch)
            for i, film_mean, film_std in zip(where, mean, std, strict=True):
                if not (film_mean.isfinite().all() and film_std.isfinite().all()):
                    raise Refused(
                        f"{films.rows[i]['file_name']}: its latents are not finite; the autoencoder needs fp32"
                    )
                files.mean[i], files.std[i] = film_mean.numpy(), film_std.numpy()
                files.checksum[i] = checksum_of(files.mean[i], files.std[i])
            bar.update(len(batch))
    for file in (files.mean, files.std, files.checksum):
        file.flush()


def allocate(folder: Path, shape: tuple[int, ...]) -> None:
    """Make the empty files of a cache for films of `shape` [N, C, h, w]."""
    require_space(folder, 2 * 4 * math.prod(shape), "the latent cache")
    folder.mkdir(parents=True)
    for name in FILES:
        dtype, extent = (np.uint32, shape[:1]) if name == "checksum" else (np.float32, shape)
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=extent).flush()
        with open(folder / f"{name}.npy", "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a crash while encoding
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    (folder / STARTED).touch()


def channel_statistics(
    posteriors: Posteriors, films: Sequence[int], scaling_factor: float, most: int = 1000
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of scaled latents, over at most the first `most` of `films`.

    The scaling factor of a base makes the standard deviation about 1 over its own training images (Rombach et al.
    2022, arXiv:2112.10752, App. G). The variance of a latent is that of the means plus the mean of the variances.
    """
    first, second, pixels = 0.0, 0.0, 0
    for film in films[:most]:
        mean, std = (values[0].double() * scaling_factor for values in posteriors.read([film]))
        first, second = first + mean.sum(dim=(1, 2)), second + (mean.square() + std.square()).sum(dim=(1, 2))
        pixels += mean[0].numel()
    average = first / pixels
    return average.tolist(), (second / pixels - average.square()).sqrt().tolist()


@torch.no_grad()
def encode(vae: AutoencoderKL, films: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(z | film), float32 [B, C, h, w] on the CPU, for uint8 films [B, H, W]."""
    pixel_values = to_pixel_values(films).to(vae.device)
    # Before Ampere there is no TF32, and fp32 takes four times as long; fp16 has TF32's mantissa, not its range
    if vae.device.type == "cuda" and torch.cuda.get_device_capability(vae.device) < (8, 0):
        with torch.autocast("cuda", torch.float16):
            posterior = vae.encode(pixel_values).latent_dist
        if posterior.mean.isfinite().all() and posterior.std.isfinite().all():
            return posterior.mean.float().cpu(), posterior.std.float().cpu()
    posterior = vae.encode(pixel_values).latent_dist
    return posterior.mean.float().cpu(), posterior.std.float().cpu()


class TrainingStream(Dataset):
    """The films of a fold in training order, one after another, epoch after epoch, addressed by position.

    Position p holds film p mod N of epoch p div N's permutation, which depends on (seed, epoch) alone. Which films
    make up a step is therefore known without having run the steps before, on any number of processes.

    Items: `position` (int), `mean` and `std` float32 [C, h, w], `input_ids` int64 [L], `place_weights` float32 [h, w].
    """

    def __init__(
        self,
        posteriors: Posteriors,
        films: Sequence[int],
        captions: TokenizedCaptions | Tensor,
        seed: int,
        mirrored: Posteriors | None = None,
        boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        box_weight: float = 0.0,
        sentence_dropout: float = 0.0,
    ):
        """Stream over `films`, rows of the posteriors, each with the caption at its place in `captions`.

        Args:
            captions: token ids, [N, L] where no sentence is ever left out.
            mirrored: posteriors of the mirror images, which then stand in for half of the films.
            boxes, box_weight: of each of `films`, and what one adds to the loss, as `box_loss_weights` takes them.
            sentence_dropout: probability that a caption's sentence after the first is left out.
        """
        self.posteriors, self.films, self.captions, self.seed = posteriors, films, captions, seed
        self.mirrored, self.boxes, self.box_weight = mirrored, boxes, box_weight
        self.sentence_dropout = sentence_dropout

    def film_at(self, position: int) -> int:
        """Return which of `films` stands at a position of the stream."""
        epoch, offset = divmod(position, len(self.films))
        return int(epoch_order(len(self.films), self.seed, epoch)[offset])

    def __getitem__(self, position: int) -> dict[str, Tensor | int]:
        film = self.film_at(position)
        source, boxes = self.posteriors, self.boxes[film] if self.boxes else ()
        if self.mirrored is not None and derive_seed(self.seed, "mirror", position) % 2:
            source, boxes = self.mirrored, [(1 - right, top, 1 - left, bottom) for left, top, right, bottom in boxes]
        mean, std = (values[0] for values in source.read([self.films[film]]))
        input_ids = self.captions[film]
        if self.sentence_dropout:
            input_ids = self.captions.subset(
                film, self.sentence_dropout, derive_seed(self.seed, "sentences", position)
            )
        return {
            "position": position,
            "mean": mean,
            "std": std,
            "input_ids": input_ids,
            "place_weights": box_loss_weights(boxes, *mean.shape[-2:], self.box_weight),
        }


@lru_cache(maxsize=2)
def epoch_order(num_films: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of `num_films` films in one epoch, int64 [num_films]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(num_films, generator=generator)


def deal_positions(
    first: int, num_steps: int, accumulation: int, batch_size: int, process_index: int, num_processes: int
) -> Iterator[list[int]]:
    """Yield the stream positions of this process's micro-batches, step after step.

    Positions are dealt to a step, then to its micro-steps, then to processes, so that neither the number of processes
    nor that of micro-steps changes which films make up a step.

    Args:
        first: position of the first film of the first step.
        num_steps: optimizer steps.
        accumulation: micro-batches a process and a step.
        batch_size: films a micro-batch and a process.
        process_index, num_processes: whose micro-batches.
    """
    for micro_step in range(num_steps * accumulation):
        start = first + (micro_step * num_processes + process_index) * batch_size
        yield list(range(start, start + batch_size))


def prefetch(batches: Iterable[dict], ahead: int = 2) -> Iterator[dict]:
    """Yield batches that a thread has read while the one before was trained on, `ahead` of them at most."""
    batches = iter(batches)
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting = deque(reader.submit(next, batches, None) for _ in range(ahead))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(next, batches, None))
            yield batch
