"""Neural operators and the networks that they are compared with.

Berner, Liu-Schiaffini, Kossaifi, Duruisseaux, Bonev, Azizzadenesheli, Anandkumar: "Principled Approaches for Extending
Neural Architectures to Function Spaces for Operator Learning", 2025, arXiv 2506.10973.
"""
