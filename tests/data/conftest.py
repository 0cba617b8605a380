"""Videos of a face, for what prepares them."""

import pytest


@pytest.fixture(scope="session")
def portraits():
    """Two public-domain faces of equal size, RGB."""
    from video_files import small_portraits

    return small_portraits()


@pytest.fixture(scope="session")
def portrait(portraits):
    return portraits[0]


@pytest.fixture(scope="session")
def images(portrait):
    """Twelve frames, the face hidden in frames 4 to 7."""
    return [portrait * 0 + 110 if 4 <= i < 8 else portrait for i in range(12)]
