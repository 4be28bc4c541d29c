"""The example of a property-based test passes; its twin with a planted fault fails and says why."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_example(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"examples/{name}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_sound_model_passes():
    result = run_example("test_my_model.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def test_the_faulty_model_fails_with_margin_and_counterexample():
    result = run_example("test_my_model_with_fault.py")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 failed, 1 passed" in result.stdout
    assert "examples are not certified over LInf(" in result.stdout
    assert "worst margin    -" in result.stdout
    assert "prediction 8, margin -" in result.stdout
    assert "x[0, 0, 0, 0] 0 -> 0.0" in result.stdout  # the corner pixel that opens the back door, and no other
    assert "replay        error.counterexample.inputs" in result.stdout
