"""Conv-like layers: they take the arguments of torch's convolutions, and replace them in any network."""
