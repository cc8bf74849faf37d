"""Physics: fields that follow equations, and networks that stand for their solvers."""
