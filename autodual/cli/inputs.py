"""Models, weights and data named on the command line. Whatever is wrong with them is said in one line."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autodual import digits
from autodual.cli.common import CommandError, positive

SAVE = "save model.state_dict() instead: torch.save(model.state_dict(), path)"
SHOWN = 8  # keys of a file that a message lists


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model and its weights."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="FILE.py:NAME",
        help="function without arguments that returns the nn.Module (or the module itself); package.module:NAME works too",
    )
    group.add_argument("--weights", type=Path, metavar="FILE", help="state_dict to load: .pt/.pth (torch.save) or .npz")


def load_model(builder: str, weights: Path | None, dtype: torch.dtype, where: torch.device) -> nn.Module:
    """Build a model, load its weights, set evaluation mode.

    Args:
        builder: ``path.py:name`` or ``package.module:name``.
        weights: a ``state_dict`` file, or None to keep what the builder made.
        dtype: floating-point type of the parameters.
        where: device of the parameters.

    Raises:
        CommandError: a file or a name is missing, or the weights do not fit.
    """
    model = _build(builder)
    if weights is not None:
        state = _read_state(weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CommandError(f"{weights} does not fit the model of {builder}: {problems[0]}{more}") from error
    return model.to(device=where, dtype=dtype).eval()


def _build(builder: str) -> nn.Module:
    place, separator, name = builder.rpartition(":")
    if not separator or not place or not name:
        raise CommandError(f"--model {builder!r}: write FILE.py:NAME, for example model.py:build")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        known = ", ".join(key for key in vars(module) if not key.startswith("_") and callable(getattr(module, key)))
        raise CommandError(f"{place} has no {name!r}; it has {known or 'nothing to call'}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        made = _call_builder(made, builder)
    if not isinstance(made, nn.Module):
        raise CommandError(f"--model {builder}: expected an nn.Module, got {type(made).__name__}")
    return made


def _call_builder(function: Any, builder: str) -> Any:
    if not callable(function):
        raise CommandError(f"--model {builder}: expected a function or an nn.Module, got {type(function).__name__}")
    try:
        return function()
    except Exception as error:  # a user's code may raise anything; one line must name it
        raise CommandError(f"--model {builder}: calling it without arguments raised {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise CommandError(f"--model: no such file: {path}")
    name = f"_autodual_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"--model: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their own module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as `python FILE.py` would, so that it finds its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"--model: importing {path} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _import_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise CommandError(f"--model: importing {name} raised {type(error).__name__}: {error}") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CommandError(f"--weights: no such file: {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt files fail in many ways
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            reason = f"it holds Python objects, perhaps a whole model, which are not loaded; {SAVE}"
        else:
            reason = str(error).splitlines()[0]
        raise CommandError(f"--weights: cannot read {path}: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CommandError(f"--weights: {path} holds no state_dict (a dict of tensors) but a {type(state).__name__}; {SAVE}")
    if not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(state)[:SHOWN])) + (", ..." if len(state) > SHOWN else "")
        raise CommandError(f"--weights: {path} holds no state_dict (a dict of tensors): it holds the keys {keys}; {SAVE}")
    return state


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name inputs and labels."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE.npz",
        help="inputs 'x' (N, ...) and labels 'y' (N,); or the word digits",
    )
    group.add_argument(
        "--keys", nargs=2, default=("x", "y"), metavar=("X", "Y"), help="their names in the file, if others than x y"
    )
    group.add_argument(
        "--scale", type=float, metavar="S", help="divide the stored inputs by S: 255 for 8-bit pixels; needed for integers"
    )
    group.add_argument(
        "--shape", nargs="+", type=positive, metavar="D", help="shape of one input, e.g. 1 28 28, if stored in another"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N examples")


def load_data(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Read inputs and labels as the flags of ``add_data_options`` say.

    Returns:
        ``x``, floating point and scaled, in the asked dtype and on the asked device, and ``y``, int64.

    Raises:
        CommandError: the file is missing or unreadable, lacks a key, or its arrays do not fit each other.
    """
    path, (x_key, y_key) = arguments.data, arguments.keys
    if str(path) == "digits":
        return tuple(part[: arguments.limit].to(arguments.device) for part in _digits(arguments.dtype))
    if not path.is_file():
        raise CommandError(f"--data: no such file: {path}")
    if path.suffix == ".npy":
        raise CommandError(f"--data: {path} holds one array; put inputs and labels together: np.savez('data.npz', x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            missing = [key for key in (x_key, y_key) if key not in names]
            if missing:
                raise CommandError(f"--data: {path} has no {missing[0]!r}; it has {', '.join(names)} (name them by --keys X Y)")
            x, y = arrays[x_key][: arguments.limit], arrays[y_key][: arguments.limit]
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"--data: cannot read {path} as .npz: {str(error).splitlines()[0]}") from error
    _check_data(path, x, y, arguments)
    inputs = torch.from_numpy(x).to(arguments.dtype) / (arguments.scale or 1.0)
    if arguments.shape:
        inputs = inputs.reshape(len(inputs), *arguments.shape)
    return inputs.to(arguments.device), torch.from_numpy(y.astype(np.int64)).to(arguments.device)


def _digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = digits.load_test_set()
    return x.to(dtype), y


def _check_data(path: Path, x: np.ndarray, y: np.ndarray, arguments: argparse.Namespace) -> None:
    if x.ndim < 2 or x.dtype.kind not in "uif":
        raise CommandError(f"--data: {path}: inputs must be numbers of shape (N, ...), got {x.dtype} {x.shape}")
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise CommandError(f"--data: {path}: labels must be integers of shape (N,), got {y.dtype} {y.shape}")
    if len(x) != len(y):
        raise CommandError(f"--data: {path}: {len(x)} inputs but {len(y)} labels")
    if arguments.scale is None and x.dtype.kind != "f":
        raise CommandError(
            f"--data: {path}: inputs are {x.dtype}, 0..{x.max(initial=0)}; say what to divide by, e.g. --scale 255"
        )
    if arguments.scale is not None and not 0 < arguments.scale < float("inf"):
        raise CommandError(f"--scale must be a positive number, got {arguments.scale}")
    if arguments.shape and int(np.prod(arguments.shape)) != int(np.prod(x.shape[1:])):
        raise CommandError(f"--shape {' '.join(map(str, arguments.shape))}: the stored inputs have shape {x.shape[1:]}")
