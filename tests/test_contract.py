"""The house rules: which way imports go, what stands in the scripts, what every script does with bad input."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_lora
from tests.conftest import ROOT
from utils.refusal import run

SCRIPTS = ("download", "train_lora", "generate", "evaluate")
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchmetrics", "bitsandbytes", "xformers"}
LAYERS = {
    0: {
        "archives", "captions", "card", "check", "dicom", "hub", "early_stopping", "fetch", "files", "films", "folds", "journal", "metadata", "mirror", "overview", "pages", "prompts", "provenance", "pseudonyms", "quiet", "transfer",
        "refusal", "release", "report", "reports", "runlog", "secondary_capture", "seeding", "subgroups", "webpage",
    },
    1: {"alignment", "audit", "boxes", "diffusion", "distances", "hardware", "images", "interrupt", "linear", "metrics", "realism", "unfinished"},
    2: {"checkpoint", "cross_validation", "decoder", "encoders", "export", "features", "figures", "findings", "kernels", "latents", "lora", "pipeline", "quality", "tokens", "validation"},
}  # fmt: skip
ALLOWED = {0: set(), 1: {"torch", "accelerate", "torchmetrics", "xformers", "bitsandbytes"}, 2: HEAVY}
MODULES = sorted(path for path in (ROOT / "utils").rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts)


def layer_of(name: str) -> int | None:
    if name.partition(".")[0] == "sources":
        return 0
    return next((layer for layer, names in LAYERS.items() if name in names), None)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    layer = layer_of(name_of(path))
    assert layer is not None, f"{path.name} has no layer: name it in LAYERS"
    for name in imported(path):
        root = name.split(".")[0]
        assert root not in SCRIPTS
        assert root not in HEAVY - ALLOWED[layer], f"{path.name} is in layer {layer} and imports {name}"
        if root == "utils" and layer_of(name.removeprefix("utils.")) is not None:
            assert layer_of(name.removeprefix("utils.")) <= layer


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_import_one_another(script: str) -> None:
    assert not imported(ROOT / f"{script}.py") & set(SCRIPTS)


def test_utils_collect_nothing() -> None:
    """Neither a drawer of odds and ends nor code that runs on import; and `utils` must stay clear of torch.hub."""
    assert not {"common", "misc", "helpers"} & {path.stem for path in MODULES}
    assert all(path.read_text() == "" for path in (ROOT / "utils").rglob("__init__.py"))
    assert not any("torch.hub" in path.read_text() for path in [*MODULES, *(ROOT / f"{s}.py" for s in SCRIPTS)])


def test_the_noise_prediction_step_is_written_out_in_the_script() -> None:
    tree = ast.parse((ROOT / "train_lora.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    targets = [target for node in ast.walk(main) if isinstance(node, ast.Assign) for target in node.targets]
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    names = {"latents", "noise", "timesteps", "noisy_latents", "encoder_hidden_states", "target", "model_pred", "loss"}
    assert names <= assigned


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse_args(["--help"])
    assert ended.value.code == 0
    usage, _, text = capsys.readouterr().out.partition("\n\n")
    assert "\n" not in usage, "seventy flags before the first word of what they are for"
    assert f"python {script}.py" in text or f"launch {script}.py" in text
    assert "--seed" in text
    actions = re.findall(r"^  --\w+.*(?:\n {10,}\S.*)*", text, re.MULTILINE)
    assert len(actions) > 5
    assert all(len(action.split(maxsplit=2)) == 3 for action in actions), "a flag without a word of help"


BAD_INPUT = [
    ("download", ["--source", "nih", "--mirror", "/nowhere"]),
    ("download", ["--source", "elsewhere"]),
    ("train_lora", ["--train_data_dir", "/nowhere"]),
    ("train_lora", ["--rank", "many"]),
    ("generate", ["--prompt", "x", "--lora", "/nowhere"]),
    ("generate", ["--no_such_flag"]),
    ("generate", ["--prompt", "x", "--scheduler", "magic"]),
    ("generate", ["--grid", "colour=red"]),
    ("evaluate", ["--lora", "/nowhere"]),
    ("evaluate", ["--cross_validation", "/nowhere"]),
]


@pytest.mark.parametrize(("script", "args"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(
    script: str, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
    assert run(module.main, module.parse_args) == 2
    stderr = capsys.readouterr().err
    assert re.fullmatch(rf"{script}\.py: [^\n]+\n", stderr), stderr
    assert list(tmp_path.iterdir()) == []


UNNEEDED = {"download": {"torch", "sklearn"}, "generate": {"torchmetrics", "matplotlib", "sklearn", "gradio"}}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_real_process_says_nothing_else(script: str, tmp_path: Path) -> None:
    """Not a word of what libraries print when they are imported; nor does it wait for those that it seldom needs."""
    args = next(args for name, args in BAD_INPUT if name == script and args)
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert len(said) == 1 and said[0].startswith(f"{script}.py: "), "\n".join(said)
    imports = [line.rpartition("|")[2] for line in lines if line not in said]
    names = [name.strip() for name in imports]
    assert "utils.refusal" in names
    for name in UNNEEDED.get(script, set()) & set(names):
        importers = who_imports(imports, names.index(name))
        # Early releases of transformers 5 import scikit-learn themselves
        assert any(importer.startswith("transformers.") for importer in importers), (name, importers)


def who_imports(imports: list[str], place: int) -> list[str]:
    """Return who was being imported when the module at `place` was, from -X importtime: outer ones later, less indented."""
    outer, depth = [], len(imports[place]) - len(imports[place].lstrip())
    for name in imports[place + 1 :]:
        if len(name) - len(name.lstrip()) < depth:
            depth = len(name) - len(name.lstrip())
            outer.append(name.strip())
    return outer


def test_figures_are_drawn_whatever_a_notebook_draws_with() -> None:
    assert all("utils.quiet" in imported(ROOT / f"{script}.py") for script in SCRIPTS)
    command = [sys.executable, "-c", "import download; from matplotlib.figure import Figure"]
    notebook = os.environ | {"MPLBACKEND": "one_of_its_own"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=notebook)
    assert done.returncode == 0, done.stderr


DIFFUSERS_FLAGS = """pretrained_model_name_or_path revision variant dataset_name train_data_dir image_column caption_column
validation_prompt num_validation_images validation_epochs max_train_samples output_dir cache_dir seed resolution
center_crop random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps snr_gamma use_8bit_adam allow_tf32
dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
prediction_type hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset rank
image_interpolation_mode"""


def test_flags_of_diffusers_own_script_are_all_known() -> None:
    assert set(DIFFUSERS_FLAGS.split()) <= set(vars(train_lora.parse_args([])))


def test_a_command_line_of_diffusers_documentation_is_understood() -> None:
    line = (
        "--pretrained_model_name_or_path=assets/cxr-tiny --dataset_name=data --caption_column=text --resolution=512 "
        "--random_flip --train_batch_size=1 --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04 "
        "--lr_scheduler=constant --lr_warmup_steps=0 --seed=42 --output_dir=sd-model-lora "
        "--validation_prompt=chest --report_to=wandb"
    )
    args = train_lora.parse_args(line.split())
    assert args.train_data_dir == "data"
    assert args.max_train_steps is None  # epochs decide
    assert args.learning_rate == 1e-4


def test_requirements_name_the_packages_and_constraints_pin_them() -> None:
    wanted = re.findall(r"^([a-z_\d-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    pinned = re.findall(r"^([A-Za-z_\d-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    core = {"torch", "accelerate", "diffusers", "transformers", "peft", "bitsandbytes", "xformers", "torchmetrics"}
    assert core | {"scikit-learn", "pillow", "tqdm"} <= set(wanted)
    assert {name.lower().replace("-", "_") for name in wanted} <= {name.lower().replace("-", "_") for name in pinned}


def test_the_bundled_base_is_a_stable_diffusion_in_safetensors() -> None:
    folder = ROOT / "assets" / "cxr-tiny"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    files = [path for path in (ROOT / "assets").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 32e6
