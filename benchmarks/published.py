"""Reproduce published figures: clean and robust error of trained classifiers, method `autodual.Dual(strict=True)`, float32.

Beside every figure stands what its authors printed; then milliseconds per image (also as a multiple of one plain forward pass
of the same images in the same run), peak memory, the largest difference of the margins to `algorithm1.py` (float64, no code in
common) and between an image alone and in a batch. An image counts as an error unless all its margins with j != y are positive.

    python benchmarks/published.py --data DIR --models DIR                 # whole test sets
    python benchmarks/published.py --data DIR --models DIR --limit 200 --only mnist
    python benchmarks/published.py --data DIR --models DIR --radius        # certified radii beside a grid search
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import autodual
from benchmarks import algorithm1
from benchmarks.common import (
    PUBLISHED,
    Published,
    data_arguments,
    load_images,
    load_model,
    machine,
    median_seconds,
    peak_memory,
    table,
)

METHOD = autodual.Dual(strict=True)
BATCH = 100
Domain = tuple[float, float] | None


@dataclass
class Result:
    """What one classifier and region gave.

    Attributes:
        name: of the classifier.
        domain: of the region.
        images: how many were bounded.
        wrong: how many the model misclassifies.
        uncertified: how many have a margin that is not positive, the misclassified ones included.
        refused: how many ``verify`` does not certify, after its allowance for float rounding.
        milliseconds: per image.
        multiple: of one plain forward pass.
        memory: peak of the process so far, GiB.
        reference: largest difference of a margin to ``algorithm1.py``.
        alone: largest difference of a margin between an image alone and in a batch.
    """

    name: str
    domain: Domain
    images: int
    wrong: int
    uncertified: int
    refused: int
    milliseconds: float
    multiple: float
    memory: float
    reference: float = float("nan")
    alone: float = float("nan")


@torch.no_grad()
def verify_all(name: str, domain: Domain, model: nn.Module, x: Tensor, y: Tensor) -> Result:
    """Bound every image in batches and count."""
    net = autodual.certify(model)
    region = autodual.LInf(PUBLISHED[name].epsilon, domain=domain)
    net.verify(x[:2], y[:2], region, method=METHOD)  # traces and compiles
    wrong = uncertified = refused = 0
    start = time.perf_counter()
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        report = net.verify(part, labels, region, method=METHOD)
        positive = (report.margins > 0) | nn.functional.one_hot(labels, report.margins.shape[1]).bool()
        wrong += int((report.predicted != labels).sum())
        uncertified += int((~positive.all(1)).sum())
        refused += int((~report.certified).sum())
        _progress(f"{name} {domain or ''}: {wrong} wrong, {uncertified} not certified")
    seconds = time.perf_counter() - start
    batch = x[:BATCH]
    forward = median_seconds(lambda: model(batch)) / len(batch)
    _progress("")
    per_image = seconds / len(x)
    return Result(name, domain, len(x), wrong, uncertified, refused, 1000 * per_image, per_image / forward, peak_memory())


@torch.no_grad()
def compare_with_reference(name: str, domain: Domain, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest difference of a margin to Algorithm 1 in float64."""
    epsilon = PUBLISHED[name].epsilon
    ours = autodual.certify(model).margins(x, y, autodual.LInf(epsilon, domain=domain), method=METHOD).double()
    network = algorithm1.dense(model, tuple(x.shape[1:]))
    inputs = x.double().flatten(1).numpy()
    worst = 0.0
    for row, point, label in zip(ours, inputs, y.tolist(), strict=True):
        reference = torch.from_numpy(algorithm1.margins(network, point, label, epsilon, domain))
        worst = max(worst, (row - reference).abs().max().item())
        _progress(f"{name} {domain or ''}: differs from Algorithm 1 by {worst:.1e} so far")
    _progress("")
    return worst


