"""How a product is launched, for one vector or for 2 to 8: what a step's products and one by itself have in common."""

from __future__ import annotations

from torch import Tensor

from lowbit.kernels import batch as batches
from lowbit.kernels.arguments import Batch, Product, fill
from lowbit.kernels.geometry import BLOCKS, Geometry
from lowbit.kernels.launch import Launch, Module
from lowbit.kernels.stream import Stream

Fields = dict[str, Tensor | int | None]


def sources(batch: int) -> tuple[str, ...]:
    """The files of cuda/ that the products of so many sequences are compiled from."""
    return ("common", "decode", "product", *(() if batch == 1 else ("batch_x", "batch")))


def operands(stream: Stream, x: Tensor, out: Tensor) -> Fields:
    """The fields that every product has."""
    found: Fields = {"weights": stream.data, "row_scale": stream.row_scale, "x": x, "out": out}
    return found | {"tiles": stream.tiles, "rows": stream.rows}


def alone(module: Module, kernel: str, shape: Geometry, stream: Stream, fields: Fields, room: int) -> Launch:
    """A product of one vector, in ``room`` bytes of a block's shared memory."""
    ring, batch, shared_bytes = shape.shared(stream.k, stream.tiles, room)
    argument = fill(Product, **fields, ring=ring, batch=batch)
    return Launch(module, kernel, (min(BLOCKS, stream.tiles), 1), shape.threads, argument, shared_bytes)


def several(module: Module, name: str, shape: Geometry, stream: Stream, fields: Fields) -> Launch:
    """The product ``name`` of batch.PRODUCTS, of several vectors."""
    plan = batches.plan(shape, name, stream.k, stream.tiles)
    argument = fill(Batch, **fields, ring=plan.ring, turns=plan.turns)
    return Launch(module, batches.PRODUCTS[name], (plan.blocks, 1), shape.threads, argument, plan.shared_bytes)
