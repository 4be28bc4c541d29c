"""Verification inside a test suite: assertions that a property holds on whole regions, and hypothesis strategies.

    def test_small_noise_changes_nothing():
        assert_certified(model, x, y, autodual.LInf(0.05))

The strategies need hypothesis: ``pip install 'autodual[testing]'``.
"""

from autodual.testing.assertions import Counterexample, NotCertifiedError, assert_certified, assert_output
from autodual.testing.strategies import inputs, networks, regions

__all__ = ["Counterexample", "NotCertifiedError", "assert_certified", "assert_output", "inputs", "networks", "regions"]
