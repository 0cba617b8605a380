"""A missing library is named with its command; a broken one shows itself."""

import pytest

from mmau._optional import require
from mmau.registry import MissingDependencyError


def test_a_missing_library_comes_with_its_extra():
    with pytest.raises(MissingDependencyError, match=r'^reading video needs .* "mmau\[video\]"'):
        require("nothing_of_this_name", purpose="reading video", extra="video")


def test_a_library_that_is_broken_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import another_missing_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_module") as caught:
        require("broken_inside", purpose="x", extra="video")
    assert not isinstance(caught.value, MissingDependencyError)


def test_a_missing_part_of_an_installed_library_shows_itself():
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.no_such_part") as caught:
        require("matplotlib.no_such_part", purpose="x", extra="plot")
    assert not isinstance(caught.value, MissingDependencyError)
