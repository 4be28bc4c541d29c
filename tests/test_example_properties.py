"""The example of a property-based test passes; its twin with a planted fault fails and says why."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("examples/test_my_model.py", "examples/test_my_model_with_fault.py")


def test_the_sound_model_passes_and_the_faulty_one_fails_with_margin_and_counterexample():
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *FILES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("examples/") and "::" in line]
    for file, expected in zip(FILES, ([], ["a_little_noise_never_changes_the_digit", "scores_stay_in_range"]), strict=True):
        own = [(name, verdict) for name, verdict in verdicts if name.startswith(f"{file}::")]
        assert len(own) == 3
        assert [name.rpartition("::test_")[2] for name, verdict in own if verdict != "PASSED"] == expected
    assert "examples are not certified over LInf(" in result.stdout
    assert "worst margin    -" in result.stdout
    assert "prediction 8, margin -" in result.stdout
    assert "x[0, 0, 0, 0] 0 -> 0.0" in result.stdout  # the corner pixel that opens the back door, and no other
    assert "replay        error.counterexample.inputs" in result.stdout
