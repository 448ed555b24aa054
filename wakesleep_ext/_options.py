"""Command-line options for the fields of a dataclass, of which only those that were given are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypedDict, get_type_hints


def options_of(config: type[Any], bases: Mapping[str, Any], without: frozenset[str] = frozenset()) -> Any:
    """Return a `TypedDict` with one optional key for each field of a dataclass.

    The parser leaves out the keys that the command line does not name. So whatever the user chose as a base can supply
    them afterwards, and one pass over the command line is enough.

    Args:
        config: a dataclass whose fields have docstrings.
        bases: instances of it by name. The help shows what each of them has for a field.
        without: fields that are no options.
    """
    import tyro
    from docstring_parser import parse_from_object

    described = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for parameter in parse_from_object(config).params
    }
    hints = get_type_hints(config)
    keys = {}
    for name in (field.name for field in fields(config) if field.name not in without):
        argument = tyro.conf.arg(help=described.get(name), help_behavior_hint=_defaults(name, bases))
        keys[name] = Annotated[hints[name], argument]
    return TypedDict(f"{config.__name__}Options", keys, total=False)  # type: ignore[operator]


def _defaults(field: str, bases: Mapping[str, Any]) -> str:
    """Say what the bases have for a field: "(default: 3)", or "(digits: 500, mnist: 100)"."""
    by_base = {name: _as_typed(getattr(base, field)) for name, base in bases.items()}
    values = set(by_base.values())
    told = f"default: {values.pop()}" if len(values) == 1 else ", ".join(f"{n}: {v}" for n, v in by_base.items())
    return f"({told})"


def _as_typed(value: object) -> str:
    """The value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
