"""Architectures from mathematics: searches that score networks without training them."""
