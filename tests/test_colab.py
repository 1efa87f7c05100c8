"""The notebook: run from top to bottom, cut off between its cells, and run again, on a machine that knows nothing."""

import shutil
import subprocess
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from launch.doctor import find_cards, training_command
from tests.conftest import HANG_S, ROOT, fake_package

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
# What the scripts read, and write last, and a line in work.txt of HOME for what they do; no library is imported
STUBS = {
    "download.py": """
if not Path("data/dataset.json").exists():
    Path("data/images").mkdir(parents=True)
    Path("data/images/a.png").touch()
    Path("data/dataset.json").touch()
    work("films")
""",
    "train_lora.py": """
adapter = Path("out/fold0/pytorch_lora_weights.safetensors")
if not Path("data/images/a.png").exists() or "--fold 0 --rank 2" not in " ".join(sys.argv):
    sys.exit(2)
if not adapter.exists():
    adapter.parent.mkdir()
    shutil.copy(PICTURE, "out/fold0/curves.png")
    adapter.touch()
    Path("out/fold0/config.json").write_text('{"settings": {"mixed_precision": "fp16"}}')
    work("training")
""",
    "generate.py": """
if "--mixed_precision fp16" not in " ".join(sys.argv):
    sys.exit(2)
if not Path("images/contact_sheet.png").exists():
    shutil.copy(PICTURE, "images/contact_sheet.png")
    work("images")
""",
    "evaluate.py": """
Path("out/fold0/evaluation").mkdir()
for name in ("films", "noise_levels"):
    shutil.copy(PICTURE, f"out/fold0/evaluation/{name}.png")
Path("out/fold0/evaluation/metrics.json").touch()
work("figures")
""",
    "launch/doctor.py": """
if "--command" in sys.argv:
    print("python train_lora.py")
""",
}
HEAD = """import shutil, sys
from pathlib import Path
PICTURE = {picture!r}
def work(done):
    with open("out/../work.txt", "a") as file:  # out/ is a link into HOME
        file.write(done + "\\n")
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the settings of who runs this, nor a network."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def notebook(**settings: object) -> NotebookNode:
    """Return the notebook with other settings in its first cell."""
    cells = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in cells.cells if cell.metadata.get("tags") == ["parameters"])
    first.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    return cells


@contextmanager
def kernel(cells: NotebookNode, folder: Path) -> Iterator[NotebookClient]:
    """Start a kernel in a folder of its own, and kill it in the end."""
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(cells, timeout=HANG_S, resources=resources, shutdown_kernel="immediate")
    with client.setup_kernel():
        yield client


def code(cells: NotebookNode) -> list[tuple[int, NotebookNode]]:
    return [(place, cell) for place, cell in enumerate(cells.cells) if cell.cell_type == "code"]


def pictures(cell: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def said(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_is_kept_without_what_it_printed_and_is_saved_so() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(cells)
    assert not any(cell.outputs or cell.execution_count for _, cell in code(cells))
    assert cells.metadata.colab["private_outputs"], "films of patients would be saved with it"


def test_the_readme_has_the_same_cells() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("\n### In Colab\n")[2].partition("\n### ")[0]
    blocks = [block.partition("```")[0].strip() for block in section.split("```python\n")[1:]]
    assert blocks == [cell.source for _, cell in code(nbformat.read(NOTEBOOK, as_version=4))]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packages that pip works on, with the one of Colab's that peft refuses."""
    venv.create(tmp_path / "colab", with_pip=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    monkeypatch.setenv("PIP_PYTHON", str(tmp_path / "colab" / "bin" / "python"))
    folder = next((tmp_path / "colab").glob("lib/python*/site-packages"))
    fake_package(folder, "torchao", "0.10.0")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Settings for a repository of stubs and an empty HOME."""
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    head = HEAD.format(picture=str(ROOT / "assets" / "cxr-tiny" / "samples.png"))
    for name, text in STUBS.items():
        (repository / name).write_text(head + text)
    (repository / "requirements.txt").touch()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "stubs"]):
        subprocess.run([*git, *command], check=True)
    return {"REPOSITORY": f"file://{repository}", "HOME": str(tmp_path / "home"), "TRAINING": "--rank 2"}


def test_whatever_cell_it_is_cut_off_behind_nothing_is_done_twice(settings: dict[str, str], tmp_path: Path) -> None:
    stages, shown = ["films", "training", "images", "figures"], [0, 1, 1, 2]
    for number in (1, 2, 3, 4):  # stages until the kernel is killed
        machine, opened = tmp_path / "machine", notebook(**settings)
        cells = code(opened)[: len(code(opened)) - len(stages) + number]
        with kernel(opened, machine) as client:
            for place, cell in cells if number < 4 else [*cells, *cells[-4:]]:  # at last all once more
                client.execute_cell(cell, place)
        assert (tmp_path / "home" / "work.txt").read_text().split() == stages[:number]
        assert [pictures(cell) for _, cell in cells[-number:]] == shown[:number]
        shutil.rmtree(machine)  # with data/ and all else that HOME does not hold
    assert "evaluated before" in said(cells[-1][1])


def test_a_cell_that_fails_says_why_and_stops_those_below(
    settings: dict[str, str], packages: Path, tmp_path: Path
) -> None:
    opened, home = notebook(**settings), tmp_path / "home"
    home.mkdir()
    for name in ("films.tar", "dataset.json"):
        (home / name).touch()
    (home / "films.txt").write_text("--source nih")
    with kernel(opened, tmp_path / "machine") as client:
        *cells, films, training, _, _ = code(opened)
        for place, cell in cells:
            client.execute_cell(cell, place)
        assert not list(packages.glob("torchao*")), "the set-up leaves what stops training"
        assert "holds the films of --source nih" in why_it_fails(client, *films)
        assert "ended with status 2" in why_it_fails(client, *training)
        (home / "films.txt").write_text("--source demo")
        (home / "films.tar").write_text("half of one")
        why_it_fails(client, *films)
        assert "films.tar was not unpacked: if it is not whole, delete it" in said(films[1])
        data = tmp_path / "machine" / "checkout" / "data"  # left by another HOME
        data.mkdir()
        (data / "dataset.json").write_text("others")
        why_it_fails(client, *films)
        assert "data/ holds other films than HOME" in said(films[1])


def why_it_fails(client: NotebookClient, place: int, cell: NotebookNode) -> str:
    """Return what a cell that has to fail ends with."""
    cell.metadata.tags = ["raises-exception"]  # else the kernel would leave out what is sent soon after
    client.execute_cell(cell, place)
    return next(output.evalue for output in cell.outputs if output.output_type == "error")


def test_it_makes_films_and_figures_from_top_to_bottom(tmp_path: Path) -> None:
    folder, home = tmp_path / "machine", tmp_path / "home"
    opened = notebook(
        HOME=str(home),
        FILMS="--source demo --limit 45",
        TRAINING="--pretrained_model_name_or_path assets/cxr-tiny --resolution 64 --max_train_steps 2 --validation_steps 2 --max_validation_samples 2 --rank 2 "
        "--train_batch_size 4 --num_validation_images 0",
        PROMPTS=["Chest radiograph of a child."],
        SAMPLING="--num_images 1 --num_inference_steps 2",
        EVALUATION="--max_films 4 --num_inference_steps 2 --num_prompted 0",
    )
    with kernel(opened, folder) as client:
        for path in ROOT.iterdir():  # a checkout whose data/ and out/ are its own
            if path.suffix in (".py", ".txt") or path.name in ("assets", "launch", "utils"):
                (folder / path.name).symlink_to(path)
        for place, cell in code(opened):
            client.execute_cell(cell, place)
    cells = [cell for _, cell in code(opened)]
    assert "assets/cxr-tiny, as you name it" in said(cells[1])  # the hub is out of reach, on a GPU, too
    assert f"train with: {training_command(find_cards())} --fold 0" in said(cells[1])
    assert [pictures(cell) for cell in cells] == [0, 0, 0, 1, 1, 2]
    for made in ("films.tar", "out/fold0/README.md", "images/images.jsonl", "out/fold0/evaluation/report.html"):
        assert (home / made).is_file(), made
