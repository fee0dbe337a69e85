"""`potstill import tokens`: token ids that another program wrote -> tokens stores (run.py)."""
