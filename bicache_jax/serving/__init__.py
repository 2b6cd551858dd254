"""From requests to results: grouping, balance, plan, memory, programs, placement, prefix store, engine."""
