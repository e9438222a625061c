"""The kernels' arguments: one struct each, with the fields that cuda/*.cu declare, in their order."""

from __future__ import annotations

import ctypes

from torch import Tensor


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    # pointers and 32-bit integers, in the order of cuda/*.cu
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int}
    listed = [(field[2:], types[field[0]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


Product = structure(
    "Product",
    "p:weights p:row_scale p:x p:norm p:out p:best p:arrived p:token p:position p:history "
    "i:tiles i:rows i:ring i:batch",
)
Batch = structure(
    "Batch",
    "p:weights p:row_scale p:x p:out p:best p:arrived p:token p:position p:history "
    "i:tiles i:rows i:ring i:turns i:length",
)
Normalize = structure("Normalize", "p:residual p:parts p:norm p:x")
Embed = structure(
    "Embed", "p:table p:scale p:zero p:tensor_scale p:token p:x i:bits i:group i:offset i:step i:code_kind i:scale_kind"
)
Attention = structure("Attention", "p:qkv p:keys p:values p:key_scale p:value_scale p:rope p:position p:out i:length")
Unpack = structure("Unpack", "p:weights p:row_scale p:out i:row0 i:rows i:k i:half i:bf16_out")
Norm = structure("Norm", "p:residual p:added p:weight p:out")
Rope = structure("Rope", "p:qkv p:keys p:values p:rope i:length i:tokens")
Silu = structure("Silu", "p:both p:out i:pieces")


def fill(kind: type[ctypes.Structure], **values: Tensor | int | None) -> ctypes.Structure:
    return kind(**{name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in values.items()})
