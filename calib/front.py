"""What lies in front of the first block: embeddings, convolutions on an image or on sound, whatever they are made of.

Nothing there is trained and nothing there is quantized, so it is run once, in ONNX Runtime, and needs no operator in torch and no memory
on the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fqonnx.calib.stream import StreamedModel, needed_nodes
from fqonnx.calib.torch_graph import shapes_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from fqonnx.calib.chunks import Chunks
    from fqonnx.calib.stream import Values
    from fqonnx.calib.torch_graph import Sizes


FRONT = "front"
"""The stream before the first block, where it is kept for training behind the blocks."""


def run_front(model: ir.Model, entrance: ir.Value, chunks: Chunks, sizes: Sizes, *, workdir: Path, lasting: bool = False) -> None:
    """Put the residual stream before the first block into ``chunks``, as ``float`` and as ``quantized``.

    Args:
        model: The float model.
        entrance: The first block's input, a float value ``[.., K]``.
        chunks: Feeds; gets the streams.
        sizes: Gets the outputs of those ``Shape`` nodes that the blocks may ask for and that measure something in front of them.
        workdir: Folder for activations that do not fit in memory.
        lasting: Put it there as ``FRONT`` too, which stays.

    Raises:
        CalibrationError: ONNX Runtime fails on the data.
        ModelError: ONNX Runtime cannot load this part of the model.
    """
    stream = entrance.name or ""
    measured = _measured(model, entrance)

    def keep(chunk: int, values: Values) -> None:
        if stream in values:
            x = torch.from_numpy(values[stream]).float()
            chunks.put("float", chunk, x)
            chunks.put("quantized", chunk, x)
            if lasting:
                chunks.put(FRONT, chunk, x, lasting=True)
        found = {name: torch.from_numpy(array) for name, array in values.items() if name in measured}
        sizes.setdefault(shapes_of(chunks.feeds(chunk)), {}).update(found)

    feeds = ({name: tensor.cpu().numpy() for name, tensor in chunks.feeds(chunk).items()} for chunk in range(len(chunks)))
    StreamedModel(model, workdir).run(feeds, taps=[stream, *measured], on_values=keep)


def _measured(model: ir.Model, entrance: ir.Value) -> list[str]:
    """``Shape`` of values that ``entrance`` is made of, by name; that of the model's inputs and of constants torch finds by itself."""
    made = {output for node in needed_nodes(model.graph, [entrance]) for output in node.outputs} - {entrance}
    return [node.outputs[0].name or "" for node in model.graph if node.op_type == "Shape" and node.inputs[0] in made]
