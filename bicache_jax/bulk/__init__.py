"""Bulk inference: inputs larger than memory, several workers, restarts. The command is `bicache batch`.

files -> windows.py -> (division over workers) -> (engine) -> state.py -> one output per input, in input order
"""
