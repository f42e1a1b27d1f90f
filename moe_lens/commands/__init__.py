"""The commands of `moe-lens`, a file each: `add` says which options it takes, `run` does it and gives the exit status.

What takes long to import is imported in `run`, so that `--help` and a mistyped command answer at once.
"""
