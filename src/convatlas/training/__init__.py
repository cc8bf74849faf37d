"""Tasks, the runs that train them, and methods that change how a network is trained."""
