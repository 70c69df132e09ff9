"""What a user may set, by flag, by /set or in a file; and where a user's files lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_mtp.chat.conversation import write_whole
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.errors import RequestError

Thinking = Literal["on", "off", "hide"]
SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name != "stop")
NAMES = (*SAMPLING, "num_draft_tokens", "thinking")
SHORT = {"temp": "temperature"}  # as the flag is called


@dataclass(frozen=True)
class Settings:
    """thinking: off does not ask for thoughts, hide asks for them and shows none."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_draft_tokens: Any = EngineConfig().num_draft_tokens
    thinking: Thinking = "off"

    def __post_init__(self) -> None:
        EngineConfig(num_draft_tokens=self.num_draft_tokens)
        if self.thinking not in get_args(Thinking):
            raise RequestError(f"thinking is {self.thinking!r}; expected on, off or hide")

    def with_value(self, name: str, value: object) -> Settings:
        """One setting changed; text is read as a number if it is one. Raises RequestError for what cannot be."""
        name = SHORT.get(name.replace("-", "_"), name.replace("-", "_"))
        if name not in NAMES:
            raise RequestError(f"there is no setting {name!r}; expected one of {', '.join(NAMES)}")
        changed: dict[str, Any] = {name: _number(value) if isinstance(value, str) else value}
        if name in SAMPLING:
            return replace(self, sampling=replace(self.sampling, **changed))
        return replace(self, **changed)

    def with_values(self, values: Mapping[str, object]) -> Settings:
        settings = self
        for name, value in values.items():
            settings = settings.with_value(name, value)
        return settings

    def values(self) -> dict[str, Any]:
        """Every setting by name."""
        return {name: getattr(self.sampling if name in SAMPLING else self, name) for name in NAMES}


@dataclass(frozen=True)
class Folders:
    """settings: the file that `/set save` writes. history: what was typed. conversations: a folder of files."""

    settings: Path
    history: Path
    conversations: Path

    @staticmethod
    def of_user() -> Folders:
        from platformdirs import PlatformDirs  # not needed before something is read or written

        user = PlatformDirs("mlx_mtp", appauthor=False)
        return Folders(user.user_config_path / "chat.json", user.user_state_path / "chat_history",
                       user.user_data_path / "conversations")


def load(path: Path) -> Settings:
    """The settings in a file; the defaults if there is none. Raises RequestError for a file that is broken."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise RequestError(f"expected an object with some of {', '.join(NAMES)}")
        return Settings().with_values(raw)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError, RequestError) as error:
        raise RequestError(f"{path} cannot be used ({error}): fix or delete it") from error


def save(settings: Settings, path: Path) -> None:
    """Writes what differs from the defaults. Raises RequestError if that cannot be done."""
    defaults = Settings().values()
    changed = {name: value for name, value in settings.values().items() if value != defaults[name]}
    write_whole(path, json.dumps(changed, indent=1) + "\n")


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
