"""Low-bit number formats in plain PyTorch: what every kernel is held against, and what runs where no kernel does.

``packing`` stores codes in the bits that they have, ``minifloat`` is the 6-bit floats and E8M0 scales of the OCP
Microscaling specification v1.0, ``integer`` the int4, ternary and binary quantizers, ``scheme`` joins them into
formats of a weight, ``linear`` is the module. All of it runs on every device and under torch.compile.
"""
