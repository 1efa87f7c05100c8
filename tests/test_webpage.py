"""The page: what it offers, what it asks of the drawing, what it shows; in a browser where there is one."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from utils.checkpoint import BEST_NAME
from utils.refusal import Refused
from utils.release import WEIGHTS_NAME
from utils.webpage import NO_ADAPTER, Wish, build_page, find_adapters

FIRST = Wish("A film.", "", None, 1.0, 0, 2, 4.0, 25)


def adapters(out: Path) -> Path:
    for name in ("fold0", "fold1", "not_a_run"):
        (out / name).mkdir(parents=True)
    for name in ("fold0", "fold1"):
        (out / name / WEIGHTS_NAME).write_bytes(b"")
        (out / name / "checkpoint-9").mkdir()
        (out / name / "checkpoint-9" / BEST_NAME).write_bytes(b"")
    return out


def test_adapters_are_found_by_run_by_folder_of_runs_and_by_file(tmp_path: Path) -> None:
    out = adapters(tmp_path / "out")
    assert list(find_adapters([out]).values()) == [out / "fold0", out / "fold1"]
    assert out / "fold1" in find_adapters([out / "fold1"]).values()
    (out / "fold0" / "vae_decoder.safetensors").write_bytes(b"")
    assert list(find_adapters([out / "fold0"]).values()) == [out / "fold0"]
    assert list(find_adapters([out / "fold0" / WEIGHTS_NAME]).values()) == [out / "fold0" / WEIGHTS_NAME]
    assert find_adapters([tmp_path / "nowhere"]) == {}
    assert list(find_adapters([tmp_path]).values()) == [out / "fold0", out / "fold1"], "also of runs a folder below"


def test_without_gradio_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(Refused, match="pip install -r requirements-page.txt"):
        build_page(lambda wish: ({}, []), [], FIRST)


class Drawing:
    """Stands for the models: grey images, and every wish remembered."""

    def __init__(self, folder: Path):
        self.folder, self.wishes = folder, []

    def __call__(self, wish: Wish) -> tuple[dict[Path, list[str]], list[str]]:
        if wish.seed == 13:
            raise Refused("an unlucky number")
        self.wishes.append(wish)
        paths = [self.folder / f"{len(self.wishes)}_{j}.png" for j in range(wish.num_images)]
        for path in paths:
            Image.new("L", (64, 64), 40 * len(self.wishes)).save(path)
        return {path: ["blank"] * j for j, path in enumerate(paths)}, ["too long"]  # the second is flagged


@pytest.fixture
def served(tmp_path: Path):
    """An open page over two adapters, and what it asked for."""
    pytest.importorskip("gradio")
    drawing = Drawing(tmp_path)
    page = build_page(drawing, [adapters(tmp_path / "out")], FIRST)
    page.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(tmp_path)])
    yield page, drawing
    page.close()


def test_base_and_adapter_draw_from_the_same_noise(served, tmp_path: Path) -> None:
    page, drawing = served
    client = pytest.importorskip("gradio_client").Client(page.local_url, verbose=False)
    adapter = str(tmp_path / "out" / "fold1")
    by_base, by_adapter, files, noted = client.predict(
        "PA film.", adapter, 7, 3.5, 2, "blurred", 9, 0.8, api_name="/generate"
    )
    base, adapted = drawing.wishes
    assert adapted == Wish("PA film.", "blurred", Path(adapter), 0.8, 7, 2, 3.5, 9)
    assert base == Wish(**vars(adapted) | {"lora_scale": 0.0})
    assert (
        [image["caption"] for image in by_base]
        == [image["caption"] for image in by_adapter]
        == ["seed 7", "seed 8, blank"]
    )
    assert (len(files), noted) == (4, "too long")
    alone = client.predict("PA film.", NO_ADAPTER, 0, 4.0, 1, "", 5, 1.0, api_name="/generate")
    assert (len(alone[0]), alone[1], drawing.wishes[-1].lora) == (1, [], None)
    for prompt, seed, message in ((" ", 7, "no prompt"), ("PA film.", 13, "an unlucky number")):
        with pytest.raises(Exception, match=message):
            client.predict(prompt, adapter, seed, 3.5, 2, "", 9, 0.8, api_name="/generate")


def test_in_a_browser(served, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser")
    page, drawing = served
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(page.local_url)
        tab.get_by_label("Prompt", exact=True).fill("PA film, typed.")
        tab.get_by_role("button", name="Generate").click()
        tab.locator("#with_adapter img").first.wait_for(timeout=60_000)
        assert [wish.prompt for wish in drawing.wishes] == ["PA film, typed."] * 2
        tab.get_by_label("Adapter", exact=True).click()
        tab.get_by_role("option", name="fold1").click()
        tab.get_by_role("button", name="Generate").click()
        for _ in range(600):
            if len(drawing.wishes) == 4:
                break
            tab.wait_for_timeout(100)
        assert drawing.wishes[-1].lora == tmp_path / "out" / "fold1"
        tab.get_by_label("Prompt", exact=True).fill("")
        tab.get_by_role("button", name="Generate").click()
        tab.get_by_text("no prompt; describe a film").first.wait_for(timeout=60_000)
        browser.close()
