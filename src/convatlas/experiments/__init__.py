"""One small experiment per system, which tests the central claim of its paper and says honestly what it found.

Every module has ``run(budget, *, data=None, folder=None) -> Report``: "quick" takes at most two minutes on two cores
and built-in real data, "full" the paper's own setting on the user's data. Thresholds stand at the top of a module,
fixed before anything is measured.
"""
