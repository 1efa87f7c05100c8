"""The latent cache and the stream over it: right films, right captions, right order, whatever the processes."""

import copy
import json
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from PIL import Image

from utils import latents
from utils.boxes import box_loss_weights
from utils.latents import (
    Posteriors,
    TrainingStream,
    cache_posteriors,
    channel_statistics,
    deal_positions,
    encode,
    epoch_order,
    mean_film,
    posterior_key,
    prefetch,
)
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.refusal import Refused


@pytest.fixture(scope="module")
def vae(tiny_base: Path):
    return load_base(str(tiny_base)).vae.eval()


def test_a_cached_posterior_is_that_of_its_film(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64, batch_size=7)
    for index in (0, 13, 39):
        film = torch.from_numpy(np.array(Image.open(tiny_data / rows[index]["file_name"])))
        mean, std = encode(vae, film[None])
        torch.testing.assert_close(torch.from_numpy(cached.mean[index]), mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(cached.std[index]), std[0], rtol=1e-4, atol=1e-5)


def test_shares_of_several_processes_are_the_whole(vae, tiny_data: Path, tmp_path: Path) -> None:
    """Two processes, here threads with a barrier, fill one cache; a third, as of another machine, waits for it."""
    rows, barrier = read_metadata(tiny_data), Barrier(3)
    caches = {}
    alone = cache_posteriors(tiny_data, rows, vae, tmp_path / "alone", 64, batch_size=1)

    def build(process_index: int) -> None:
        caches[process_index] = cache_posteriors(
            tiny_data, rows, vae, tmp_path / "both", 64, batch_size=1, process_index=process_index, num_processes=2,
            wait_for_everyone=barrier.wait,
        )  # fmt: skip

    threads = [Thread(target=build, args=(index,)) for index in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in (caches[0], caches[1], caches[2]):
        assert np.array_equal(cache.mean, alone.mean)
        assert np.array_equal(cache.std, alone.std)


def test_what_a_worker_process_refuses_is_said_in_a_line(vae, own_data: Path, tmp_path: Path) -> None:
    """torch hands on its traceback as the message."""
    rows = read_metadata(own_data)
    film = own_data / rows[3]["file_name"]
    film.write_bytes(b"no film")
    with pytest.raises(Refused) as refused:
        cache_posteriors(own_data, rows, vae, tmp_path, 64, num_workers=1)
    assert str(refused.value).startswith(f"{film} cannot be read")
    assert "\n" not in str(refused.value)


def test_a_cache_is_found_again_and_never_a_stale_one(vae, own_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(own_data)
    cache_posteriors(own_data, rows, vae, tmp_path, 64)
    folder = next((tmp_path / "latents").iterdir())
    when = (folder / "mean.npy").stat().st_mtime_ns
    cache_posteriors(own_data, rows, vae, tmp_path, 64)
    assert (folder / "mean.npy").stat().st_mtime_ns == when
    key = posterior_key(own_data, rows, vae, 64, "lanczos", False)
    assert key == folder.name
    assert posterior_key(own_data, rows, vae, 32, "lanczos", False) != key
    assert posterior_key(own_data, rows, vae, 64, "bicubic", False) != key
    assert posterior_key(own_data, rows, vae, 64, "lanczos", True) != key
    assert posterior_key(own_data, rows[::-1], vae, 64, "lanczos", False) != key
    Image.fromarray(255 - np.array(Image.open(own_data / rows[0]["file_name"]))).save(own_data / rows[0]["file_name"])
    assert posterior_key(own_data, read_metadata(own_data), vae, 64, "lanczos", False) != key
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 1e-3
    assert posterior_key(own_data, rows, other, 64, "lanczos", False) != key
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.quant_conv.bias[0] += 1e-3
    assert posterior_key(own_data, rows, other, 64, "lanczos", False) != key


def test_the_decoder_does_not_change_the_cache(vae, tiny_data: Path) -> None:
    rows, other = read_metadata(tiny_data), copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_in.bias[0] += 1
        other.post_quant_conv.bias[0] += 1
    keys = {posterior_key(tiny_data, rows, model, 64, "lanczos", False) for model in (vae, other)}
    assert len(keys) == 1


def test_a_cache_of_another_size_and_an_unreadable_film_are_refused(vae, own_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(own_data)
    cached = cache_posteriors(own_data, rows[:4], vae, tmp_path, 64)
    with pytest.raises(Refused, match="expected 5 films"):
        Posteriors(next((tmp_path / "latents").iterdir()), 5)
    assert len(cached.mean) == 4
    (own_data / rows[7]["file_name"]).write_bytes(b"no image")
    with pytest.raises(Refused, match=rows[7]["file_name"]):
        cache_posteriors(own_data, rows, vae, tmp_path, 64)
    assert len([path for path in (tmp_path / "latents").iterdir() if path.suffix != ".tmp"]) == 1


def test_every_epoch_visits_every_film_once_in_an_order_of_its_own(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64)
    stream = TrainingStream(cached, range(40), torch.zeros(40, 1, dtype=torch.long), seed=0)
    epochs = [[stream.film_at(epoch * 40 + i) for i in range(40)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_order(40, seed=0, epoch=0).tolist() == epochs[0]
    assert epoch_order(40, seed=1, epoch=0).tolist() != epochs[0]


def test_mirroring_takes_half_of_the_films_and_only_where_asked(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64)
    mirrored = cache_posteriors(tiny_data, rows, vae, tmp_path, 64, mirrored=True)
    film = torch.from_numpy(np.array(Image.open(tiny_data / rows[0]["file_name"])))
    torch.testing.assert_close(torch.from_numpy(mirrored.mean[0]), encode(vae, film.flip(-1)[None])[0][0],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    stream = TrainingStream(cached, range(40), torch.zeros(40, 1, dtype=torch.long), 0, mirrored)
    flips = [np.array_equal(stream[p]["mean"], mirrored.mean[stream.film_at(p)]) for p in range(200)]
    assert 70 < sum(flips) < 130


def test_boxes_stay_with_their_films_and_are_mirrored_with_them(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64)
    mirrored = cache_posteriors(tiny_data, rows, vae, tmp_path, 64, mirrored=True)
    chosen, boxes = [3, 11], [[[0.0, 0.0, 0.25, 0.5]], []]
    input_ids = torch.zeros(2, 1, dtype=torch.long)
    stream = TrainingStream(cached, chosen, input_ids, 0, mirrored, boxes, 0.5)
    expected = box_loss_weights(boxes[0], *cached.mean.shape[-2:], 0.5)
    flips = set()
    for position in range(20):
        item, film = stream[position], stream.film_at(position)
        is_mirrored = np.array_equal(item["mean"], mirrored.mean[chosen[film]])
        if film == 0:
            flips.add(is_mirrored)
            assert torch.equal(item["place_weights"], expected.flip(-1) if is_mirrored else expected)
        else:
            assert (item["place_weights"] == 1).all()
    assert flips == {False, True}
    assert (TrainingStream(cached, chosen, input_ids, 0)[0]["place_weights"] == 1).all()


@pytest.mark.parametrize(("processes", "accumulation", "batch_size"), [(1, 1, 8), (2, 1, 4), (1, 4, 2), (2, 2, 2)])
def test_a_step_has_the_same_films_however_they_are_dealt(processes: int, accumulation: int, batch_size: int) -> None:
    steps = [set() for _ in range(3)]
    for process in range(processes):
        dealt = list(deal_positions(16, 3, accumulation, batch_size, process, processes))
        assert len(dealt) == 3 * accumulation
        for number, positions in enumerate(dealt):
            steps[number // accumulation] |= set(positions)
    assert steps == [set(range(16 + 8 * step, 24 + 8 * step)) for step in range(3)]


def test_the_mean_film_is_the_mean(own_data: Path) -> None:
    rows = read_metadata(own_data)[:5]
    films = np.stack([np.array(Image.open(own_data / row["file_name"])) for row in rows])
    assert np.array_equal(mean_film(own_data, rows, 64, seed=0).numpy(), np.round(films.mean(axis=0)))


def test_films_that_are_no_squares_are_squared_as_download_would(tmp_path: Path, vae) -> None:
    (tmp_path / "data").mkdir()
    wide = np.tile(np.arange(80, 200, dtype=np.uint8), (64, 1))
    Image.fromarray(wide).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}) + "\n")
    rows = read_metadata(tmp_path / "data")
    assert cache_posteriors(tmp_path / "data", rows, vae, tmp_path, 64).mean.shape == (1, 4, 8, 8)


def test_a_build_that_was_killed_goes_on_where_it_was(
    vae, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch by batch: what is whole is kept, a batch that is not is encoded again as it was."""
    rows, calls = read_metadata(tiny_data), []
    unbroken = cache_posteriors(tiny_data, rows, vae, tmp_path / "unbroken", 64, batch_size=7)

    def count(*args):
        calls.append(len(args[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(latents, "encode", count)
    with pytest.raises(KeyboardInterrupt):
        cache_posteriors(tiny_data, rows, vae, tmp_path / "killed", 64, batch_size=7)
    (partial,) = (tmp_path / "killed" / "latents").iterdir()
    std = np.load(partial / "std.npy", mmap_mode="r+")
    std[8] = 0  # a page of the second batch that never reached the disk
    std.flush()
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path / "killed", 64, batch_size=7)
    assert calls == [7, 7, 7, 7, 7, 7, 7, 5]
    assert np.array_equal(cached.mean, unbroken.mean)
    assert np.array_equal(cached.std, unbroken.std)
    assert np.array_equal(cached.checksum, unbroken.checksum)


def test_a_damaged_film_of_the_cache_is_refused(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64)
    mean = np.load(cached.folder / "mean.npy", mmap_mode="r+")
    mean[3, 0, 0, 0] += 1
    mean.flush()
    cached.read([2, 4])
    with pytest.raises(Refused, match="film 3 .* is damaged; delete that folder"):
        cached.read([2, 3])
    (cached.folder / "std.npy").write_bytes(b"short")
    with pytest.raises(Refused, match="no whole latent cache"):
        cache_posteriors(tiny_data, rows, vae, tmp_path, 64)


def test_channel_statistics_are_those_of_latents_drawn(vae, tiny_data: Path, tmp_path: Path) -> None:
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path, 64)
    mean, std = cached.read(range(40))
    generator = torch.Generator().manual_seed(0)
    drawn = 0.5 * (mean + std * torch.randn(50, *mean.shape, generator=generator))
    expected_mean, expected_sd = 0.5 * mean.mean(dim=(0, 2, 3)), drawn.transpose(0, 2).flatten(1).std(dim=1)
    means, deviations = channel_statistics(cached, range(40), 0.5)
    torch.testing.assert_close(torch.tensor(means, dtype=torch.float32), expected_mean)
    torch.testing.assert_close(torch.tensor(deviations, dtype=torch.float32), expected_sd, rtol=1e-2, atol=0)


def test_batches_are_read_ahead_in_order_and_errors_arrive() -> None:
    read = []

    def batches():
        for number in range(5):
            read.append(number)
            yield {"number": number}
        raise Refused("damaged")

    stream = prefetch(batches(), ahead=2)
    assert next(stream)["number"] == 0
    assert [next(stream)["number"] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(Refused, match="damaged"):
        next(stream)
    assert read == list(range(5))
