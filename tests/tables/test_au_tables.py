import io
from types import SimpleNamespace

import numpy as np
import pytest

from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import AnnotationError
from mmau.tables.formats import (
    ForeignAUTable,
    read_openface,
    read_pyfeat,
    write_openface,
    write_pyfeat,
)

# As FeatureExtraction writes it: blanks after the commas, columns of no interest in between, AU28
# without intensity, and a frame in which the tracker lost the face.
OPENFACE = """\
frame, face_id, timestamp, confidence, success, gaze_0_x, pose_Rx, AU01_r, AU12_r, AU01_c, AU12_c, AU28_c
1, 0, 0.000, 0.98, 1, 0.1, 0.2, 0.53, 3.10, 0.00, 1.00, 0.00
2, 0, 0.033, 0.03, 0, 0.0, 0.0, 0.00, 0.00, 0.00, 0.00, 0.00
3, 0, 0.067, 0.95, 1, 0.1, 0.2, 1.25, 0.00, 1.00, 0.00, 1.00
"""  # noqa: E501


def table(**changes):
    names = ("AU1", "AU12")
    values = {
        "au_names": names,
        "frames": np.array([1, 2, 2]),
        "face_ids": np.array([0, 0, 1]),
        "timestamps": np.array([0.0, 0.04, 0.04]),
        "confidence": np.array([0.9, 0.8, 0.7]),
        "success": np.array([True, True, True]),
        **changes,
    }
    return ForeignAUTable(**values)


