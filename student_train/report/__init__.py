"""The page of charts that `potstill report` writes."""
