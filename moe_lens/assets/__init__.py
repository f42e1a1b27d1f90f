"""Data that comes with the package: the bundled model (`mini/`) and its held-out text (`heldout.jsonl`).

Both are made by `scripts/train_mini.py`; `mini/README.md` says how, with figures.
"""
