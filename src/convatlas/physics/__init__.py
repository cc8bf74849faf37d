"""Physics: linear systems of simulations and learned solvers."""
