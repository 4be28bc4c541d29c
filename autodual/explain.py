"""A table, and a picture, of a dual network: every node, its rule and how it was bounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import networkx as nx
from torch import Tensor, nn

from autodual.bounds.run import Run
from autodual.graph import Graph, Node
from autodual.primal import operator_of
from autodual.rendering import figure_class, table
from dual_layers import DualLayer, lookup, spelling

COLUMNS = ("node", "operator", "rule", "shape", "source", "bounded by")
COLOURS = {"input": "#cfe8cf", "affine": "#e8eef7", "relaxed": "#f9d9c0", "constant": "#eeeeee"}


@dataclass(frozen=True)
class Row:
    """One line of the table; ``kind`` is input, affine, relaxed or constant."""

    node: str
    operator: str
    rule: str
    shape: str
    source: str
    bounded: str
    kind: str


@dataclass(frozen=True)
class Explanation:
    """The table of a dual network's nodes. Print it, or draw it."""

    rows: tuple[Row, ...]
    graph: Graph

    def __str__(self) -> str:
        """Lay the table out in plain text."""
        lines = [COLUMNS, *((r.node, r.operator, r.rule, r.shape, r.source, r.bounded) for r in self.rows)]
        return table(lines, "l" * len(COLUMNS))

    def draw(self, path: str | Path) -> Path:
        """Draw the flow of perturbed values, inputs on top, as a picture.

        Args:
            path: where to write; the suffix picks the format (png, svg, pdf).

        Returns:
            The path written.

        Raises:
            ImportError: matplotlib is missing.
        """
        shown = {row.node: row for row in self.rows if row.kind != "constant"}
        view = self.graph.to_networkx().subgraph(shown)
        places = _places(view)
        across = 1 + max(x for x, _ in places.values()) - min(x for x, _ in places.values())
        down = 1 + max(-y for _, y in places.values())
        figure = figure_class()(figsize=(max(6.0, 3.4 * across), 0.9 * down + 0.8), layout="constrained")
        axes = figure.subplots()
        axes.axis("off")
        boxes = {}
        for name, (x, y) in places.items():
            row = shown[name]
            title = name if row.kind == "input" else f"{name} = {row.operator}"
            label = f"{title}  {row.shape}\n" + "   ".join(text for text in (row.source, row.bounded) if text not in ("", "-"))
            style = {"boxstyle": "round,pad=0.4", "facecolor": COLOURS[row.kind], "edgecolor": "#777777"}
            text = axes.text(x, y, label.strip(), ha="center", va="center", fontsize=8, bbox=style)
            boxes[name] = text.get_bbox_patch()
        for start, end in view.edges:
            drop = places[start][1] - places[end][1]
            around = drop > 1 and places[start][0] == places[end][0]  # a skip connection must clear the boxes it passes
            line = f"arc3,rad={4.4 / drop if around else 0:.2f}"
            arrow = {
                "arrowstyle": "-|>",
                "color": "#555555",
                "connectionstyle": line,
                "patchA": boxes[start],
                "patchB": boxes[end],
            }
            axes.annotate("", xy=places[end], xytext=places[start], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 1})
        xs = [x for x, _ in places.values()]
        axes.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
        axes.set_ylim(-down + 0.4, 0.6)
        figure.savefig(path, dpi=130)
        return Path(path)


def explain(graph: Graph, model: nn.Module, run: Run | None = None) -> Explanation:
    """Describe every node of a graph; with a run, its shapes and how its nodes were bounded."""
    rows = tuple(_row(node, model, run) for node in graph.nodes)
    return Explanation(rows, graph)


def _row(node: Node, model: nn.Module, run: Run | None) -> Row:
    if node.kind == "call":
        operator = operator_of(node, model)
        rule, shown = _rule(node, operator, run), spelling(operator)
    else:
        rule, shown = None, node.kind
    if node.item is not None:
        shown += f"[{node.item}]"
    perturbed = run is None or node.name in run.program.rules or node.name in run.program.sources
    if node.kind == "attribute" or not perturbed or (node.kind == "call" and rule is None):
        kind = "constant"
    elif node.kind == "input":
        kind = "input"
    else:
        kind = "affine" if rule.facts.affine else "relaxed"
    bounded = "" if run is None else run.how.get(node.name, "")
    name = rule.__name__ if rule is not None and kind in ("affine", "relaxed") else "-"
    return Row(node.name, shown, name, _shape(node, run), _source(node, model), bounded, kind)


def _rule(node: Node, operator: object, run: Run | None) -> type[DualLayer] | None:
    """Return the rule that was chosen for a node, or the operator's first where nothing is known of the inputs yet."""
    return lookup(operator) if run is None else run.program.rules.get(node.name, lookup(operator))


def _source(node: Node, model: nn.Module) -> str:
    """Return the user's line, or the path of the module where the model has no code of its own."""
    is_path = node.origin in dict(model.named_modules()) and node.origin != ""
    return f'module "{node.origin}"' if is_path else node.origin or "-"


def _shape(node: Node, run: Run | None) -> str:
    if run is None or node.name not in run.values:
        return "?"
    value = run.values[node.name]
    if not isinstance(value, Tensor):
        return type(value).__name__ if isinstance(value, (tuple, list)) else repr(value)
    sizes = [str(size) for size in value.shape]
    layout = run.layouts.get(node.name)
    if layout is not None:
        sizes[layout.axis] = "N" if layout.factor == 1 else f"{layout.factor}N"
    return f"({', '.join(sizes)})"


def _places(view: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Put each node below its latest parent; nodes of one generation side by side."""
    places = {}
    for depth, generation in enumerate(nx.topological_generations(view)):
        names = sorted(generation)
        for i, name in enumerate(names):
            places[name] = (i - 0.5 * (len(names) - 1), float(-depth))
    return places
