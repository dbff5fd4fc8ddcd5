"""Values of settings out of text, TOML or flags, by the type of their field, and back to text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from pdbatch.errors import ConfigError

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})

Value = None | bool | int | float | str | Path | tuple[str, ...]


def read_value(name: str, type_name: str, value: object) -> Value:
    """`value` as the field `name` of type `type_name` wants it; None for an empty text.

    Raises ConfigError that names the field and says what it takes.
    """
    if value is None or value == "":
        return None
    kind = type_name.removesuffix(" | None")
    try:
        if kind == "bool":
            return _read_bool(value)
        if kind == "int":
            return _read_size(value) if name.endswith("_bytes") else _read_int(value)
        if kind == "float":
            return _read_float(value)
        if kind.startswith("tuple"):
            return _read_names(value)
    except ValueError as error:
        raise ConfigError(f"{name} takes {error}, not {value!r}") from None
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name} takes a text, not {value!r}")
    if kind == "Path":
        return Path(value).expanduser()
    return _read_choice(name, kind, str(value))


def write_value(value: Value) -> str:
    """The text that `read_value` reads as `value`."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)


def _read_choice(name: str, kind: str, value: str) -> str:
    choices = _CHOICES.get(name)
    if choices is None:
        return value
    if (chosen := value.strip().lower()) not in choices:
        raise ConfigError(f"{name} takes {' or '.join(choices)}, not {value!r}")
    return chosen


def _read_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError("true or false")


def _read_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("a whole number") from None


def _read_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(value).lower())
    if match and (factor := (_UNITS | _BINARY_UNITS).get(match[2])):
        return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    raise ValueError("a number of bytes such as 268435456 or 256MiB")


def _read_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


def _read_names(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("names with commas between them")
    return tuple(name.strip() for name in names if name.strip())


_CHOICES: Final = {
    "role": ("prefill", "decode", "mixed"),
    "log_level": ("debug", "info", "warning", "error"),
    "engine": ("auto", "null"),
    "quantization": ("wint8", "wint4"),
    "compile": ("auto", "on", "off"),
}
