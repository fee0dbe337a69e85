"""Which row comes when, and reading ahead."""