def write(tmp_path, text, name="t.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


# ---------------------------------------------------------------------------------------- OpenFace
@pytest.mark.parametrize("blank", [", ", ","])
def test_openface_as_it_writes(tmp_path, blank):
    found = read_openface(write(tmp_path, OPENFACE.replace(", ", blank)))
    assert found.au_names == ("AU1", "AU12", "AU28")
    assert found.frames.tolist() == [1, 2, 3]
    assert found.face_ids.tolist() == [0, 0, 0]
    assert found.timestamps.tolist() == [0.0, 0.033, 0.067]
    assert found.success.tolist() == [True, False, True]
    nan = np.nan
    np.testing.assert_array_equal(
        found.intensity, [[0.53, 3.1, nan], [nan, nan, nan], [1.25, 0, nan]]
    )
    assert found.labels.tolist() == [[0, 1, 0], [-1, -1, -1], [1, 0, 1]]
    assert found.prob is None
    selected = found.select("labels")
    assert selected.shape == (3, 12)
    assert selected[:, AU_NAMES.index("AU12")].tolist() == [1, -1, 0]
    assert (selected[:, AU_NAMES.index("AU2")] == -1).all()
    assert np.isnan(found.select("intensity", ["AU99"])).all()


def test_older_openface_has_no_face_id(tmp_path):
    text = "\n".join(
        ",".join(cell for place, cell in enumerate(line.split(", ")) if place != 1)
        for line in OPENFACE.splitlines()
    )
    assert read_openface(write(tmp_path, text)).face_ids.tolist() == [0, 0, 0]


def test_what_we_write_for_openface_comes_back(tmp_path):
    ours = table(
        intensity=np.array([[0.25, np.nan], [5.0, 1.5], [0.0, 0.0]]),
        labels=np.array([[0, -1], [1, 1], [0, 0]], np.int8),
        success=np.array([True, True, False]),
    )
    path = write_openface(tmp_path / "out.csv", ours)
    first = path.read_text().splitlines()[0]
    assert first == (
        "frame, face_id, timestamp, confidence, success, AU01_r, AU12_r, AU01_c, AU12_c"
    )
    back = read_openface(path)
    assert back.frames.tolist() == [1, 2, 2]
    assert back.face_ids.tolist() == [0, 0, 1]
    assert back.success.tolist() == [True, True, False]
    np.testing.assert_allclose(back.intensity[:2], [[0.25, 0], [5, 1.5]])  # unknown is written 0
    assert back.labels.tolist() == [[0, 0], [1, 1], [-1, -1]]
    # As the many scripts do that read such tables.
    pd = pytest.importorskip("pandas")
    frame = pd.read_csv(path, skipinitialspace=True)
    assert frame["AU12_c"].tolist() == [0, 1, 0]


def test_a_row_of_which_nothing_is_known_is_no_success(tmp_path):
    ours = table(labels=np.array([[1, 0], [-1, -1], [0, 0]], np.int8))
    assert read_openface(write_openface(tmp_path / "o.csv", ours)).success.tolist() == [
        True,
        False,
        True,
    ]


def test_a_probability_is_an_intensity_only_if_asked_for(tmp_path):
    ours = table(prob=np.array([[0.5, 1.0], [0.0, 0.1], [np.nan, np.nan]]))
    with pytest.raises(ValueError, match=r"needs `intensity` \(AUxx_r\) or `labels` \(AUxx_c\)"):
        write_openface(tmp_path / "o.csv", ours)
    write_openface(tmp_path / "o.csv", ours, prob_as_intensity=True)
    back = read_openface(tmp_path / "o.csv")
    np.testing.assert_allclose(back.intensity[:2], [[2.5, 5.0], [0.0, 0.5]])
    assert back.success.tolist() == [True, True, False]
    assert back.labels is None
    measured = table(intensity=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="`prob_as_intensity` is for tables that have no"):
        write_openface(tmp_path / "o.csv", measured, prob_as_intensity=True)
    with pytest.raises(ValueError, match="`prob_as_intensity` needs a table that has `prob`"):
        write_openface(tmp_path / "o.csv", table(), prob_as_intensity=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv is empty; expected a header"),
        ("frame, timestamp\n1, 0\n", "line 1: no column confidence, success; expected a table of"),
        ("frame,timestamp,confidence,success\n1,0,1,1\n", "line 1: no column of an Action Unit"),
        ("a,b,a\n", "line 1: column 'a' occurs twice"),
        (OPENFACE + "4, 0, 0.1\n", "line 5: expected 12 values, as the header has; got 3. The tab"),
        (OPENFACE.replace("0.53", "high"), "line 2: AU01_r must be a number; got 'high'"),
        (
            OPENFACE.replace("\n3, 0", "\n3.5, 0"),
            r"line 4: frame must be a whole number; got '3\.5",
        ),
        (OPENFACE.replace("1.00, 0.00\n2", "0.50, 0.00\n2"), "decisions .* must be 0 or 1"),
    ],
)
def test_bad_openface_tables(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        read_openface(write(tmp_path, text))


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_openface(tmp_path / "nothing.csv")
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        read_pyfeat(tmp_path)
    (tmp_path / "video.csv").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(AnnotationError, match="is not a text file"):
        read_openface(tmp_path / "video.csv")


# ----------------------------------------------------------------------------------------- py-feat
# As pandas writes a Fex: frames from 0, two faces in the second one, none in the third.
PYFEAT = """\
FaceRectX,FaceRectY,FaceScore,x_0,Pitch,AU01,AU12,AU43,anger,input,frame
10.0,12.0,0.99,3.0,0.1,0.25,0.75,0.0,0.1,talk.mp4,0
10.0,12.0,0.98,3.0,0.1,0.5,1.0,0.1,0.1,talk.mp4,1
90.0,12.0,0.95,3.0,0.1,0.125,0.0,0.2,0.1,talk.mp4,1
,,,,,,,,,talk.mp4,2
"""


def test_pyfeat_as_it_writes(tmp_path):
    found = read_pyfeat(write(tmp_path, PYFEAT))
    assert found.au_names == ("AU1", "AU12", "AU43")
    assert found.frames.tolist() == [1, 2, 2, 3]  # ours count from 1
    assert found.face_ids.tolist() == [0, 0, 1, 0]
    assert found.success.tolist() == [True, True, True, False]
    assert found.confidence.tolist()[:3] == [0.99, 0.98, 0.95]
    assert found.prob[2].tolist() == [0.125, 0.0, 0.2]
    assert np.isnan(found.prob[3]).all()
    assert np.isnan(found.timestamps).all()
    second = found.face(1)
    assert (second.frames.tolist(), second.prob.tolist()) == ([2], [[0.125, 0.0, 0.2]])
    assert second.labels is None
    with pytest.raises(LookupError, match="no face 2 in the table; it has 0, 1"):
        found.face(2)
    with pytest.raises(LookupError, match="the table has no 'labels'"):
        found.select("labels")


def test_what_we_write_for_pyfeat_comes_back(tmp_path):
    prob = np.array([[0.1, np.nan], [0.3, 1 / 3], [np.nan, np.nan]])
    path = write_pyfeat(tmp_path / "out.csv", table(prob=prob))
    assert path.read_text().splitlines()[0] == "FaceScore,AU01,AU12,frame"
    back = read_pyfeat(path)
    np.testing.assert_array_equal(back.prob, prob)  # to the last bit
    assert back.frames.tolist() == [1, 2, 2]
    assert back.confidence.tolist() == [0.9, 0.8, 0.7]
    assert back.success.tolist() == [True, True, False]
    pd = pytest.importorskip("pandas")
    frame = pd.read_csv(io.StringIO(path.read_text()))
    assert frame["frame"].tolist() == [0, 1, 1]
    decided = table(labels=np.array([[1, 0], [-1, 1], [0, 0]], np.int8))
    back = read_pyfeat(write_pyfeat(tmp_path / "d.csv", decided))
    np.testing.assert_array_equal(back.prob, [[1, 0], [np.nan, 1], [0, 0]])
    with pytest.raises(ValueError, match="a py-feat table needs `prob` or `labels`"):
        write_pyfeat(tmp_path / "x.csv", table(intensity=np.zeros((3, 2))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AU01\n0.5\n", "line 1: no column frame; expected a table of py-feat"),
        ("frame,smile\n0,1\n", "no column of an Action Unit, such as AU01"),
        ("frame,AU01\n0,1.5\n", "must be within 0 and 1"),
        ("frame,AU01\n,0.5\n", "line 2: frame must be a whole number; got ''"),
    ],
)
def test_bad_pyfeat_tables(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        read_pyfeat(write(tmp_path, text))


@pytest.mark.parametrize("face_id", [None, np.array([0, 0, 1])])
def test_predictions_for_other_programs(tmp_path, face_id):
    predicted = SimpleNamespace(
        au_names=("AU1", "AU12"),
        frames=np.array([1, 2, 2]),
        face_id=face_id,
        timestamps=np.array([0.0, 0.04, 0.04]),
        valid=np.array([True, False, True]),
        confidence=np.array([0.9, 0.0, 0.8], np.float32),
        probability=np.array([[0.25, 0.5], [0.1, 0.2], [1.0, 0.0]], np.float32),
        active=np.array([[False, True], [False, False], [True, False]]),
    )
    ours = ForeignAUTable.from_predictions(predicted)
    assert ours.face_ids.tolist() == ([0, 0, 0] if face_id is None else [0, 0, 1])
    back = read_openface(write_openface(tmp_path / "o.csv", ours))
    assert back.labels.tolist() == [[0, 1], [-1, -1], [1, 0]]
    assert back.success.tolist() == [True, False, True]
    feat = read_pyfeat(write_pyfeat(tmp_path / "f.csv", ours))
    np.testing.assert_array_equal(feat.prob, predicted.probability)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"success": np.ones(2, bool)}, r"`success` must have shape \(3,\), as `frames`; got \(2,"),
        ({"prob": np.zeros((3, 1))}, r"`prob` must have shape \(3, 2\); got \(3, 1\)"),
    ],
)
def test_tables_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)
