"""Attacks on models and on what they are fed, and the defences against them."""
