"""Bulk inference: inputs larger than memory, several workers, restarts. The program is `scripts/batch_inference.py`.

files -> windows.py -> (division over workers) -> (engine) -> state.py -> one output per input, in input order
"""
