"""All models of the zoo, by name: importing this module fills ``ZOO``."""

from tests.zoo import attention, gates, images, normalised, perceptrons, sequences, sets, styles, systems
from tests.zoo.entry import ZOO, Entry

FAMILIES = (perceptrons, images, attention, sequences, gates, normalised, systems, sets, styles)

__all__ = ["FAMILIES", "ZOO", "Entry"]
