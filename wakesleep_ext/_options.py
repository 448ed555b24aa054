"""Define command-line options from the fields of a dataclass. The parser returns only the options that are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypedDict, get_type_hints


def options_of(config: type[Any], bases: Mapping[str, Any], without: frozenset[str] = frozenset()) -> Any:
    """Return a `TypedDict` with one optional key for each field of a dataclass.

    The parser omits options that are not on the command line. Their values come from a base, such as a recipe, which
    the command selects after parsing. So the command line is parsed only once.

    Args:
        config: a dataclass whose fields have docstrings.
        bases: instances of the dataclass, keyed by name. The help shows their values as defaults.
        without: names of fields that get no option.
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
    """Format the values of a field in all bases: "(default: 3)" if they are equal, else "(digits: 500, mnist: 100)"."""
    by_base = {name: _as_typed(getattr(base, field)) for name, base in bases.items()}
    values = set(by_base.values())
    told = f"default: {values.pop()}" if len(values) == 1 else ", ".join(f"{n}: {v}" for n, v in by_base.items())
    return f"({told})"


def _as_typed(value: object) -> str:
    """Format a value as a user types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
