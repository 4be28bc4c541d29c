"""Where in the user's own code something happened: the last stack frame outside PyTorch and this library."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

import dual_layers

_HERE = Path(__file__).parent
_LIBRARY = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(dual_layers.__file__).parent, _HERE))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_STACK_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def is_library(filename: str) -> bool:
    """Whether a file belongs to PyTorch, to this library or to Python itself."""
    if is_torch(filename) or filename.startswith("<frozen") or "/site-packages/numpy/" in filename:
        return True
    return filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename


def is_torch(filename: str) -> bool:
    """Whether a file belongs to PyTorch or to this library."""
    # By name as well, since a virtual environment may reach its packages through several paths.
    return filename.startswith(_LIBRARY) or filename.startswith("torch/") or "/site-packages/torch/" in filename


def place(filename: str, line: int) -> str:
    """Write a source line the way it is read: relative to the working directory, else the bare file name."""
    path = Path(filename)
    if path.is_absolute() and path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return f"{path.relative_to(Path.cwd())}:{line}"
    return f"{path.name}:{line}"


def current_origin(stop: CodeType) -> str:
    """Return the innermost user line between here and the frame that runs ``stop``, or an empty text."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not stop:
        if not is_library(frame.f_code.co_filename):
            return place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def failure_origin(traceback: TracebackType | None, stop: CodeType) -> str:
    """Return the innermost user line that an exception passed through below the frame of ``stop``."""
    origin, below = "", False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        below = below or code is stop
        if below and not is_library(code.co_filename):
            origin = place(code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return origin


def recorded_origin(stack_trace: str | None) -> str:
    """Return the innermost user line of a stack trace that was kept as text."""
    lines = [(match["file"], int(match["line"])) for match in _STACK_LINE.finditer(stack_trace or "")]
    users = [line for line in lines if not is_library(line[0])]
    return place(*users[-1]) if users else ""
