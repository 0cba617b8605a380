"""What `Registry` promises: three ways in, and an error message for every way to fail."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmau.registry import MissingDependencyError, Registry, UnknownComponentError


@pytest.fixture
def registry():
    return Registry("gadget", group="mmau.test_gadgets")


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """Modules that cannot be imported, each for another reason."""
    package = tmp_path / "brokenpackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needs_extra.py").write_text("import surely_not_installed\n")
    (package / "needs_own.py").write_text("import brokenpackage.not_written_yet\n")
    (package / "bug.py").write_text("from math import not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_decorator_registers_and_keeps_the_function(registry):
    @registry.register("double")
    def double(value: int) -> int:
        """Twice the value."""
        return 2 * value

    assert registry.get("double") is double
    assert registry.create("double", value=3) == 6
    assert registry.describe()[0].summary == "Twice the value."


def test_lazy_entry_imports_nothing_until_asked(registry):
    sys.modules.pop("this", None)
    registry.register_lazy("zen", "this:d", summary="A table.")
    assert list(registry) == ["zen"]
    assert registry.describe()[0].status == "installed"
    assert "this" not in sys.modules


def test_unknown_name_gives_nearest_and_all(registry):
    for name in ("chunked", "reference"):
        registry.register_lazy(name, "math:pi")
    with pytest.raises(UnknownComponentError) as error:
        registry.get("chunkd")
    assert str(error.value) == (
        "no gadget named 'chunkd'; did you mean 'chunked'? Available: chunked, reference."
    )


def test_unknown_name_far_from_all_has_no_guess(registry):
    with pytest.raises(UnknownComponentError, match=r"no gadget named 'xyz'\. Available: none\."):
        registry.get("xyz")


def test_missing_extra_names_its_command(registry, broken_package):
    registry.register_lazy(
        "x", "brokenpackage.needs_extra:x", extra="gpu", requires=("surely_not_installed",)
    )
    assert registry.describe()[0].status == ('needs surely_not_installed: pip install "mmau[gpu]"')
    with pytest.raises(
        MissingDependencyError,
        match=r"gadget 'x' needs 'surely_not_installed', which is not installed: "
        r'pip install "mmau\[gpu\]"',
    ):
        registry.get("x")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("brokenpackage.needs_own:x", ModuleNotFoundError),
        ("brokenpackage.needs_extra:x", ModuleNotFoundError),  # not declared: our mistake
        ("brokenpackage.bug:x", ImportError),
        ("math:no_such_name", AttributeError),
    ],
)
def test_a_broken_module_is_not_disguised_as_a_missing_extra(registry, broken_package, path, error):
    registry.register_lazy("x", path, extra="gpu", requires=("something_else",))
    with pytest.raises(error) as caught:
        registry.get("x")
    assert not isinstance(caught.value, MissingDependencyError)


def test_taken_name_refuses(registry):
    registry.register_lazy("a", "math:pi")
    with pytest.raises(ValueError, match="the gadget name 'a' is already taken by mmau"):
        registry.register_lazy("a", "math:e")
    with pytest.raises(ValueError, match="already taken"):
        registry.register("a")(int)
    assert registry.get("a") == pytest.approx(3.14159, abs=1e-5)


def test_path_without_colon_refuses(registry):
    with pytest.raises(ValueError, match=r"'package.module:attribute'; got 'math.pi'"):
        registry.register_lazy("a", "math.pi")


def test_unknown_option_names_the_nearest(registry):
    @registry.register("loss")
    def loss(*, gamma: float = 1.0, margin: float = 0.0) -> float:
        """A loss."""
        return gamma - margin

    with pytest.raises(
        TypeError, match=r"gadget 'loss' takes no option 'gama'; did you mean 'gamma'\?"
    ):
        registry.create("loss", gama=2.0)


def test_what_is_not_callable_is_no_factory(registry):
    registry.register_lazy("pi", "math:pi")
    with pytest.raises(TypeError, match="is not a factory"):
        registry.create("pi")


PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed_plugin(tmp_path_factory):
    """The plug-in package of the examples, installed with pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    # The build needs no network: hatchling is here already.
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target), str(PLUGIN)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return target


def run_with(target: Path, code: str) -> str:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(target)!r})\n" + textwrap.dedent(code),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_plugin_is_found_by_name_without_importing_it(installed_plugin):
    out = run_with(
        installed_plugin,
        """
        import torch
        from mmau.encoders import AUDIO_ENCODERS
        info = {i.name: i for i in AUDIO_ENCODERS.describe()}["energy"]
        print(info.source, "mmau_energy" in sys.modules)
        encoder = AUDIO_ENCODERS.create("energy", frames_per_second=50.0)
        print(encoder(torch.ones(1, 16000)).features.shape, "mmau_energy" in sys.modules)
        """,
    )
    assert out == "mmau-energy False\ntorch.Size([1, 50, 2]) True\n"


def test_plugin_cannot_take_a_name_of_ours(tmp_path):
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmau.audio_encoders]\nwavlm = thief:Encoder\n")
    out = run_with(
        tmp_path,
        """
        from mmau.encoders import AUDIO_ENCODERS
        try:
            list(AUDIO_ENCODERS)
        except ValueError as error:
            print(error)
        """,
    )
    assert "the package 'thief' registers 'wavlm' as audio encoder" in out
    assert "already taken by mmau" in out
