"""The library's own exceptions. Each says what was found, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class AutoDualError(Exception):
    """Base of every error that AutoDual raises on purpose."""


class TraceError(AutoDualError):
    """The model could not be turned into a graph that is proven to compute the same function."""


class UnsupportedOperatorError(AutoDualError):
    """Some operators have no dual layer; the message lists all of them.

    Attributes:
        nodes: one (operator, node name, source line, what to do) per unsupported node.
    """

    def __init__(self, nodes: Sequence[tuple[str, str, str, str]]) -> None:
        self.nodes = tuple(nodes)
        count = f"{len(nodes)} operator has" if len(nodes) == 1 else f"{len(nodes)} operators have"
        columns = [max(len(row[i]) for row in self.nodes) for i in range(3)]
        rows = [
            f'  {operator:<{columns[0]}}  node "{name}"{" " * (columns[1] - len(name))}  {origin:<{columns[2]}}  {advice}'
            for operator, name, origin, advice in self.nodes
        ]
        super().__init__(f"{count} no dual layer:\n" + "\n".join(rows))


class SpecificationError(AutoDualError, ValueError):
    """An input, a label, a region or a specification does not fit the model."""


class CertificateError(AutoDualError, TypeError):
    """Something that proves nothing was offered as a proof."""


class TrainingError(AutoDualError, RuntimeError):
    """A training run cannot go on, or cannot be resumed; its last checkpoint is untouched."""
