"""What is to be drawn: prompts and what is known of them, from a command line, a file, a grid or a fold."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils.captions import VIEW_NAMES, caption
from utils.metadata import MAX_AGE, NO_FINDING, SEXES, findings_list, parse_table
from utils.refusal import Refused

LABELS = ("findings", "view", "age", "sex")  # columns of a table that go along with a prompt
AXES = {
    "findings": "none, effusion+cardiomegaly",
    "view": ", ".join(VIEW_NAMES),
    "age": f"0 to {MAX_AGE}",
    "sex": "M, F",
}
MAX_SEED = 2**62  # seeds of images count on from it
MOST_WORDS = 1_000  # a report has some fifty, a text encoder reads some fifty


@dataclass(frozen=True)
class Prompt:
    """What a film is drawn from.

    Attributes:
        text: of the film.
        negative: what guidance leads away from, "" for nothing.
        seed: noise of its first film, None where the command says.
        labels: what the text asserts, as in a data set's table, under some of LABELS.
    """

    text: str
    negative: str = ""
    seed: int | None = None
    labels: dict = field(default_factory=dict, compare=False)


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file.

    A `.csv` or `.jsonl` table has them in a column `prompt`, or else `text`, so that a data set's `metadata.jsonl` serves as
    well; columns `negative_prompt` and `seed` are heeded where there are any, and LABELS kept. A file in `.txt`, or without a
    suffix, has a prompt a line.

    Raises:
        Refused: for a file that is none of these, naming the line.
    """
    forms, suffix = "a .txt with a prompt a line, a .csv or a .jsonl table", path.suffix.lower()
    if not path.is_file():
        raise Refused(f"no prompts at {path}; expected {forms}")
    if suffix not in (".txt", "", ".csv", ".jsonl"):
        raise Refused(f"--prompts_file {path} is a {suffix}; expected {forms}")
    if suffix in (".txt", ""):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Refused(f"{path} is no text file in UTF-8 ({error.reason})") from error
        return [Prompt(line.strip()) for line in lines if line.strip()]
    rows = parse_table(path.name.lower(), path.read_bytes(), ())
    columns = set().union(*rows)
    column = next((name for name in ("prompt", "text") if name in columns), None)
    if column is None:
        raise Refused(f"{path} has neither a column prompt nor one text; it has {', '.join(sorted(columns))}")
    return [prompt_of(row, column, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def prompt_of(row: dict, column: str, where: str) -> Prompt:
    """Return a table's row as a prompt.

    Args:
        row: cells by column.
        column: has the text.
        where: it stands, for messages.

    Raises:
        Refused: for a row without text, or with a seed that is none.
    """
    text, negative, seed = row.get(column), row.get("negative_prompt"), row.get("seed")
    if not isinstance(text, str) or not text.strip():
        raise Refused(f"{where}: {column} {text!r}; expected the text of a film")
    if not (negative is None or isinstance(negative, str)):
        raise Refused(f"{where}: negative_prompt {negative!r}; expected a text, or none")
    if seed in (None, ""):
        seed = None
    elif isinstance(seed, bool) or not str(seed).isdecimal():
        raise Refused(f"{where}: seed {seed!r}; expected a whole number from 0 on")
    return Prompt(text.strip(), (negative or "").strip(), None if seed is None else int(seed), labels_of(row))


def labels_of(row: dict) -> dict:
    """Return what a table's row says under LABELS, in one form: findings as a list, age as a number; the rest is left out."""
    labels = {name: row[name] for name in LABELS if row.get(name) not in (None, "")}
    if "findings" in labels:
        labels["findings"] = findings_list(labels["findings"])
    for name in {"view", "sex"} & labels.keys():
        labels[name] = str(labels[name]).upper()
    if "sex" in labels:
        labels["sex"] = SEXES.get(labels["sex"], labels["sex"])
    age = str(labels.pop("age", "")).removesuffix(".0")  # as pandas writes a column with gaps
    if age.isdecimal() and int(age) <= MAX_AGE:
        labels["age"] = int(age)
    return labels


def grid_prompts(axes: Sequence[str]) -> list[Prompt]:
    """Return a prompt for every combination of some findings, views, ages and sexes, the last axis varying fastest.

    Args:
        axes: "findings=none,pneumonia,effusion+cardiomegaly", "view=PA,AP", "age=30,60", "sex=M,F", some of them; what has
            no axis is left out of the captions.

    Raises:
        Refused: for an axis or a value that is none.
    """
    values: dict[str, list] = {}
    for axis in axes:
        name, _, listed = axis.partition("=")
        if name not in AXES or name in values:
            raise Refused(f"--grid {axis!r}; expected each of {', '.join(AXES)} at most once, such as view=PA,AP")
        values[name] = [axis_value(name, word.strip()) for word in listed.split(",")]
    combinations = (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))
    return [
        Prompt(
            caption(labels.get("view"), labels.get("age"), labels.get("sex"), labels.get("findings")), labels=labels
        )
        for labels in combinations
    ]


def axis_value(name: str, word: str) -> str | int | list[str]:
    """Return one value of an axis: findings as a list, an age as a number."""
    refusal = Refused(f"--grid {name}={word!r}; expected {AXES[name]}")
    if name == "findings":
        if not word or "" in (parts := [part.strip() for part in word.split("+")]):
            raise refusal
        if word.casefold() in NO_FINDING:
            return []
        if any(part.casefold() in NO_FINDING for part in parts):
            raise refusal
        return parts
    if name == "age":
        if not word.isdecimal() or int(word) > MAX_AGE:
            raise refusal
        return int(word)
    if word.upper() not in (VIEW_NAMES if name == "view" else ("M", "F")):
        raise refusal
    return word.upper()


def check_prompts(prompts: Iterable[Prompt], own_noise: bool = False) -> list[Prompt]:
    """Return the prompts, each once, with all that is known of it; where two differ, the first holds.

    Text that is a caption of a held-out fold is one in every prompt that has it.

    Args:
        prompts: as they were given.
        own_noise: every image has other noise, so that equal prompts without a seed are different images: all are kept.

    Raises:
        Refused: where there is none, and for one that is no caption but a document.
    """
    kept: dict[tuple, Prompt] = {}
    held_out = set()
    for number, prompt in enumerate(prompts):
        key = (prompt, number if own_noise and prompt.seed is None else None)
        first = kept.setdefault(key, prompt)
        kept[key] = replace(first, labels=prompt.labels | first.labels)
        if prompt.labels.get("held_out"):
            held_out.add(prompt.text)
    if not kept:
        raise Refused('no prompt; expected --prompt "PA chest radiograph of a 60-year-old man. Cardiomegaly."')
    for prompt in kept.values():
        try:
            (prompt.text + prompt.negative).encode()
        except UnicodeEncodeError as error:
            raise Refused(f"a prompt that is no text in UTF-8 ({error.reason}), {prompt.text[:40]!r}") from error
        if prompt.seed is not None and prompt.seed > MAX_SEED:
            raise Refused(f"a prompt with seed {prompt.seed}; expected at most {MAX_SEED}")
        words = max(len(text.split()) for text in (prompt.text, prompt.negative))
        if words > MOST_WORDS:
            raise Refused(
                f"a prompt of {words} words, which begins {prompt.text[:40]!r}; expected at most {MOST_WORDS}: a text "
                "encoder reads some fifty"
            )
    marks = {text: {"held_out": True} for text in held_out}
    return [replace(prompt, labels=prompt.labels | marks.get(prompt.text, {})) for prompt in kept.values()]
