"""The `potstill` command: it reads options, calls one stage and ends with an honest code. No logic of a stage."""
