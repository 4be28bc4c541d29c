"""The folder of a run: checkpoints that are whole at any moment, a log that never runs ahead of them, a summary."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodual.errors import TrainingError
from autodual.training.config import Config, differences

VERSION = 1
"""Of the format of ``last.pt``."""

FREE = ("minutes", "model", "data.train", "data.test")
"""Settings that may change when a run is resumed: they say how long and from which place, not what is computed."""


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: whoever reads it, even after a crash, finds the old content or the new one."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    except OSError:
        pass  # some file systems have no such thing
    finally:
        os.close(folder)


def serialized(content: Any) -> bytes:
    """Return what ``torch.save`` would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Folder:
    """A run's folder.

    ``config.toml`` the settings; ``log.csv`` one line per epoch; ``last.pt`` all that a run needs to go on; ``best.pt`` a plain
    state dict; ``summary.json`` and ``curves.png`` what came out.

    Attributes:
        path: the folder; made when first written to.
        columns: of the log.
    """

    path: Path
    columns: tuple[str, ...]

    @property
    def last(self) -> Path:
        """The full checkpoint."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The weights of the best evaluation."""
        return self.path / "best.pt"

    @property
    def log(self) -> Path:
        """The table of all epochs."""
        return self.path / "log.csv"

    def begin(self, config: Config) -> None:
        """Start a new run.

        Raises:
            TrainingError: the folder holds another run.
        """
        if self.last.exists():
            raise TrainingError(f"{self.path} holds a run: go on with it (--resume, resume=True) or name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.toml", config.to_toml().encode())
        write_whole(self.log, (",".join(self.columns) + "\r\n").encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns).writerow(row)
        with self.log.open("ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the full checkpoint, with the length of the log that belongs to it."""
        write_whole(self.last, serialized({"version": VERSION, "log": self.log.stat().st_size, **state}))

    def load(self) -> dict[str, Any]:
        """Read the full checkpoint.

        Raises:
            TrainingError: it cannot be read, or has another format.
        """
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:  # corrupt files fail in many ways
            raise TrainingError(f"cannot read {self.last}: {str(error).splitlines()[0]}") from error
        if not isinstance(state, dict) or state.get("version") != VERSION:
            found = state.get("version") if isinstance(state, dict) else None
            raise TrainingError(f"{self.last} has format {found}, this version of AutoDual reads {VERSION}: train anew")
        return state

    def cut(self, length: int) -> list[dict[str, Any]]:
        """Take back the lines that the log got after the checkpoint, and return those that stay.

        Raises:
            TrainingError: lines are missing.
        """
        size = self.log.stat().st_size if self.log.exists() else 0
        if size < length:
            raise TrainingError(f"{self.log} has {size} bytes, but {length} when the checkpoint was made: restore it")
        with self.log.open("r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())
        with self.log.open(newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        """Write the best weights as a plain state dict."""
        write_whole(self.best, serialized(dict(weights)))

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Write the summary."""
        write_whole(self.path / "summary.json", (json.dumps(content, indent=1) + "\n").encode())


def check_same(saved: Mapping[str, Any], config: Config) -> None:
    """See that a run is resumed with the settings it was begun with.

    Raises:
        TrainingError: they differ; names how.
    """
    lines = [line for line in differences(saved, config.as_dict()) if not line.startswith(tuple(f"{name} " for name in FREE))]
    if lines:
        raise TrainingError(
            f"the run was begun with other settings: {'; '.join(lines)}. Resume with the old ones, or train anew"
        )
