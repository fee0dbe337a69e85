"""How documents become rows: one file per rule, and one table of them."""
