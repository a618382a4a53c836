"""Launchers over the compiled module `_C`: pointers, sizes and strides in, nothing of torch across the boundary."""
