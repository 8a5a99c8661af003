"""The readers of the named sets by their name in version 0.1."""

from ticketlab.datasets import SOURCES, Augmentation, Raw, Source, read
from ticketlab.idx import read_cifar10, read_idx, read_mnist

__all__ = ["SOURCES", "Augmentation", "Raw", "Source", "read", "read_cifar10", "read_idx", "read_mnist"]
