"""Named components that any installed package can add to, without one of our files changing.

There are three ways in: `register_lazy` (a path, so that listing imports nothing), the `register`
decorator (a notebook, a script) and an entry point (another package's `pyproject.toml`). Names are
resolved when a system is built, never in a `forward`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar, cast

from mmau._checks import did_you_mean

__all__ = ["MissingDependencyError", "Registry", "UnknownComponentError"]

T = TypeVar("T")
F = TypeVar("F")


class UnknownComponentError(LookupError):
    """No component of this name is registered."""


class MissingDependencyError(ImportError):
    """A registered component needs a library that is not installed."""


@dataclass(frozen=True)
class ComponentInfo:
    """What `mmau components` prints of one component."""

    name: str
    """Registered name."""
    summary: str
    """What it is, in one sentence."""
    source: str
    """`"mmau"`, the distribution of a plug-in, or the module that registered it."""
    missing: tuple[str, ...]
    """Top-level modules that it needs and that are not installed."""
    extra: str | None
    """The extra of mmau that brings them, if any."""

    @property
    def status(self) -> str:
        """`installed`, or what is missing and the command that brings it."""
        if not self.missing:
            return "installed"
        remedy = f'pip install "mmau[{self.extra}]"' if self.extra else "pip install them"
        return f"needs {', '.join(self.missing)}: {remedy}"


@dataclass(frozen=True)
class _Entry:
    """A registered object, or the path to one; without a path the object is there."""

    value: Any = None
    path: str | None = None
    extra: str | None = None
    requires: tuple[str, ...] = ()
    summary: str = ""
    source: str = "mmau"
    plugin: bool = False


class Registry(Generic[T]):
    """A table of names for one kind of component.

    Args:
        kind: What it lists, in the singular, as errors say it: `"scan backend"`.
        group: Entry-point group that plug-ins use: `"mmau.scan_backends"`.

    Examples:
        >>> shapes: Registry[type] = Registry("shape", group="mmau.doc_shapes")
        >>> shapes.register_lazy("fraction", "fractions:Fraction", summary="An exact ratio.")
        >>> list(shapes)
        ['fraction']
        >>> shapes.create("fraction", numerator=1, denominator=2)
        Fraction(1, 2)
        >>> shapes.get("fractoin")
        Traceback (most recent call last):
        ...
        mmau.registry.UnknownComponentError: no shape named 'fractoin'; did you mean 'fraction'? ...
    """

    def __init__(self, kind: str, *, group: str) -> None:
        self.kind = kind
        self.group = group
        self._own: dict[str, _Entry] = {}

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {', '.join(self)})"

    # ------------------------------------------------------------------ ways in
    def register(self, name: str, *, summary: str | None = None) -> Callable[[F], F]:
        """Return a decorator that registers a class, a function or a record.

        Args:
            name: Name to register.
            summary: What it is; the first line of its docstring if left out.

        Returns:
            The decorator, which returns its argument unchanged.

        Raises:
            ValueError: If the name is taken.
        """

        def add(value: F) -> F:
            first_line = (inspect.getdoc(value) or "").strip().partition("\n")[0]
            source = str(getattr(value, "__module__", type(value).__module__))
            self._take(name, _Entry(value, summary=summary or first_line, source=source))
            return value

        return add

    def register_lazy(
        self,
        name: str,
        path: str,
        *,
        summary: str = "",
        extra: str | None = None,
        requires: tuple[str, ...] = (),
    ) -> None:
        """Register by path, so that nothing is imported before the component is asked for.

        Args:
            name: Name to register.
            path: `"package.module:attribute"`.
            summary: What it is, in one sentence.
            extra: The extra of mmau that installs what it needs.
            requires: Top-level modules it needs, such as `("transformers", "peft")`.

        Raises:
            ValueError: If the name is taken or the path has no colon.
        """
        if path.count(":") != 1:
            raise ValueError(f"`path` must read 'package.module:attribute'; got {path!r}.")
        self._take(name, _Entry(path=path, summary=summary, extra=extra, requires=requires))

    def _take(self, name: str, entry: _Entry) -> None:
        # Plug-ins are not consulted here: reading the installed packages takes milliseconds, and
        # our own modules register while they are imported. A clash shows when names are listed.
        if name in self._own:
            taken = self._own[name].source
            raise ValueError(f"the {self.kind} name {name!r} is already taken by {taken}.")
        self._own[name] = entry

    # ------------------------------------------------------------------ look-up
    def _entries(self) -> dict[str, _Entry]:
        """All entries, plug-ins too; one that takes a taken name is refused."""
        entries = dict(self._own)
        for point in importlib.metadata.entry_points(group=self.group):
            source = point.dist.name if point.dist else point.module
            taken = entries.get(point.name)
            # A package that is found twice on the path offers the same object again.
            if taken is not None and not (taken.plugin and taken.path == point.value):
                raise ValueError(
                    f"the package {source!r} registers {point.name!r} as {self.kind}, but that "
                    f"name is already taken by {taken.source}; uninstall it, or have it choose "
                    "another name."
                )
            entries[point.name] = _Entry(
                path=point.value, summary=f"plug-in {point.value}", source=source, plugin=True
            )
        return dict(sorted(entries.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._entries()

    def get(self, name: str) -> T:
        """Return the component, importing it if need be.

        Args:
            name: Registered name.

        Returns:
            The component.

        Raises:
            UnknownComponentError: If there is none of this name; names the nearest and all others.
            MissingDependencyError: If it needs a library that is not installed; gives the command.
        """
        entry = self._own.get(name) or self._entries().get(name)
        if entry is None:
            names = list(self)
            raise UnknownComponentError(
                f"no {self.kind} named {name!r}{did_you_mean(name, names)} "
                f"Available: {', '.join(names) or 'none'}."
            )
        if entry.path is None:
            return cast("T", entry.value)
        try:
            return cast("T", EntryPoint(name, entry.path, self.group).load())
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            # A module of ours, or of the plug-in itself, that fails to import is a bug to show,
            # not an extra to install.
            own = entry.path.split(":")[0].split(".")[0]
            if missing in ("", own) or not (entry.plugin or missing in entry.requires):
                raise
            owner = f" of the package {entry.source!r}" if entry.plugin else ""
            remedy = "." if entry.plugin else f': pip install "mmau[{entry.extra}]"'
            raise MissingDependencyError(
                f"{self.kind} {name!r}{owner} needs {missing!r}, which is not installed{remedy}",
                name=missing,
            ) from error

    def create(self, name: str, /, *args: Any, **options: Any) -> Any:
        """Call the factory of this name, after checking the options against its signature.

        Args:
            name: Registered name.
            *args: Positional arguments of the factory.
            **options: Keyword arguments of the factory.

        Returns:
            What the factory returns.

        Raises:
            TypeError: If the factory takes no such option, or the component is not callable.
        """
        self.check_options(name, options)
        factory: Any = self.get(name)
        return factory(*args, **options)

    def check_options(self, name: str, options: Iterable[str]) -> None:
        """Check that a factory takes these options, without calling it.

        Args:
            name: Registered name.
            options: Names of keyword arguments.

        Raises:
            UnknownComponentError: If there is none of this name.
            MissingDependencyError: If it needs a library that is not installed.
            TypeError: If the factory takes no such option, or the component is not callable.
        """
        factory = self.get(name)
        if not callable(factory):
            raise TypeError(f"{self.kind} {name!r} is not a factory; use get({name!r}).")
        parameters = inspect.signature(factory).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for option in options:
            if option not in names:
                raise TypeError(
                    f"{self.kind} {name!r} takes no option {option!r}"
                    f"{did_you_mean(option, names)} It takes: {', '.join(names) or 'none'}."
                )

    def describe(self) -> list[ComponentInfo]:
        """List every component without importing any.

        Returns:
            One record per name, sorted by name.
        """
        return [
            ComponentInfo(
                name=name,
                summary=entry.summary,
                source=entry.source,
                missing=tuple(r for r in entry.requires if importlib.util.find_spec(r) is None),
                extra=entry.extra,
            )
            for name, entry in self._entries().items()
        ]
