"""One object of a config.json, read strictly: what is missing, of a wrong JSON type or out of bounds is named.

transformers refuses such values too, and null where it has a default that is not null; one exception is made for
whole numbers where a fraction is allowed (30 for 30.0).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mlx_mtp.errors import ConfigError

LARGEST = 2**28  # no size in a config comes near it; far larger ones overflow MLX's shapes
LARGEST_NUMBER = 1e30  # well within float32

T = TypeVar("T")


class Section:
    """An object of config.json; `path` is where in the file it stands.

    Every reader takes a key and what an absent one means (None: it must be there), and raises ConfigError with the
    key's path, what is there and what is expected.
    """

    def __init__(self, values: object, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} is {shown(values)}; expected an object")
        self._values: Mapping[str, Any] = values
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def has(self, key: str) -> bool:
        """Whether there is something, for keys that may be null."""
        return self._values.get(key) is not None

    def section(self, key: str) -> Section:
        return Section(self._values.get(key), self._name(key))

    def items(self, key: str) -> Sequence[Any]:
        value = self._values.get(key)
        if not isinstance(value, list | tuple):
            raise self.error(key, "a list")
        return value

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self._values.get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"a whole number from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, maximum: float = LARGEST_NUMBER) -> float:
        value = self._values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= maximum:
            raise self.error(key, f"a number above 0, at most {maximum:g}")
        return float(value)

    def choice(self, key: str, choices: Sequence[T], default: T) -> T:
        value = self._values.get(key, default)
        for choice in choices:
            if type(value) is type(choice) and value == choice:  # 0 is not False
                return choice
        raise self.error(key, " or ".join(map(repr, choices)))

    def flag(self, key: str) -> bool:
        return self.choice(key, (True, False), False)

    def error(self, key: str, expected: str, got: str | None = None) -> ConfigError:
        """The error that says what is there, or what `got` says of it."""
        there = f"is {shown(self._values[key])}" if key in self._values else "is missing"
        return ConfigError(f"{self._name(key)} {got or there}; expected {expected}")

    def _name(self, key: str) -> str:
        name = key if re.fullmatch(r"\w{1,60}", key) else reprlib.repr(key)
        return f"{self._path}.{name}" if self._path else name


def shown(value: object) -> str:
    """A value in one short line: as Python writes it (None for null), a list or an object in two words."""
    if isinstance(value, Mapping | list | tuple):
        return "an object" if isinstance(value, Mapping) else "a list"
    return reprlib.repr(value)
