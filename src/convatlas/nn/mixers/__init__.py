"""Layers that keep the shape of their input: attention, gates and token mixers."""
