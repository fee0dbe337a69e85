"""The student: backbone, head and loss in one module, its first weights, and checks before it trains."""
