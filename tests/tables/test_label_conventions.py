import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import AnnotationError
from mmau.tables.label_conventions import (
    NumberedLabels,
    labels_from_intensity,
    labels_from_occurrence,
    read_bp4d,
    read_disfa,
)


@given(codes=st.lists(st.sampled_from([0, 1, 9, 999, -1])))
def test_occurrence_codes(codes):
    labels = labels_from_occurrence(codes)
    assert labels.dtype == np.int8
    assert labels.tolist() == [code if code in (0, 1) else -1 for code in codes]


@given(codes=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9, 999, -1])), limit=st.integers(1, 5))
def test_intensities(codes, limit):
    labels = labels_from_intensity(codes, present_from=limit)
    assert labels.tolist() == [int(c >= limit) if 0 <= c <= 5 else -1 for c in codes]


def test_two_of_five_is_present_unless_said_otherwise():
    assert labels_from_intensity([[0, 1], [2, 5]]).tolist() == [[0, 0], [1, 1]]
    assert labels_from_intensity(np.array([0.0, 3.0])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: labels_from_occurrence([0, 2]), r"0, 1 or a code for unknown \(-1, 9, 999\); got"),
        (lambda: labels_from_occurrence([9], unknown=()), r"unknown \(-1\); got 9"),
        (lambda: labels_from_occurrence([0.5]), "`values` must be whole numbers; got float64 with"),
        (lambda: labels_from_intensity([6]), "must be intensities 0 to 5 or a code .* got 6"),
        (lambda: labels_from_intensity([-2]), "got -2"),
        (lambda: labels_from_intensity([1], present_from=0), "`present_from` must be in"),
    ],
)
def test_nothing_is_guessed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------- files
def test_bp4d_keeps_its_frame_numbers(tmp_path):
    path = tmp_path / "F001_T1.csv"
    path.write_bytes(b"0,1,2,4,12,17\r\n2440,0,1,9,0,1\r\n2442, 1 ,0,0,999,0\r\n")
    table = read_bp4d(path)
    assert table.au_names == ("AU1", "AU2", "AU4", "AU12", "AU17")
    assert table.numbers.tolist() == [2440, 2442]
    assert table.labels.tolist() == [[0, 1, -1, 0, 1], [1, 0, 0, -1, 0]]
    selected = table.select()
    assert selected.shape == (2, 12)
    assert selected[0].tolist() == [
        {"AU1": 0, "AU2": 1, "AU12": 0}.get(name, -1) for name in AU_NAMES
    ]
    assert table.at([2441, 2442, 2440, 1]).tolist() == [
        [-1] * 5, [1, 0, 0, -1, 0], [0, 1, -1, 0, 1], [-1] * 5,
    ]  # fmt: skip


def test_disfa_joins_its_files_by_frame_number(tmp_path):
    (tmp_path / "SN001_au12.txt").write_text("1,0\n2,2\n3,5\n")
    (tmp_path / "SN001_au4.txt").write_text("2,1\n3,9\n4,3\n")
    for junk in (".DS_Store", "._SN001_au4.txt", "notes.txt"):
        (tmp_path / junk).write_text("junk")
    table = read_disfa(tmp_path)
    assert table.au_names == ("AU4", "AU12")
    assert table.numbers.tolist() == [1, 2, 3, 4]
    assert table.labels.tolist() == [[-1, 0], [0, 1], [-1, 1], [1, -1]]
    stricter = read_disfa(tmp_path, present_from=3)
    assert stricter.labels[1].tolist() == [0, 0]


@given(numbers=st.lists(st.integers(1, 30), unique=True), wanted=st.lists(st.integers(0, 31)))
def test_each_frame_gets_the_row_of_its_own_number(numbers, wanted):
    numbers = np.array(sorted(numbers), dtype=np.int64)
    table = NumberedLabels(("AU1",), numbers, (numbers % 2).astype(np.int8)[:, None])
    found = table.at(wanted)[:, 0].tolist()
    assert found == [n % 2 if n in numbers else -1 for n in wanted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv is empty; expected a header such as 0,1,2,4"),
        (
            "AU1,AU2\n",
            "line 1: expected the numbers of the columns, such as 0,1,2,4; got 'AU1,AU2'",
        ),
        ("0\n", "line 1: expected the numbers"),
        ("0,1,1\n", "line 1: an Action Unit occurs twice"),
        ("0,1\n5,0,1\n", "line 2: expected 2 whole numbers; got '5,0,1'"),
        ("0,1\n5,x\n", "line 2: expected 2 whole numbers"),
        ("0,1\n5,0\n5,1\n", "line 3: frame numbers must increase; 5 follows 5"),
        ("0,1\n5,3\n", r"t\.csv: `values` must be 0, 1 or a code for unknown .* got 3"),
    ],
)
def test_bad_bp4d_files_name_the_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_bp4d(tmp_path / "t.csv")


def test_bad_disfa_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_disfa(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file such as SN001_au1\.txt in"):
        read_disfa(tmp_path)
    (tmp_path / "SN001_au1.txt").write_text("1,7\n")
    with pytest.raises(AnnotationError, match=r"SN001_au1\.txt: `values` must be intensities"):
        read_disfa(tmp_path)
    (tmp_path / "SN002_au1.txt").write_text("1,0\n")
    with pytest.raises(AnnotationError, match="has those of SN001, SN002"):
        read_disfa(tmp_path)
