"""Base class and field markers of all configuration sections."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from lilpipe.credentials import without_credentials
from lilpipe.extensions import Extension, ExtensionKind, find


class _Operational:
    """Marks a field that cannot change a stage's output."""


Operational = _Operational()


class _Rounding:
    """Marks a field that changes only the rounding of sums.

    It is part of the fingerprint, but a run in progress may resume with another value.
    """


Rounding = _Rounding()


class _Address:
    """Marks the address of data whose content is digested: its credentials are no part of the fingerprint."""


Address = _Address()

Ratio = Annotated[float, Field(ge=0, le=1)]
NumWorkers = Annotated[PositiveInt, Operational]


@dataclass(frozen=True)
class BuiltIn:
    """Marks a field that names built-in objects or extensions of a kind."""

    kind: ExtensionKind
    names: tuple[str, ...]


CODE_FILE = AfterValidator(lambda file: file and os.path.abspath(file))  # noqa: PTH100 (Path.resolve() follows symlinks)
CodeFile = Annotated[str | None, Operational, CODE_FILE]
"""Python file of an extension. The fingerprint includes its code, but not its path."""


class Section(BaseModel):
    """Frozen part of the configuration. Rejects unknown fields and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def identity(self, *, rounding: bool = True) -> dict[str, Any]:
        """Return the values that can change a stage's output, as plain JSON values including defaults.

        Of an ``Address``, credentials are hidden: another password or signature is the same source.
        With ``rounding=False``, omit fields that change only the rounding of sums.
        """
        ignored = (Operational,) if rounding else (Operational, Rounding)
        return {
            name: without_credentials(_plain(getattr(self, name)))
            if any(mark is Address for mark in field.metadata)
            else _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not any(mark is other for mark in field.metadata for other in ignored)
        }

    @classmethod
    def implied(cls, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """Return further changes of the section's ``values`` that ``changes`` imply, by field."""
        return {}

    def extensions(self) -> Iterator[Extension]:
        """Yield the extensions that the section and its nested sections name."""
        for name in type(self).model_fields:
            yield from _extensions_in(getattr(self, name))

    @classmethod
    def rounding_fields(cls) -> frozenset[str]:
        """Return the names of the fields that change only the rounding of sums."""
        return frozenset(
            name for name, field in cls.model_fields.items() if any(mark is Rounding for mark in field.metadata)
        )


class Extensible(Section):
    """A section that can name an extension."""

    file: CodeFile = None
    """Python file that defines the extension; relative to the configuration file's folder."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Extensible:
        found = list(self._own_extensions())
        if self.file is not None and not any(extension.file for extension in found):
            raise ValueError(
                f"file {self.file} would be ignored: the name is built in or from a package; rename yours, or remove "
                "`file`"
            )
        return self

    def _own_extensions(self) -> Iterator[Extension]:
        for name, field in type(self).model_fields.items():
            for mark in field.metadata:
                if isinstance(mark, BuiltIn):
                    value = getattr(self, name)
                    for each in (value,) if isinstance(value, str) else value:
                        if found := find(mark.kind, each, file=self.file, built_in=mark.names):
                            yield found

    def extensions(self) -> Iterator[Extension]:
        """Yield the extensions that the section and its nested sections name."""
        yield from self._own_extensions()
        yield from super().extensions()

    def extension(self) -> Extension | None:
        """Return the extension that the section itself names, or None if the name is built in."""
        return next(self._own_extensions(), None)


class WithOptions(Extensible):
    """A section whose extension accepts options."""

    options: dict[str, Any] = {}
    """Keyword arguments of the extension."""

    @model_validator(mode="after")
    def _options_are_used(self) -> WithOptions:
        if self.options and self.extension() is None:
            raise ValueError(f"options {self.options} would be ignored: they are only for extensions; remove them")
        return self


def _extensions_in(value: Any) -> Iterator[Extension]:
    if isinstance(value, Section):
        yield from value.extensions()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _extensions_in(item)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
