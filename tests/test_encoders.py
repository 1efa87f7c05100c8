"""Feature spaces: what goes into the networks of the literature, and what is said where they are missing."""

import sys
from types import SimpleNamespace

import pytest
import torch

from utils.encoders import SPACES, bundled_space, measure_films, to_xrv_input
from utils.refusal import Refused

CPU = torch.device("cpu")
FILMS = torch.randint(0, 256, (5, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Recording(torch.nn.Module):
    """Stands for a network: remembers what it was given, and returns features that tell films apart."""

    def __init__(self, *args, **options):
        super().__init__()
        self.asked, self.inputs = (args, options), []

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        self.inputs.append(films)
        return films.float().flatten(1)[:, :6]

    features2 = forward


def test_torchxrayvision_is_given_its_own_range() -> None:
    """0 to 255 and 0 to 1 were fed to it side by side in code that a paper's figures came from."""
    levels = torch.tensor([0, 255, 51], dtype=torch.uint8)
    films = levels[:, None, None].expand(-1, 512, 512)
    given = to_xrv_input(films)
    assert given.shape == (3, 1, 224, 224)
    torch.testing.assert_close(given.mean(dim=(1, 2, 3)), torch.tensor([-1024.0, 1024.0, -614.4]))


def test_each_space_asks_for_its_network_and_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def network(*args, **options) -> Recording:
        made.append(Recording(*args, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torchxrayvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", SimpleNamespace(DenseNet=network))
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", network)
    for name in ("xrv", "inception"):
        measured = measure_films(SPACES[name](CPU), FILMS.split(2), len(FILMS))
        assert measured["features"].equal(measured["readable"]), "of networks that do the same"
        assert (measured["features"].shape, measured["pixels"].shape) == ((5, 6), (5, 1024))
    *xrv, inception = made
    assert [network.asked for network in xrv] == [
        ((), {"weights": f"densenet121-res224-{name}"}) for name in ("all", "mimic_ch")
    ]
    assert not any(network.training for network in xrv)
    assert inception.asked == (("inception-v3-compat", ["2048"]), {})
    assert torch.cat(inception.inputs).equal(FILMS[:, None].expand(-1, 3, -1, -1))


def test_the_bundled_space_reads_findings_besides() -> None:
    space = bundled_space(CPU)
    measured = measure_films(space, FILMS.split(2), len(FILMS))
    assert (space.name, measured["features"].shape, measured["readable"].shape) == ("cxr-features", (5, 64), (5, 73))
    assert measured["readable"][:, :64].equal(measured["features"])
    assert not measured["features"].requires_grad
    torch.testing.assert_close(
        measure_films(space, FILMS.split(5), 5)["features"], measured["features"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "package"), [("xrv", "torchxrayvision"), ("inception", "torch-fidelity")])
def test_what_is_not_installed_is_named_with_its_cure(monkeypatch, name: str, package: str) -> None:
    def missing(*args) -> None:
        raise ModuleNotFoundError("Torch-fidelity is not installed")

    monkeypatch.setitem(sys.modules, "torchxrayvision.models", None)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", missing)
    with pytest.raises(Refused, match=f"--features {name} needs {package} .*requirements-eval.txt"):
        SPACES[name](CPU)


def test_weights_out_of_reach_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **options) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setitem(sys.modules, "torchxrayvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", SimpleNamespace(DenseNet=unreachable))
    with pytest.raises(Refused, match=r"--features xrv: its weights cannot be fetched .*no route to host"):
        SPACES["xrv"](CPU)
