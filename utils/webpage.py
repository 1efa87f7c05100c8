"""The page of `generate.py --serve`: a prompt in, films by the base and by an adapter out, side by side. No torch."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.refusal import Refused
from utils.release import WEIGHTS_NAME

TITLE = "Text in, synthetic chest radiograph out"
WHAT_IT_IS_NOT = "Made by a diffusion model from text. **Not for diagnosis**, screening or any clinical decision."
EXAMPLES = (
    "PA chest radiograph of a 60-year-old man. Cardiomegaly.",
    "AP chest radiograph of a 45-year-old woman. Effusion and pneumonia.",
    "PA chest radiograph of a 30-year-old woman. No acute finding.",
)
NO_ADAPTER = "none, the base alone"
MOST_IMAGES = 8  # at a time


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for: the fields are flags of generate.py."""

    prompt: str
    negative_prompt: str
    lora: Path | None
    lora_scale: float
    seed: int
    num_images: int
    guidance_scale: float
    num_inference_steps: int


def find_adapters(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the adapters of some runs' folders and of folders of runs, by the name they are offered under."""
    found = []
    for path in folders:
        is_one = path.suffix == ".safetensors" or (path / WEIGHTS_NAME).is_file()
        levels = ("*", "*/*")  # such as out/fold2 and out/quickstart/fold0
        runs = sorted(file.parent for level in levels for file in path.glob(f"{level}/{WEIGHTS_NAME}"))
        found += [path] if is_one else runs
    return {str(path): path for path in found}


def build_page(draw: Callable[[Wish], tuple[dict[Path, list[str]], list[str]]], folders: Sequence[Path], first: Wish):
    """Return the page, a `gradio.Blocks`.

    Args:
        draw: returns the PNGs that were asked for, each with what quality control found wrong with it, and notes.
        folders: where adapters are looked for, each time that the page is opened.
        first: what the page shows when it is opened.

    Raises:
        Refused: without gradio.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
    try:
        import gradio
    except ImportError as error:
        raise Refused(f"--serve needs gradio ({error}): pip install -r requirements-page.txt") from error

    def offered() -> list[str]:
        return [*find_adapters(folders), NO_ADAPTER]

    def answer(
        prompt,
        adapter,
        seed,
        guidance,
        count,
        negative,
        steps,
        scale,
        progress=gradio.Progress(track_tqdm=True),  # noqa: B008, gradio looks for it there
    ):
        if not prompt.strip():
            raise gradio.Error(f"no prompt; describe a film, such as: {EXAMPLES[0]}", print_exception=False)
        chosen = find_adapters(folders).get(adapter)
        wish = Wish(prompt, negative, chosen, scale, int(seed or 0), int(count), guidance, int(steps))
        try:
            by_base, notes = draw(Wish(**vars(wish) | {"lora_scale": 0.0}))
            by_adapter = draw(wish)[0] if chosen else {}
        except Refused as refusal:
            raise gradio.Error(str(refusal), print_exception=False) from refusal
        captioned = [
            [(str(path), ", ".join([f"seed {wish.seed + j}", *flags])) for j, (path, flags) in enumerate(part.items())]
            for part in (by_base, by_adapter)
        ]
        return *captioned, list(map(str, [*by_base, *by_adapter])), "\n\n".join(notes)

    with gradio.Blocks(title=TITLE) as page:
        gradio.Markdown(f"# {TITLE}\n{WHAT_IT_IS_NOT}")
        with gradio.Row():
            with gradio.Column(scale=2):
                prompt = gradio.Textbox(first.prompt, label="Prompt", lines=3)
                choices = offered()
                adapter = gradio.Dropdown(choices, value=choices[0], label="Adapter")
                with gradio.Row():
                    seed = gradio.Number(first.seed, label="Seed", precision=0, minimum=0)
                    count = gradio.Slider(1, MOST_IMAGES, first.num_images, step=1, label="Images")
                guidance = gradio.Slider(
                    1,
                    max(8, first.guidance_scale),
                    first.guidance_scale,
                    step=0.5,
                    label="Guidance (3 to 4 for films)",
                )
                with gradio.Accordion("More", open=False):
                    negative = gradio.Textbox(first.negative_prompt, label="Negative prompt")
                    steps = gradio.Slider(
                        1, max(100, first.num_inference_steps), first.num_inference_steps, step=1, label="Solver steps"
                    )
                    scale = gradio.Slider(
                        0, max(1.5, first.lora_scale), first.lora_scale, step=0.05, label="Weight of the adapter"
                    )
                button = gradio.Button("Generate", variant="primary")
                gradio.Examples([[example] for example in EXAMPLES], [prompt])
            with gradio.Column(scale=3):
                shown = dict(columns=2, object_fit="contain", height="auto", format="png", interactive=False)
                by_base = gradio.Gallery(label="The base alone, same noise", elem_id="base", **shown)
                by_adapter = gradio.Gallery(label="With the adapter", elem_id="with_adapter", **shown)
                noted = gradio.Markdown()
                files = gradio.File(
                    label="Download: each PNG says how it was made", file_count="multiple", interactive=False
                )
        asked = [prompt, adapter, seed, guidance, count, negative, steps, scale]
        gradio.on(
            [button.click, prompt.submit], answer, asked, [by_base, by_adapter, files, noted], api_name="generate"
        )
        page.load(lambda: gradio.update(choices=offered()), outputs=adapter, api_name=False)
    return page
