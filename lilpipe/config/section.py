"""Base class and field markers of all configuration sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class _Operational:
    """Marks a field that cannot change a stage's output."""


Operational = _Operational()


class _Rounding:
    """Marks a field that changes only the rounding of sums.

    It is part of the fingerprint, but a run in progress may resume with another value.
    """


Rounding = _Rounding()

Ratio = Annotated[float, Field(ge=0, le=1)]
NumWorkers = Annotated[PositiveInt, Operational]


class Section(BaseModel):
    """Frozen part of the configuration. Rejects unknown fields and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def identity(self, *, rounding: bool = True) -> dict[str, Any]:
        """Return the values that can change a stage's output, as plain JSON values including defaults.

        With ``rounding=False``, omit fields that change only the rounding of sums.
        """
        ignored = (Operational,) if rounding else (Operational, Rounding)
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not any(mark is other for mark in field.metadata for other in ignored)
        }

    @classmethod
    def rounding_fields(cls) -> frozenset[str]:
        """Return the names of the fields that change only the rounding of sums."""
        return frozenset(
            name for name, field in cls.model_fields.items() if any(mark is Rounding for mark in field.metadata)
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
