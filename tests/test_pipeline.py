"""Where a base model comes from, what it is taken to predict, and in which noise schedule. Hermetic."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import CLIPTextModel

from tests.conftest import ROOT, build_base
from utils import pipeline
from utils.pipeline import STABLE_DIFFUSION, assemble, load_base, sample, with_schedule
from utils.refusal import Refused, run

NAMED = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


def test_a_schedule_is_changed_also_in_what_the_bases_own_file_does_not_name(tmp_path: Path) -> None:
    """As that of Stable Diffusion 1.5: of a configuration changed by hand diffusers takes no key that its file did not have."""
    base = build_base(tmp_path / "base")
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(NAMED))
    loaded = load_base(str(base))
    assert with_schedule(loaded).noise_scheduler.config.prediction_type == "epsilon"
    changed = with_schedule(loaded, "v_prediction", rescale_betas_zero_snr=True)
    for scheduler in (changed.noise_scheduler, assemble(changed, "ddim").scheduler):
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert scheduler.alphas_cumprod[-1] == 0


@pytest.fixture
def dead_hub() -> Iterator[SimpleNamespace]:
    """An address that hangs up on whoever calls, and counts the calls."""
    hub = SimpleNamespace(calls=0)

    def hang_up() -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return
            hub.calls += 1

    with socket.create_server(("127.0.0.1", 0)) as server:
        hub.address = f"http://127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=hang_up, daemon=True).start()
        yield hub
        server.shutdown(socket.SHUT_RDWR)


def test_an_unreachable_hub_is_asked_once_and_told_in_a_line(
    dead_hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", dead_hub.address)
    assert run(lambda _: load_base(STABLE_DIFFUSION, cache_dir=str(tmp_path)), lambda: None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the hub is not reached" in line and "assets/cxr-tiny" in line
    assert dead_hub.calls == 1


def test_the_hubs_library_tells_no_retries() -> None:
    """Asked of a fresh process, as its own import sets the level."""
    code = "import utils.quiet, huggingface_hub.utils.logging as said; print(said.get_verbosity() == said.ERROR)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "True\n"


def test_a_base_in_the_cache_needs_no_hub(
    dead_hub: SimpleNamespace, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node of a cluster, whose login node had it downloaded."""
    cached = tmp_path / "models--someone--base"
    shutil.copytree(tiny_base, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", dead_hub.address)
    with pytest.warns(UserWarning, match="the hub is not reached .*: someone/base is taken from its cache"):
        base = load_base("someone/base", cache_dir=str(tmp_path))
    assert (base.name, base.resolution) == ("someone/base", 64)
    assert dead_hub.calls == 1


@pytest.fixture
def own_base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
        ("unet", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type projection"),
        ("unet", {"in_channels": 9}, "9 channels in and 4 out where its autoencoder has 4"),
        ("unet", {"out_channels": 8}, "4 channels in and 8 out where its autoencoder has 4"),
        ("vae", {"latent_channels": 16}, "4 channels in and 4 out where its autoencoder has 16"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim 64 where its text encoder has 32"),
    ],
)
def test_a_base_of_another_kind_is_refused_before_its_weights_load(
    own_base: Path, part: str, change: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_base / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(Refused, match=said):
        load_base(str(own_base))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", 5),
        ("vae/config.json", 5),
        ("text_encoder/config.json", []),
        ("tokenizer/tokenizer.json", []),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"norm_num_groups": 0}),
    ],
)
def test_a_base_with_a_damaged_configuration_is_refused(own_base: Path, file: str, change: object) -> None:
    path = own_base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(Refused, match="cannot be loaded as a Stable Diffusion"):
        load_base(str(own_base))


def test_a_peft_too_old_for_transformers_is_refused_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 came with, whose first adapter raised once all was loaded."""
    monkeypatch.setattr(pipeline, "MIN_PEFT_VERSION", "999.0")
    with pytest.raises(Refused, match=r"needs peft 999.0 and finds \d+.*pip install \"peft>=999.0\""):
        load_base("/nowhere")


def test_pndm_draws_in_few_steps(tiny_base: Path) -> None:
    films = sample(assemble(load_base(str(tiny_base)), "PNDMScheduler"), ["PA film."] * 2, [0, 1], 64, 2, 4.0, 2)
    assert torch.stack(list(films)).shape == (2, 64, 64)
