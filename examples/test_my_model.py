"""Property-based tests of a model, each proved for whole regions of inputs instead of tried at points.

    pytest examples/test_my_model.py

Put your own model in place of the digit classifier. Hypothesis picks the image and the region, AutoDual covers every input
of that region; `test_my_model_with_fault.py` shows what a failure looks like.
"""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import autodual
from autodual import digits
from autodual.testing import assert_certified, assert_output, inputs, regions

IMAGES, LABELS = digits.load_test_set()
REFERENCE = [1, 5, 2, 8, 9, 3, 17, 20, 21, 25]  # images the product must get right
proved = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.fixture(scope="module")
def model() -> autodual.BoundModule:
    """The dual network of the classifier under test; tracing it once is enough."""
    return autodual.certify(digits.load_model())


@proved
@given(index=st.sampled_from(REFERENCE), region=regions(norms=("linf",), max_radius=0.05))
def test_a_little_noise_never_changes_the_digit(model: autodual.BoundModule, index: int, region: autodual.Region) -> None:
    """A twentieth of the range from black to white, on every pixel at once, in any direction."""
    assert_certified(model, IMAGES[index : index + 1], LABELS[index : index + 1], region)


@proved
@given(index=st.sampled_from(REFERENCE), radius=st.floats(0.0, 0.2))
def test_a_smudge_never_changes_the_digit(model: autodual.BoundModule, index: int, radius: float) -> None:
    """A change of small Euclidean length, which may be concentrated on a few pixels."""
    region = autodual.L2(radius, domain=(0.0, 1.0))
    assert_certified(model, IMAGES[index : index + 1], LABELS[index : index + 1], region)


@proved
@given(image=inputs((1, 1, 8, 8)))
def test_scores_stay_in_range(model: autodual.BoundModule, image: Tensor) -> None:
    """Whatever is shown to it, the classifier's scores fit the display."""
    assert_output(model, image, autodual.LInf(0.1, domain=(0.0, 1.0)), lower=-100.0, upper=100.0)
