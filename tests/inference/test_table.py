"""The table keeps one row per frame on every way out, and names what is wrong on the way in."""

import os
import resource

import numpy as np
import pytest

from mmau.inference import AUTable, read_table
from mmau.inference.table import TableError, join_faces
from mmau.registry import MissingDependencyError


def table_of(t=5, first=1, **options):
    rng = np.random.default_rng(t)
    valid = np.arange(t) % 3 > 0
    prob = rng.uniform(0, 1, (t, 2)).astype(np.float32)
    return AUTable(
        au_names=("AU1", "AU12"),
        timestamps=np.arange(t) / 7,
        valid=valid,
        confidence=np.where(valid, 0.875, 0.0),
        probability=prob,
        active=prob >= 0.5,
        frames=np.arange(first, first + t),
        **options,
    )


def test_csv_round_trip(tmp_path):
    table = table_of()
    path = table.write_csv(tmp_path / "deep" / "table.csv")
    first = path.read_text().splitlines()[:2]
    assert first[0] == "frame,timestamp,valid,confidence,AU1,AU12,AU1_c,AU12_c"
    assert first[1].startswith("1,0.000000,0,0.0000,0.")
    again = read_table(path)
    assert again.au_names == table.au_names
    np.testing.assert_allclose(again.probability, table.probability, atol=6e-6)
    np.testing.assert_allclose(again.timestamps, table.timestamps, atol=6e-7)
    np.testing.assert_array_equal(again.active, table.active)
    np.testing.assert_array_equal(again.valid, table.valid)
    np.testing.assert_array_equal(again.frames, table.frames)
    assert again.face_id is None


def test_people_are_a_column(tmp_path):
    both = join_faces(
        [table_of(3, notes=("cut", "late")), table_of(2, first=2, notes=("cut",))], [0, 4]
    )
    assert both.columns[:3] == ("frame", "face_id", "timestamp")
    assert both.face_id.tolist() == [0, 0, 0, 4, 4]
    assert both.frames.tolist() == [1, 2, 3, 2, 3]
    assert both.notes == ("cut", "person 0: late")
    again = read_table(both.write_csv(tmp_path / "both.csv"))
    np.testing.assert_array_equal(again.face_id, both.face_id)
    one = both.rows_of(4)
    assert one.face_id is None
    np.testing.assert_array_equal(one.probability, table_of(2).probability)
    assert table_of().rows_of(0).frames.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"no person 1 in this table; it has \[0, 4\]"):
        both.rows_of(1)


def test_pandas_and_arrow_have_the_columns_of_the_file():
    table = table_of()
    frame = table.to_pandas()
    assert tuple(frame.columns) == table.columns
    assert frame["AU12_c"].tolist() == table.active[:, 1].astype(int).tolist()
    arrow = table.to_arrow()
    assert tuple(arrow.schema.names) == table.columns
    np.testing.assert_array_equal(arrow["AU1"].to_numpy(), table.probability[:, 0])


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
def test_without_the_library_the_extra_is_named(monkeypatch, library):
    def absent(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("importlib.import_module", absent)
    convert = table_of().to_pandas if library == "pandas" else table_of().to_arrow
    with pytest.raises(MissingDependencyError, match=rf"'{library}'.*mmau\[tables\]"):
        convert()


def test_a_full_disk_leaves_no_half_table(tmp_path):
    """The limit makes the system refuse to write on, as a full disk does."""
    path = tmp_path / "table.csv"
    path.write_text("the table of last week\n")
    table = table_of(2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            table.write_csv(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "the table of last week\n"
    assert os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a CSV table of predictions"),
        ("a,b\n1,2\n", "it lacks frame, timestamp, valid, confidence"),
        ("frame,timestamp,valid,confidence,AU1\n", "lacks a pair of columns such as AU12, AU12_c"),
        (
            "frame,timestamp,valid,confidence,AU1,AU1_c\n1,0,1,1,high,1\n",
            "something other than numbers",
        ),
        ("frame,timestamp,valid,confidence,AU1,AU1_c\n1,0,1\n", "other than numbers"),
    ],
)
def test_other_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(TableError, match=sentence) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_missing_file_and_unequal_columns():
    with pytest.raises(FileNotFoundError, match=r"no such table of predictions: no/such\.csv"):
        read_table("no/such.csv")
    with pytest.raises(ValueError, match=r"`valid` must have one row .* 5 timestamps; got 4"):
        AUTable(("AU1",), np.arange(5.0), np.ones(4, bool), *[np.zeros((5, 1))] * 3)
