"""The examples that draw pictures run, write what they name and do not refute their own claims."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG"
RUNS = [
    ("cascade.py", ("--grid", "41"), "cascade.png", ("cascade.png",)),
    ("analysis.py", ("--count", "40", "--points", "3"), "", ("index_sets.png", "filters.png", "accuracy.png", "radii.png")),
    ("plane.py", (), "", ("plane.png", "polytopes.png")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "output", "pictures"), RUNS, ids=[run[0] for run in RUNS])
def test_an_example_draws(tmp_path, script, arguments, output, pictures):
    command = [sys.executable, f"examples/{script}", *arguments, "--output", str(tmp_path / output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(PNG)
