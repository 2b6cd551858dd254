"""lm-evaluation-harness: its requests in, answers and likelihoods out. Only `harness.model` imports `lm_eval`."""
