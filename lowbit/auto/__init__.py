"""``auto``: each group of linears in the format that is fastest on this device, within a limit on KL divergence.

``selection`` answers for a Lab, from a file or by a search; ``search`` is that search, ``plan`` its arithmetic,
``bench`` and ``chain`` its measurements, ``ask`` the question. Nothing is imported here: to ask needs no torch.
"""
