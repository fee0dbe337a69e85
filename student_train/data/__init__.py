"""From stores to the tensors of a micro-batch."""
