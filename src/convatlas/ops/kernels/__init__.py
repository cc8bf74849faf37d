"""Triton kernels behind the operators, one file per operator; importing one needs the triton package."""
