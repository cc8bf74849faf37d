"""Recognise what an image shows."""
