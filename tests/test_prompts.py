"""Prompts: every kind of file they come from, grids of labels, and what is refused."""

import json
from pathlib import Path

import pytest

from utils.prompts import MOST_WORDS, Prompt, check_prompts, grid_prompts, read_prompts
from utils.refusal import Refused


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    for name in ("prompts.TXT", "prompts"):
        path = tmp_path / name
        path.write_text("\ufeff  PA film of a man. \n\nAP film.\n", encoding="utf-8")
        assert read_prompts(path) == [Prompt("PA film of a man."), Prompt("AP film.")]


def test_a_table_keeps_seed_negative_prompt_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "prompts.CSV"
    path.write_text(
        "text,seed,negative_prompt,findings,age,sex,view,patient_id\n"
        '"PA film, upright.",7,blurred,Edema|Effusion,40.0,Male,pa,secret\n"AP film.",,,,400,,,\n'
    )
    one, other = read_prompts(path)
    assert (one.text, one.seed, one.negative) == ("PA film, upright.", 7, "blurred")
    assert one.labels == {"findings": ["Edema", "Effusion"], "view": "PA", "age": 40, "sex": "M"}
    assert (other, other.labels) == (Prompt("AP film."), {})


def test_a_data_set_s_own_table_serves(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "PA film.", "patient_id": "p1", "findings": [], "age": 0, "sex": None},
        {"file_name": "b.png", "text": "AP film.", "patient_id": "p2", "findings": None, "view": "AP"},
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.labels for prompt in read_prompts(path)] == [{"findings": [], "age": 0}, {"view": "AP"}]


def test_a_column_prompt_goes_before_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a caption", "prompt": "a prompt"}\n')
    assert read_prompts(path) == [Prompt("a prompt")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no prompts at .*none.txt"),
        ("list.json", b'["a", "b"]\n', "list.json is a .json; expected a .txt .* a .csv or a .jsonl"),
        ("table.tsv", b"prompt\tseed\na\t1\n", "table.tsv is a .tsv"),
        ("latin.txt", "Überlagerung".encode("latin-1"), "no text file in UTF-8"),
        ("columns.csv", b"caption,seed\na,1\n", "neither a column prompt nor one text; it has caption, seed"),
        ("seed.csv", b"prompt,seed\na,-1\n", "row 1: seed '-1'"),
        ("seed.jsonl", b'{"prompt": "a", "seed": true}\n', "row 1: seed True"),
        ("empty.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "row 2: prompt ' '"),
        ("number.jsonl", b'{"prompt": 5}\n', "row 1: prompt 5"),
        ("negative.jsonl", b'{"prompt": "a", "negative_prompt": 5}\n', "row 1: negative_prompt 5"),
        ("torn.jsonl", b'{"prompt": "a"\n', "line 1: not a JSON object"),
        ("void.csv", b"prompt\n", "no rows"),
    ],
)
def test_a_file_that_is_none_is_refused_in_words(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=message):
        read_prompts(tmp_path / name)


def test_a_grid_says_every_combination_as_captions_do() -> None:
    prompts = grid_prompts(["view=PA, ap", "findings=none,effusion+Cardiomegaly", "age=8", "sex=f"])
    assert [prompt.text for prompt in prompts] == [
        "PA chest radiograph of an 8-year-old girl. No acute finding.",
        "PA chest radiograph of an 8-year-old girl. Cardiomegaly and effusion.",
        "AP chest radiograph of an 8-year-old girl. No acute finding.",
        "AP chest radiograph of an 8-year-old girl. Cardiomegaly and effusion.",
    ]
    assert prompts[1].labels == {"view": "PA", "findings": ["effusion", "Cardiomegaly"], "age": 8, "sex": "F"}
    assert [prompt.text for prompt in grid_prompts(["sex=M"])] == ["Chest radiograph of a man."]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("colour=red", "'colour=red'; expected each of findings, view, age, sex"),
        ("view", "view=''"),
        ("view=PA,oblique", "view='oblique'; expected PA, AP"),
        ("age=forty", "age='forty'; expected 0 to"),
        ("age=400", "age='400'"),
        ("sex=", "sex=''; expected M, F"),
        ("findings=a++b", r"findings='a\+\+b'"),
        ("findings=a+none", r"findings='a\+none'"),
    ],
)
def test_an_axis_that_is_none_is_refused_in_words(axis: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        grid_prompts([axis])
    with pytest.raises(Refused, match="at most once"):
        grid_prompts(["age=1", "age=2"])


def test_each_prompt_is_drawn_once_and_documents_are_refused() -> None:
    same = Prompt("a", labels={"sex": "M"}), Prompt("a"), Prompt("a", seed=1), Prompt("a", negative="b")
    assert check_prompts(same) == [same[0], same[2], same[3]]
    with pytest.raises(Refused, match="no prompt"):
        check_prompts([])
    with pytest.raises(Refused, match="a prompt of 10000 words"):
        check_prompts([Prompt("word " * 10_000)])
    with pytest.raises(Refused, match="no text in UTF-8"):
        check_prompts([Prompt("film \udcff")])
    with pytest.raises(Refused, match="seed 18446744073709551616"):
        check_prompts([Prompt("film", seed=2**64)])
    assert check_prompts([Prompt("word " * MOST_WORDS)])


def test_equal_prompts_share_what_is_known_of_them_and_what_was_held_out_stays_so() -> None:
    typed, in_grid = Prompt("a"), Prompt("a", labels={"sex": "M", "age": 1})
    held_out = Prompt("a", labels={"age": 2, "held_out": True})
    assert [prompt.labels for prompt in check_prompts([typed, in_grid])] == [in_grid.labels]
    seeded, away, other = Prompt("a", seed=1, labels={"view": "PA"}), Prompt("a", negative="b"), Prompt("b")
    labels = [prompt.labels for prompt in check_prompts([typed, seeded, away, other, in_grid, held_out])]
    assert labels == [in_grid.labels | {"held_out": True}, {"view": "PA", "held_out": True}, {"held_out": True}, {}]
    own = [prompt.labels for prompt in check_prompts([typed, in_grid, held_out], own_noise=True)]
    assert own == [{"held_out": True}, in_grid.labels | {"held_out": True}, held_out.labels]


def test_with_noise_of_their_own_equal_prompts_are_different_images() -> None:
    prompts = [Prompt("a"), Prompt("b"), Prompt("a"), Prompt("a", seed=1), Prompt("a", seed=1)]
    assert check_prompts(prompts, own_noise=True) == prompts[:4]
    assert check_prompts(prompts) == [prompts[0], prompts[1], prompts[3]]
