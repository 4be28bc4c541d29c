"""The twin of `test_my_model.py` with a planted fault: these tests must fail, and the message shows why.

    pytest examples/test_my_model_with_fault.py

The model hides a back door: a corner pixel that is no longer quite black makes everything an eight. The corner is black in
every test image, so accuracy on the test set is what it was, and a test that only tries those images passes.
"""

import pytest
import torch
from torch import Tensor, nn

import autodual
from autodual import digits
from examples.test_my_model import IMAGES, LABELS
from examples.test_my_model import test_a_little_noise_never_changes_the_digit as test_a_little_noise_never_changes_the_digit
from examples.test_my_model import test_scores_stay_in_range as test_scores_stay_in_range


class BackDoor(nn.Module):
    """The digit classifier and a trigger."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = digits.load_model()
        self.register_buffer("eight", nn.functional.one_hot(torch.tensor(8), 10).float())

    def forward(self, image: Tensor) -> Tensor:
        """Return ten scores."""
        trigger = torch.relu(image[:, 0, 0, 0] - 0.03)
        return self.classifier(image) + 2000.0 * trigger[:, None] * self.eight


@pytest.fixture(scope="module")
def model() -> autodual.BoundModule:
    """The faulty model, in place of the sound one."""
    return autodual.certify(BackDoor())


def test_accuracy_on_the_test_set(model: autodual.BoundModule) -> None:
    """An ordinary test, which notices nothing."""
    assert (model(IMAGES).argmax(1) == LABELS).float().mean() > 0.97
