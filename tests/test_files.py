"""Nothing half-written ever stands under a final name."""

import pytest

from mmau._files import atomic_dir, atomic_write


def write_half(path):
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError("disk full")


def fill_half(path):
    with atomic_dir(path) as partial:
        (partial / "third").touch()
        raise RuntimeError("disk full")


def test_failure_leaves_the_old_file_and_no_partial_one(tmp_path):
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half(target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "checkpoint"
    for name in ("first", "second"):
        with atomic_dir(target) as partial:
            (partial / name).touch()
    assert [p.name for p in target.iterdir()] == ["second"]
    with pytest.raises(RuntimeError, match="disk full"):
        fill_half(target)
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
