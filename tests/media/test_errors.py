import re

import pytest

from mmau.media.errors import MediaError, check_file


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=f"^no such file: {re.escape(str(tmp_path / 'no.mp4'))}$"):
        check_file(tmp_path / "no.mp4")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(MediaError, match="expected a file but this is a folder: "):
        check_file(tmp_path)


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match=r"the file is empty \(0 bytes\): .*empty.mp4"):
        check_file(tmp_path / "empty.mp4")
