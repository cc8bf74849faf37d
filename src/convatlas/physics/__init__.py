"""Physics: operators learned from pairs of fields, solvers, simulators' surrogates."""
