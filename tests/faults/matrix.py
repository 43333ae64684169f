"""All rows of the matrix, in the order of the table."""

from tests.faults import clients, lies, lost, misfits, network, slots
from tests.faults.stage import ROWS

__all__ = ["ROWS", "clients", "lies", "lost", "misfits", "network", "slots"]
