"""The parts of `potstill inspect`."""
