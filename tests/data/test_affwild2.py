from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmau.action_units import AU_NAMES
from mmau.data.affwild2 import (
    AnnotationError,
    Trial,
    find_annotations,
    find_frame_folders,
    find_listed_trials,
    find_trials,
    frame_files,
    join_labels,
    listed_frames,
    read_annotation,
    video_of_trial,
    write_submission,
)

HEADER = ",".join(AU_NAMES)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


# -------------------------------------------------------------------------------------- annotations
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blanks", ["", " ", "  \t"])
@pytest.mark.parametrize("tail", ["", "END", "END END"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_file_as_other_machines_write_it(tmp_path, end, blanks, tail, mark):
    rows = ["0,1,0,0,0,0,0,0,0,0,1,0", " 1, 0,0,0,0,0,0,0,0,0,1,0", ",".join(["-1"] * 12)]
    text = mark + end.join(line + blanks for line in [HEADER, *rows]) + tail.replace("END", end)
    annotation = read_annotation(write(tmp_path / "video1.txt", text))
    assert annotation.au_names == AU_NAMES
    assert annotation.labels.dtype == np.int8
    assert annotation.labels.tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        [-1] * 12,
    ]
    assert annotation.num_partial_rows == 0


def test_the_header_says_which_columns_there_are(tmp_path):
    legacy = "AU1,AU2,AU4,AU6,AU12,AU15,AU20,AU25,\n1,0,0,0,1,0,1,0\n"
    annotation = read_annotation(write(tmp_path / "old.txt", legacy))
    assert len(annotation.au_names) == 8
    assert annotation.labels.shape == (1, 8)
    selected = annotation.select()
    assert selected.shape == (1, 12)
    assert selected[0, AU_NAMES.index("AU12")] == 1
    assert selected[0, AU_NAMES.index("AU7")] == -1
    assert annotation.select(["AU25", "AU20"]).tolist() == [[0, 1]]


def test_a_partly_unknown_row_is_unknown_and_counted(tmp_path):
    path = write(tmp_path / "video1.txt", "AU1,AU2\n1,-1\n-1,-1\n0,1\n")
    assert read_annotation(path).labels.tolist() == [[-1, -1], [-1, -1], [0, 1]]
    as_written = read_annotation(path, whole_rows=False)
    assert as_written.labels.tolist() == [[1, -1], [-1, -1], [0, 1]]
    assert as_written.num_partial_rows == 1


def test_a_header_without_rows_is_a_trial_without_frames(tmp_path):
    assert read_annotation(write(tmp_path / "v.txt", HEADER)).labels.shape == (0, 12)


@given(rows=st.lists(st.lists(st.sampled_from([0, 1]), min_size=3, max_size=3), max_size=30))
def test_every_row_keeps_its_place(tmp_path_factory, rows):
    text = "AU1,AU2,AU4\n" + "".join(",".join(map(str, row)) + "\r\n" for row in rows)
    path = write(tmp_path_factory.mktemp("a") / "v.txt", text)
    assert read_annotation(path).labels.tolist() == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"v\.txt is empty; expected a header"),
        ("\n \n", r"v\.txt is empty"),
        ("0,1,0\n", r"v\.txt, line 1: expected names such as AU1,AU2,AU4; got '0,1,0'"),
        ("AU1,AU1\n", r"line 1: an Action Unit occurs twice"),
        ("AU1,AU2\n0,1\n0\n", r"v\.txt, line 3: expected 2 values of 0, 1 or -1.* got '0'"),
        ("AU1,AU2\n0,1\n0,1,1\n", r"v\.txt, line 3: expected 2 values"),
        ("AU1,AU2\n0,2\n", r"v\.txt, line 2: expected 2 values .* got '0,2'"),
        ("AU1,AU2\n0,0.5\n", r"v\.txt, line 2"),
        ("AU1,AU2\n0,1\n\n1,0\n", r"v\.txt, line 3: .* got ''"),
    ],
)
def test_bad_annotations_name_the_line(tmp_path, text, message):
    with pytest.raises(AnnotationError, match=message):
        read_annotation(write(tmp_path / "v.txt", text))


