"""A whole store: its description, writing, sealing, reading and looking after."""
