"""Look inside any model: what it computes, and why it answers as it does."""
