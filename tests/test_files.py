"""Files are whole or absent, and equal values give equal bytes."""

import errno
import fcntl
import hashlib
import os

import pytest

from utils.files import (
    append_jsonl,
    canonical_json,
    hold_lock,
    read_jsonl,
    require_writable,
    sha256_file,
    write_bytes,
    write_jsonl,
)


def test_canonical_json_does_not_depend_on_key_order():
    assert canonical_json({"b": [1, {"d": 1, "c": 2}], "a": "ü"}) == '{"a":"ü","b":[1,{"c":2,"d":1}]}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_sha256_of_a_file_longer_than_one_block(tmp_path):
    content = bytes(range(256)) * 8192  # 2 MiB
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path):
    write_bytes(tmp_path / "a" / "b.txt", b"old")
    write_bytes(tmp_path / "a" / "b.txt", b"new")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "rows.jsonl", [{"a": float("inf")}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]


def test_a_disk_that_fills_names_the_file(tmp_path, monkeypatch):
    def fill(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    for write in (lambda path: write_bytes(path, b"new"), lambda path: append_jsonl(path, [{}])):
        with pytest.raises(OSError, match="No space left on device: .*file"):
            write(tmp_path / "file")


def test_a_folder_is_tried_without_a_trace(tmp_path):
    require_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/folder"):
        require_writable(tmp_path / "file" / "folder")


def test_rows_survive_writing_appending_and_reading(tmp_path):
    rows = [{"text": "line\u2028separator", "n": None}, {"text": "line\nbreak"}]
    write_jsonl(tmp_path / "rows.jsonl", rows[:1])
    append_jsonl(tmp_path / "rows.jsonl", rows[1:])
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_torn_last_line_is_left_out_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": \n{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_jsonl(path)


def test_a_lock_is_held_once_and_missed_with_a_warning_where_there_are_none(tmp_path, monkeypatch):
    with hold_lock(tmp_path / "lock"):
        assert hold_lock(tmp_path / "lock") is None

    def flock(file, operation):
        raise OSError(number, "no luck")

    monkeypatch.setattr(fcntl, "flock", flock)
    number = errno.ENOSYS  # a cluster's file system mounted without locks
    with pytest.warns(UserWarning, match="has no locks"), hold_lock(tmp_path / "lock") as lock:
        assert lock is not None
    number = errno.EIO
    with pytest.raises(OSError, match="no luck"):
        hold_lock(tmp_path / "lock")
