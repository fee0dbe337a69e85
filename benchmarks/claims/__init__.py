"""What the methods of the papers do here: one file per claim, and what all claims share.

    python -m benchmarks.claims --all --data ../shared/data --work runs/claims
    python -m benchmarks.claims --claim salt --seeds 11,12,13

base.py has the words (a claim, its arms, its findings), runs.py the runs, paired.py the comparisons, report.py and
svg.py what is written of them, table.py the list of claims.
"""
