"""What an evaluation had made before it was cut off: taken for what it is, and for nothing else. Hermetic."""

from pathlib import Path

import torch

from utils.unfinished import forget, keep


def test_what_was_left_is_not_taken_for_something_else(tmp_path: Path) -> None:
    def ones() -> dict[str, torch.Tensor]:
        return {"b": torch.ones(2), "a": torch.ones(1)}

    def twos() -> dict[str, torch.Tensor]:
        return {"a": torch.full((1,), 2.0)}

    made = keep(tmp_path, ["adapter 1"], "films, base", ["caption"], ones)
    assert list(made) == ["a", "b"] == list(keep(tmp_path, ["adapter 1"], "films, base", ["caption"], twos))
    assert keep(tmp_path, ["adapter 1"], "films, base", ["another"], twos)["a"] == 2
    assert keep(tmp_path, ["adapter 2"], "films, base", ["another"], ones)["a"] == 1
    (tmp_path / "unfinished-films-base.safetensors").write_bytes(b"half of it")
    assert keep(tmp_path, ["adapter 2"], "films, base", ["another"], twos)["a"] == 2
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