def test_files_that_are_no_annotation(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.txt"):
        read_annotation(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        read_annotation(tmp_path)
    (tmp_path / "video.txt").write_bytes(b"\x00\xff\xfe\x81")
    with pytest.raises(AnnotationError, match="is not a text file"):
        read_annotation(tmp_path / "video.txt")


# ------------------------------------------------------------------------------------------- trials
@pytest.mark.parametrize(
    ("trial", "video"),
    [
        ("video10_1_left", "video10_1"),
        ("6-30-1920x1080_right", "6-30-1920x1080"),
        ("video_main", "video"),
        ("video10_1", "video10_1"),
        ("left_video", "left_video"),
        ("video_leftover", "video_leftover"),
        ("video_left_1", "video_left_1"),
        ("video_left_right", "video_left"),
        ("_left", "_left"),
    ],
)
def test_only_the_exact_suffix_is_stripped(trial, video):
    assert video_of_trial(trial) == video


@pytest.fixture
def root(tmp_path):
    challenge = tmp_path / "AU_Detection_Challenge"
    for name in ("video10_1_left", "video10_1_right", "6-30-1920x1080"):
        write(challenge / "Train_Set" / f"{name}.txt", f"{HEADER}\n")
    write(challenge / "Validation_Set" / "video10_1.txt", f"{HEADER}\n")
    for junk in (".DS_Store", "._video10_1_left.txt", "readme.md", "folder.txt/x"):
        write(challenge / "Train_Set" / junk, "junk")
    for video in ("video10_1.mp4", "batch2/6-30-1920x1080.AVI", "._video10_1.mp4", "notes.txt"):
        write(tmp_path / "videos" / video, "")
    (tmp_path / "videos" / "folder.mp4").mkdir()
    return tmp_path


def test_official_splits_with_their_videos(root):
    trials = find_trials(root, "train")
    assert [(t.name, t.video.name, t.video_name, t.split) for t in trials] == [
        ("6-30-1920x1080", "6-30-1920x1080.AVI", "6-30-1920x1080", "train"),
        ("video10_1_left", "video10_1.mp4", "video10_1", "train"),
        ("video10_1_right", "video10_1.mp4", "video10_1", "train"),
    ]
    assert all(t.annotation.is_file() and t.annotation.stem == t.name for t in trials)
    assert [t.name for t in find_trials(str(root), "validation")] == ["video10_1"]


def test_one_split_alone_is_enough(root):
    for path in (root / "AU_Detection_Challenge" / "Validation_Set").iterdir():
        path.unlink()
    (root / "AU_Detection_Challenge" / "Validation_Set").rmdir()
    assert len(find_trials(root, "train")) == 3


def test_a_video_that_is_itself_called_left_goes_before_the_suffix(root):
    write(root / "videos" / "video10_1_left.mp4", "")
    left = next(t for t in find_trials(root) if t.name == "video10_1_left")
    assert left.video.name == "video10_1_left.mp4"


def test_trials_without_video(root):
    (root / "videos" / "video10_1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="for 2 of 3 train trials: video10_1_left, video10"):
        find_trials(root, "train")
    kept = find_trials(root, "train", missing_videos="skip")
    assert [t.name for t in kept] == ["6-30-1920x1080"]


def test_roots_that_cannot_be_right(root, tmp_path):
    with pytest.raises(
        ValueError, match="`split` must be one of 'train', 'validation'; got 'test'"
    ):
        find_trials(root, "test")
    with pytest.raises(ValueError, match="`missing_videos` must be one of"):
        find_trials(root, missing_videos="ignore")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*Train_Set"):
        find_trials(tmp_path / "nowhere")
    write(root / "videos" / "old" / "video10_1.avi", "")
    with pytest.raises(ValueError, match="two videos share a name: "):
        find_trials(root)


def test_a_trial_in_both_splits_raises(root):
    write(root / "AU_Detection_Challenge" / "Validation_Set" / "video10_1_left.txt", HEADER)
    with pytest.raises(
        ValueError, match=r"1 trials are in both splits .* such as 'video10_1_left'"
    ):
        find_trials(root)


def test_missing_folders_are_named(root):
    for path in (root / "AU_Detection_Challenge" / "Validation_Set").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no annotation of the validation split"):
        find_trials(root, "validation")
    (root / "videos").rename(root / "movies")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*videos"):
        find_trials(root)


def test_annotations_one_level_deeper(root):
    (root / "third release").mkdir()
    (root / "AU_Detection_Challenge").rename(root / "third release" / "AU_Detection_Challenge")
    assert len(find_trials(root, "train")) == 3
    write(root / "other" / "AU_Detection_Challenge" / "Train_Set" / "a.txt", HEADER)
    with pytest.raises(ValueError, match="several folders hold annotations"):
        find_trials(root, "train")


def test_annotations_without_any_video(root):
    (root / "videos").rename(root / "elsewhere")
    assert list(find_annotations(root)) == ["6-30-1920x1080", "video10_1_left", "video10_1_right"]
    with pytest.raises(ValueError, match="`split` must be one of"):
        find_annotations(root, "test")


# -------------------------------------------------------------------------------- folders of images
@pytest.mark.parametrize("inside", [".", "cropped_aligned", "cropped_aligned_images"])
def test_all_parts_of_the_images(root, inside):
    for part, name in (
        ("cropped_aligned", "video10_1_left"),
        ("cropped_aligned_new_50_vids", "video10_1"),
    ):
        write(root / inside / part / name / "00001.jpg", "")
    write(root / inside / "cropped_aligned" / ".DS_Store", "")
    write(root / "__MACOSX" / "cropped_aligned" / "video10_1" / "._00001.jpg", "")
    write(root / "cropped" / "video10_1" / "00001.jpg", "")  # not aligned: another product
    folders = find_frame_folders(root)
    assert list(folders) == ["video10_1", "video10_1_left"]
    assert {t.name: t.frames for t in find_trials(root)} == {
        "6-30-1920x1080": None,
        "video10_1_left": folders["video10_1_left"],
        "video10_1_right": None,
    }
    write(root / inside / "cropped_aligned_more" / "video10_1" / "00002.jpg", "")
    with pytest.raises(ValueError, match="two folders hold the images of one trial: "):
        find_frame_folders(root)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_frame_folders(root / "nowhere")


def test_two_images_of_one_number_and_number_zero_raise(tmp_path):
    write(tmp_path / "00001.jpg", "")
    write(tmp_path / "1.png", "")
    with pytest.raises(ValueError, match="two images of frame 1: "):
        frame_files(tmp_path)
    (tmp_path / "1.png").rename(tmp_path / "00000.png")
    with pytest.raises(ValueError, match=r"frame numbers start at 1, so this is not one: .*00000"):
        frame_files(tmp_path)


# --------------------------------------------------------------------------------------------- join
def test_frame_folders_with_gaps_and_junk(tmp_path):
    for name in (
        "00002.jpg",
        "00003.jpg",
        "00010.png",
        ".DS_Store",
        "._00001.jpg",
        "sub/00001.jpg",
    ):
        write(tmp_path / name, "")
    write(tmp_path / "thumb.jpg", "")
    found = frame_files(tmp_path)
    assert {number: path.name for number, path in found.items()} == {
        2: "00002.jpg",
        3: "00003.jpg",
        10: "00010.png",
    }
    assert list(found) == [2, 3, 10]
    (tmp_path / "empty").mkdir()
    assert frame_files(tmp_path / "empty") == {}
    with pytest.raises(FileNotFoundError, match="no such folder"):
        frame_files(tmp_path / "nowhere")


@given(numbers=st.lists(st.integers(1, 40), unique=True), rows=st.integers(0, 30))
def test_each_frame_gets_the_row_of_its_own_number(numbers, rows):
    labels = np.arange(rows, dtype=np.int8)[:, None]  # row i says i
    joined = join_labels(labels, numbers)
    expected = [[n - 1 if n <= rows else -1] for n in numbers]
    assert joined.labels.tolist() == expected
    assert joined.has_row.tolist() == [n <= rows for n in numbers]
    assert joined.num_rows_without_frame == rows - sum(n <= rows for n in numbers)
    assert (joined.report == "") == (sorted(numbers) == list(range(1, rows + 1)))


@pytest.mark.parametrize(
    ("frames", "report"),
    [
        (5, ""),
        (4, "4 frames and 5 annotation rows: 0 frames have no row, 1 rows have no frame."),
        (6, "6 frames and 5 annotation rows: 1 frames have no row, 0 rows have no frame."),
    ],
)
def test_a_count_off_by_one_is_masked_and_reported_never_shifted(frames, report):
    labels = np.array([[0], [1], [1], [0], [1]], dtype=np.int8)
    joined = join_labels(labels, range(1, frames + 1))
    assert joined.labels[:4].tolist() == labels[:4].tolist()
    assert joined.labels[5:].tolist() == [[-1]] * max(frames - 5, 0)
    assert joined.report == report


@pytest.mark.parametrize(
    ("numbers", "message"), [([0, 1], "1-based frame numbers; got 0"), ([2, 2], "number once")]
)
def test_impossible_numbers_raise(numbers, message):
    with pytest.raises(ValueError, match=message):
        join_labels(np.zeros((3, 1), dtype=np.int8), numbers)


# --------------------------------------------------------------------------------------- submission
EXAMPLE = f"image_location,{HEADER}\r\n" + "".join(
    f"{frame},{','.join('0' * 12)}\r\n"
    for frame in ("b/00003.jpg", "a-30/00001.jpg", "b/00001.jpg")
)


def test_exactly_the_listed_frames_in_their_order(tmp_path):
    b = np.zeros((4, 12), dtype=np.int8)
    b[2], b[0, 0] = 1, 1
    example = write(tmp_path / "example.txt", EXAMPLE)
    out = tmp_path / "out.txt"
    predictions = {"b": b, "a-30": np.zeros((9, 12), dtype=bool), "c": b}
    assert write_submission(out, example, predictions) == 3
    assert out.read_bytes().decode() == (
        f"image_location,{HEADER}\n"
        "b/00003.jpg,1,1,1,1,1,1,1,1,1,1,1,1\n"
        "a-30/00001.jpg,0,0,0,0,0,0,0,0,0,0,0,0\n"
        "b/00001.jpg,1,0,0,0,0,0,0,0,0,0,0,0\n"
    )


def test_what_the_example_lists(tmp_path, root):
    example = write(tmp_path / "example.txt", EXAMPLE)
    au_names, frames = listed_frames(example)
    assert au_names == AU_NAMES
    assert [frame[:3] for frame in frames] == [
        ("b/00003.jpg", "b", 3),
        ("a-30/00001.jpg", "a-30", 1),
        ("b/00001.jpg", "b", 1),
    ]
    with pytest.raises(FileNotFoundError, match="for 2 of 2 listed trials: b, a-30"):
        find_listed_trials(root, example)
    for name in ("b.mp4", "sub/a-30.avi"):
        write(root / "videos" / name, "")
    trials = find_listed_trials(root, example)
    assert [(t.name, t.numbers.tolist(), t.video.name) for t in trials] == [
        ("b", [3, 1], "b.mp4"),
        ("a-30", [1], "a-30.avi"),
    ]


def test_a_frame_beyond_the_end_takes_the_last_decision_only_if_allowed(tmp_path):
    example = write(tmp_path / "e.txt", "image_location,AU1\nv/00002.jpg,0\nv/00003.jpg,0\n")
    out = tmp_path / "out.txt"
    decided = {"v": np.array([[0], [1]])}
    with pytest.raises(ValueError, match="no prediction for frame 3 of trial 'v', which has 2"):
        write_submission(out, example, decided, au_names=["AU1"])
    write_submission(out, example, decided, au_names=["AU1"], repeat_last=1)
    assert out.read_text() == "image_location,AU1\nv/00002.jpg,1\nv/00003.jpg,1\n"
    with pytest.raises(ValueError, match="no prediction for frame 3 of trial 'v', which has 1"):
        write_submission(out, example, {"v": decided["v"][:1]}, au_names=["AU1"], repeat_last=1)
    with pytest.raises(ValueError, match="no prediction for frame 2 of trial 'v', which has 0"):
        write_submission(out, example, {"v": decided["v"][:0]}, au_names=["AU1"], repeat_last=9)
    with pytest.raises(ValueError, match="`repeat_last` must be in"):
        write_submission(out, example, decided, au_names=["AU1"], repeat_last=-1)


def test_columns_follow_the_example_by_name(tmp_path):
    example = write(tmp_path / "example.txt", "image_location,AU26,AU1\nv/00001.jpg,0,0\n")
    out = tmp_path / "out.txt"
    write_submission(out, example, {"v": np.array([[0, 1]])}, au_names=["AU1", "AU26"])
    assert out.read_text() == "image_location,AU26,AU1\nv/00001.jpg,1,0\n"


@pytest.mark.parametrize(
    ("example", "predictions", "message"),
    [
        (EXAMPLE, {"b": np.zeros((4, 12))}, "no prediction for trial 'a-30' .*line 3"),
        (EXAMPLE, {"b": np.zeros((2, 12))}, "no prediction for frame 3 of trial 'b', which has 2"),
        (EXAMPLE, {"b": np.zeros((4, 8))}, r"must have shape \(t, 12\); got \(4, 8\)"),
        (EXAMPLE, {"b": np.full((4, 12), 0.3)}, r"decisions must be 0 or 1; b/00003\.jpg has"),
        ("image_location,AU20\nb/1.jpg,0\n", {}, "wants AU20, which `au_names` does not have"),
        ("AU1,AU2\n", {}, "line 1: expected image_location,AU1"),
        ("image_location,AU1\nb00001.jpg,0\n", {}, "line 2: expected <trial>/<frame number>"),
        (
            "image_location,AU1\nb/1.jpg,0\nc/1.jpg,0\nb/00001.jpg,0\n",
            {},
            r"line 4: b/00001\.jpg is listed before, in line 2",
        ),
    ],
)
def test_nothing_is_invented_and_nothing_is_left_behind(tmp_path, example, predictions, message):
    path = write(tmp_path / "example.txt", example)
    with pytest.raises(ValueError, match=message):
        write_submission(tmp_path / "out.txt", path, predictions)
    assert [p.name for p in tmp_path.iterdir()] == ["example.txt"]


@pytest.mark.parametrize(
    ("name", "video", "face"),
    [
        ("7", "7", "largest"),
        ("7_left", "7", "left"),
        ("7_right", "7", "right"),
        ("7_main", "7", "largest"),
        ("video10_1_left", "video10_1_left", "largest"),
        ("video10_1_left", "video10_1", "left"),
        ("video10_1_left_right", "video10_1_left", "right"),
    ],
)
def test_the_name_says_on_which_side_the_face_is(name, video, face):
    trial = Trial(name, Path(f"{video}.mp4"), Path(f"{name}.txt"), "train")
    assert trial.face == face