@torch.no_grad()
def compare_alone(name: str, domain: Domain, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest difference of a margin between an image alone and in a batch."""
    net = autodual.certify(model)
    region = autodual.LInf(PUBLISHED[name].epsilon, domain=domain)
    together = net.margins(x, y, region, method=METHOD)
    alone = torch.cat([net.margins(x[i : i + 1], y[i : i + 1], region, method=METHOD) for i in range(len(x))])
    return (together - alone).abs().max().item()


@torch.no_grad()
def radius(folder: argparse.Namespace, images: int = 100, points: int = 200, largest: float = 0.2) -> bool:
    """Compare certified radii with a grid search; print both and tell whether all is well."""
    entry = PUBLISHED["mnist"]
    model = load_model(folder.models, entry)
    x, _ = load_images(folder.data, entry, min(images, folder.limit or images))
    net = autodual.certify(model)
    y = model(x).argmax(1)
    start = time.perf_counter()
    found = net.radius(x, y, max_radius=largest)
    middle = time.perf_counter()
    best = torch.zeros(len(x))
    for step in range(1, points + 1):
        epsilon = largest * step / points
        best[net.verify(x, y, autodual.LInf(epsilon)).certified] = epsilon
        _progress(f"grid search: {step} of {points}")
    _progress("")
    end = time.perf_counter()
    certified = net.verify(x, y, autodual.LInf(found)).certified | (found == 0)
    ratio = (found.mean() / best.mean()).item()
    rows = [
        ["net.radius", f"{found.mean():.5f}", f"{found.min():.5f}", f"{found.max():.5f}", f"{middle - start:.1f}"],
        [f"grid of {points}", f"{best.mean():.5f}", f"{best.min():.5f}", f"{best.max():.5f}", f"{end - middle:.1f}"],
    ]
    print(f"mnist, {len(x)} images, predicted labels, l_inf, method dual, largest radius {largest}")
    print(table(["", "mean", "smallest", "largest", "seconds"], rows))
    good = bool(certified.all()) and abs(ratio - 1) <= 0.01
    print(f"ratio of the means {ratio:.4f} (allowed 0.99..1.01), certified at r: {int(certified.sum())} of {len(x)}")
    return good


def checks(results: list[Result], *, whole: bool) -> list[str]:
    """List what does not agree with the published figures, the reference or the limits."""
    faults = []
    for result in results:
        entry, label = PUBLISHED[result.name], f"{result.name}, domain {result.domain}"
        expected = dict(entry.uncertified)[result.domain]
        if whole and result.wrong != entry.wrong:
            faults.append(f"{label}: {result.wrong} wrong, expected {entry.wrong}")
        if whole and abs(result.uncertified - expected) > 1:
            faults.append(f"{label}: {result.uncertified} not certified, expected {expected} +- 1")
        if not result.reference <= 1e-4:
            faults.append(f"{label}: margins differ from Algorithm 1 by {result.reference:.1e}")
        if not result.alone <= 1e-4:
            faults.append(f"{label}: an image alone and in a batch differ by {result.alone:.1e}")
        if result.memory > 3:
            faults.append(f"{label}: peak memory {result.memory:.1f} GiB")
    return faults


def main() -> None:
    """Print the table."""
    parser = data_arguments(__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="only the first images of each test set")
    parser.add_argument("--only", choices=sorted(PUBLISHED), help="only this classifier")
    parser.add_argument("--reference", type=int, default=50, help="images to compare with algorithm1.py")
    parser.add_argument("--radius", action="store_true", help="compare certified radii with a grid search instead")
    arguments = parser.parse_args()
    for folder in (arguments.data, arguments.models):
        if not folder.is_dir():
            parser.error(f"no such folder: {folder}")
    if arguments.radius:
        raise SystemExit(not radius(arguments))
    chosen = {arguments.only: PUBLISHED[arguments.only]} if arguments.only else PUBLISHED
    jobs = [(name, entry, domain) for name, entry in chosen.items() for domain, _ in entry.uncertified]
    results = [_first(name, entry, domain, arguments) for name, entry, domain in jobs]
    for result, (name, entry, domain) in zip(results, jobs, strict=True):  # afterwards, so that memory is the library's own
        model = load_model(arguments.models, entry)
        x, y = load_images(arguments.data, entry, arguments.reference)
        result.reference = compare_with_reference(name, domain, model, x, y)
        result.alone = compare_alone(name, domain, model, x[:16], y[:16])
    print(_table(results))
    print(
        "\npublished: clean and robust error its authors printed; open: not certified; refused: not certified by verify(),\n"
        f"which subtracts a float allowance; x fwd: multiples of one plain forward pass, batches of {BATCH}; |alg 1|: margins\n"
        f"of {arguments.reference} images against algorithm1.py; |alone|: an image alone and in a batch. {machine()}"
    )
    faults = checks(results, whole=arguments.limit is None)
    print("faults: " + ("; ".join(faults) or "none"))
    raise SystemExit(bool(faults))


def _first(name: str, entry: Published, domain: Domain, arguments: argparse.Namespace) -> Result:
    x, y = load_images(arguments.data, entry, arguments.limit)
    return verify_all(name, domain, load_model(arguments.models, entry), x, y)


def _table(results: list[Result]) -> str:
    header = ["model", "eps", "domain", "images", "wrong", "clean %", "published", "open", "robust %", "published", "refused"]
    header += ["ms/image", "x fwd", "GiB", "|alg 1|", "|alone|"]
    rows = []
    for result in results:
        entry, percent = PUBLISHED[result.name], 100 / result.images
        rows.append(
            [
                result.name,
                f"{entry.epsilon}",
                "-" if result.domain is None else "{:g}..{:g}".format(*result.domain),
                f"{result.images}",
                f"{result.wrong}",
                f"{percent * result.wrong:.2f}",
                f"{entry.clean_error:.2f}",
                f"{result.uncertified}",
                f"{percent * result.uncertified:.2f}",
                f"{entry.robust_error:.2f}",
                f"{result.refused}",
                f"{result.milliseconds:.1f}",
                f"{result.multiple:.0f}",
                f"{result.memory:.2f}",
                f"{result.reference:.0e}",
                f"{result.alone:.0e}",
            ]
        )
    return table(header, rows)


def _progress(text: str) -> None:
    """Overwrite one line on a terminal; say nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
