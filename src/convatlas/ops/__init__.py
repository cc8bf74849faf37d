"""Functions on tensors, without parameters: the mathematics that layers and networks are made of."""
