"""The steps of `potstill demo`."""
