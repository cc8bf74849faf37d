"""Layers with parameters, built on `convatlas.ops`."""
