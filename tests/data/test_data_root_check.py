import shutil

import numpy as np
import pytest
from adversarial_root import write_adversarial_root

from mmau.action_units import AU_NAMES
from mmau.data.affwild2_check import Finding, check_data_root

HEADER = ",".join(AU_NAMES)


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory):
    return write_adversarial_root(tmp_path_factory.mktemp("root") / "root").root


def messages(findings, severity=None):
    return [str(f) for f in findings if severity in (None, f.severity)]


def one(findings, *words):
    found = [text for text in messages(findings) if all(word in text for word in words)]
    assert len(found) == 1, (words, messages(findings))
    return found[0]


def test_every_trap_is_reported(adversarial):
    calls = []
    findings = check_data_root(adversarial, progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (14, 14)
    assert messages(findings, "error") == []  # every one of them is handled
    order = ["error", "warning", "note"]
    ranks = [order.index(finding.severity) for finding in findings]
    assert ranks == sorted(ranks)
    expected = [
        ("warning: 2-30-640x360: the video announces 20 frames, the annotation has 19 rows: "
         "1 frame without row at the end; nothing is shifted.",),
        ("6-30-1920x1080_left: the video announces 26 frames, the annotation has 27 rows: "
         "1 row without frame",),
        ("warning: video1: 1 row with -1 in some columns only",),
        ("video21", "there is not one image in this folder"),
        ("warning: video50: not one row is labelled",),
        ("warning: video51: the annotation has a header and no row",),
        ("note: 10-60-1280x720: the header has 8 Action Units; unknown here: AU7, AU10, AU23, AU24,"
         " AU26.",),
        ("2-30-640x360: the name says 30 frames per second, the file 12.00; times are taken from",),
        ("note: 2-30-640x360: 3 of 19 annotated frames have no image: 3 at the start, 0 in betw",),
        ("video10_1_left: 3 of 22", "0 at the start, 3 in between, 0 at the end"),
        ("video10_1: 3 of 22", "0 at the start, 0 in between, 3 at the end"),
        ("note: 6-30-1920x1080: the sound starts 0.3", "after the video"),
        ("note: video10_1: the sound ends 0.5", "before the video"),
        ("note: video5: the video has no sound",),
        ("video20: there is no folder of cropped images of it",),
        ("note: video10_1: people of this video are in both official splits",),
        ("4 videos without annotation (test set or other tracks): 7-60-1920x1080, spare, ",),
        ("files of other systems, ignored: ", ".DS_Store", "._*", "Thumbs.db"),
        ("note: train: 8 trials, 139 rows, of which 118 labelled.",),
        ("note: validation: 6 trials, 93 rows, of which 85 labelled.",),
    ]  # fmt: skip
    for words in expected:
        one(findings, *words)


def test_without_opening_videos(adversarial):
    texts = " ".join(messages(check_data_root(adversarial, open_videos=False)))
    assert "announces" not in texts
    assert "8 Action Units" in texts


def test_many_of_one_kind_do_not_hide_the_others(adversarial):
    findings = check_data_root(adversarial, max_per_kind=1)
    assert sum("have no image" in finding.message for finding in findings) == 1
    assert Finding("note", "...", "5 more of this kind (gaps)") in findings
    with pytest.raises(ValueError, match="`max_per_kind` must be in"):
        check_data_root(adversarial, max_per_kind=0)


@pytest.fixture
def root(adversarial, tmp_path):
    """A copy that can be broken."""
    return shutil.copytree(adversarial, tmp_path / "root")


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def truncate(root):
    path = root / "videos" / "video1.mp4"
    path.write_bytes(path.read_bytes()[:500])


BREAKS = [
    (lambda r: (r / "videos" / "video1.mp4").unlink(), "error: video1: there is no video of it"),
    (lambda r: (r / "videos" / "video1.mp4").write_bytes(b""), "the file is empty (0 bytes)"),
    (truncate, "not a video or sound file that FFmpeg can read, or its header is damaged"),
    (lambda r: write(r / "videos" / "old" / "video1.mkv"), "two videos share a name"),
    (lambda r: shutil.rmtree(r / "videos"), "no such folder: "),
    (lambda r: shutil.rmtree(r / "AU_Detection_Challenge"), "so no annotation"),
    (
        lambda r: shutil.rmtree(r / "AU_Detection_Challenge" / "Train_Set"),
        "Train_Set: there is no such folder",
    ),
    (
        lambda r: [p.unlink() for p in (r / "AU_Detection_Challenge/Train_Set").glob("[!.]*.txt")],
        "Train_Set: there is not one annotation in it",
    ),
    (
        lambda r: write(r / "AU_Detection_Challenge/Validation_Set/video1.txt", HEADER),
        "error: video1: this trial is in both official splits",
    ),
    (
        lambda r: write(r / "AU_Detection_Challenge/Train_Set/video1.txt", HEADER + "\n1,2\n"),
        "video1.txt, line 2: expected 12 values",
    ),
    (lambda r: write(r / "cropped_aligned_new_50_vids/video1/00001.jpg"), "hold the images of one"),
    (lambda r: write(r / "cropped_aligned/video1/1.jpg"), "two images of frame 1"),
    (lambda r: write(r / "cropped_aligned/video1/00000.jpg"), "frame numbers start at 1"),
]


@pytest.mark.parametrize(("harm", "message"), BREAKS)
def test_what_cannot_be_used_is_an_error(root, harm, message):
    harm(root)
    errors = messages(check_data_root(root), "error")
    assert any(message in text for text in errors), errors


def test_images_that_are_odd_but_not_wrong(root):
    write(root / "cropped_aligned" / "video1" / "00003.jpg")
    write(root / "cropped_aligned" / "video1" / "00099.jpg")
    findings = check_data_root(root, open_videos=False)
    one(findings, "warning: ", "cropped_aligned/video1: 2 images with 0 bytes")
    one(findings, "warning: video1: 1 image numbered above 24")


def test_several_releases_of_the_annotations(root):
    for release in ("first", "second"):
        shutil.copytree(root / "AU_Detection_Challenge", root / release / "AU_Detection_Challenge")
    shutil.rmtree(root / "AU_Detection_Challenge")
    errors = messages(check_data_root(root, open_videos=False), "error")
    assert any("several folders hold annotations" in text for text in errors)


def test_roots_that_are_none(tmp_path):
    write(tmp_path / "file")
    assert "this is a file, not a folder" in str(check_data_root(tmp_path / "file")[0])
    findings = check_data_root(tmp_path)
    assert {f.severity for f in findings} == {"error"}
    assert np.all(["there is no such folder" in str(f) or "no such folder:" in str(f)
                   for f in findings])  # fmt: skip
