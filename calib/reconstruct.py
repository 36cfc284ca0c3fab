"""Block reconstruction: the transforms, clips and weights of a block's groups are trained together on the block's output.

FlatQuant (arXiv 2410.09426, section 3.2) trains block by block. Two things differ here. A block is fed with what the quantized blocks
before it give, and aims at what the float model has behind it, so that each block makes up for the errors of those before. And weights
are trained too: with the transform, as floats that round well, and behind the weight quantizer, which integer each of them takes.

One block is in memory at a time, and of the data what ``Chunks`` keeps there. A block's solutions are written when it is done, and what
the next block is fed with is computed from what was written: a build that goes on after a kill gives the same bytes on a CPU.

For ``model``, blocks are solved so one after the other, stay in memory, and are then trained together on what the model puts out.
Solutions are written at the end.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fqonnx.calib.blocks import find_blocks
from fqonnx.calib.chunks import Chunks
from fqonnx.calib.descent import side_stream
from fqonnx.calib.front import run_front
from fqonnx.calib.reconstruct_block import BlockReconstruction, Training
from fqonnx.calib.reconstruct_model import ModelReconstruction, Tail
from fqonnx.calib.redraw import redrawn
from fqonnx.calib.solve import library_versions
from fqonnx.calib.stores import SolutionStore
from fqonnx.errors import CalibrationError
from fqonnx.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from fqonnx.calib.blocks import Block
    from fqonnx.calib.data.base import Source
    from fqonnx.calib.torch_graph import Sizes
    from fqonnx.passes.groups import LinearGroup
    from fqonnx.progress import Progress
    from fqonnx.recipe import Recipe

TRAINING = {
    "cpu": Training(tokens=1024, steps=220, rounding_steps=120, model_steps=60),
    "cuda": Training(tokens=4096, steps=200, rounding_steps=100, weight_lr=3.6e-3, rounding_lr=2.4e-3, model_steps=200),
}
"""By device: a GPU takes four times the tokens in little more than the time that it takes to launch a step."""


WHOLE = 1.0
"""Steps of the whole model, in those of its blocks, for the progress bar."""


def reconstruct(
    model: ir.Model,
    groups: Sequence[LinearGroup],
    source: Source,
    recipe: Recipe,
    *,
    workdir: Path,
    fingerprint: str,
    device: str = "cpu",
    mask: str | None = None,
    stacks: bool = False,
    training: Training | None = None,
    changes: dict[ir.Value, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    progress: Progress | None = None,
) -> SolutionStore:
    """Solve every group that ``workdir`` does not hold yet, block by block.

    Args:
        model: The prepared float model.
        groups: What to solve.
        source: Feeds; read once; where the recipe asks for copies, again for those.
        recipe: How to solve.
        workdir: Folder of the solutions (``groups/``), and of activations that do not fit in memory.
        fingerprint: Digest of the model and the data; solutions of another one are not reused.
        device: ``cpu`` or ``cuda``.
        mask: An input ``[batch, sequence]`` that is zero where a token is padding.
        stacks: Whether feeds of equal shapes may be stacked along the first axis of every input.
        training: Hyperparameters; None takes those of the device, with the recipe's steps where it says so.
        changes: By value of the graph, what the quantized model does to it besides: rounding of the cache that the recipe asks for.
        progress: Where to tell how far it is.

    Returns:
        The store, which holds every group.

    Raises:
        ModelError: The graph does not fall apart into blocks, holds an operator that is not run in torch, or is to be trained on copies
            and is no language model.
        CalibrationError: NaN or Inf in the model or its activations, training diverged, or memory is out.
    """
    training = training or _training(recipe, device)
    depends_on = [fingerprint, recipe.to_dict(), device, repr(training), mask, stacks, library_versions()]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    store = SolutionStore(workdir / "groups", [group.name for group in groups], key)
    blocks = find_blocks(model, groups)
    together = recipe.reconstruct == "model"
    # What nobody needs the activations of is left out; blocks that are trained together all are needed.
    while blocks and all(store.has(group.name) for group in (groups if together else blocks[-1].groups)):
        blocks = blocks[:-1]
    if not blocks:
        return store
    where = torch.device(device)
    sizes: Sizes = {}
    copies = redrawn(model, source, recipe.augment, seed=recipe.seed, workdir=workdir) if recipe.augment else ()

    with (
        (progress or Silent()).task("Reconstructing blocks", len(blocks) * (1 + WHOLE * together)) as task,
        side_stream(where),
        Chunks(source, workdir, tokens=training.tokens, stacks=stacks, copies=copies, mask=mask, device=where) as chunks,
        _errors_of_memory(blocks),
    ):
        if blocks[0].input is not None:
            run_front(model, blocks[0].input, chunks, sizes, workdir=workdir, lasting=together)
        parts = []
        for block in blocks:
            part = BlockReconstruction(block, chunks, recipe, training, where, sizes, changes)
            part.aim()
            if together:
                part.solve(task)
                part.advance(part.rounded)
                parts.append(part)
            else:
                if not all(store.has(group.name) for group in block.groups):
                    part.solve(task)
                    _save(part, store)
                part.advance(part.solved(store))
            task.advance(1 - part.told)
        if together:
            tail = Tail(model, blocks[-1], groups, where, sizes)
            ModelReconstruction(parts, tail, chunks, training, where, recipe.seed).train(task, WHOLE * len(blocks))
            for part in parts:
                _save(part, store)
    return store


def _save(part: BlockReconstruction, store: SolutionStore) -> None:
    for solution in part.solutions():
        store.save(solution)


def _training(recipe: Recipe, device: str) -> Training:
    default = TRAINING[device]
    if recipe.steps is None:
        return default
    half = max(recipe.steps // 2, 1)
    return replace(default, steps=recipe.steps, rounding_steps=half, model_steps=half, epochs=10**9)


@contextmanager
def _errors_of_memory(blocks: Sequence[Block]) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise CalibrationError("the GPU is out of memory: use --device cpu, shorter samples or --reconstruct block or group") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no type for it on the CPU
            raise
        raise CalibrationError(
            f"out of memory in a block of {len(blocks[0].groups)} groups: use shorter samples, a machine with more, or --reconstruct group"
        ) from None
