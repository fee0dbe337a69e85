"""`potstill import targets`: targets that another program wrote -> a targets store over a tokens store (run.py)."""
