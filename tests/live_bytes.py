"""Peak bytes of the tensors that operations make, on any device: what an allocator would have to hold beside before."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes() as made:`` and then ``made.peak``. What one operation needs inside of itself is not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._held = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        found = function(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in _tensors(found)):
            if storage._cdata not in given | self._held.keys():
                self._hold(storage)
        return found

    def _hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self._held[key] = weakref.finalize(storage, self._free, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key, size):
        del self._held[key]
        self.live -= size


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
