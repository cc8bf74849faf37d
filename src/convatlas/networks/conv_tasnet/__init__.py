"""Conv-TasNet: separates the sources of a mixture in the time domain, offline or as the samples come in."""
