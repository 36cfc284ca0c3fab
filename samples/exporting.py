"""What both samples share: torch's dynamo exporter, told to be quiet, its graph cleaned and written with external data where it must be."""

from __future__ import annotations

import collections
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import onnx_ir as ir

from fqonnx.errors import FqonnxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

OPSET = 21
"""The first one with INT4, and the last one whose INT4 DequantizeLinear has a CUDA kernel in ONNX Runtime."""

EXTERNAL_BYTES = 1_500_000_000
"""Weights beyond this go to ``MODEL.onnx.data``: one protobuf message cannot hold more than 2 GiB."""


def export(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    outputs: Sequence[str],
    dynamic: Mapping[str, Any],
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    opset: int = OPSET,
    external_bytes: int = EXTERNAL_BYTES,
) -> ir.Model:
    """Export a module with torch's dynamo exporter.

    Args:
        module: In eval mode; its ``forward`` takes ``inputs`` by name.
        inputs: Example tensors, or lists of such; sizes of dynamic axes should be 2 or more, and differ.
        outputs: Names of the tensors that ``forward`` returns, flattened.
        dynamic: For each input the names of its dynamic axes, ``{0: "batch"}``, in the structure of ``inputs``.
        path: The ``.onnx`` file to write; the weights of a large model go to ``path`` + ``.data``.
        input_names: Names of the tensors in ``inputs``, flattened; None where every input is one tensor.
        opset: Opset of the model.
        external_bytes: Size of all weights from which on they go to the ``.data`` file.

    Returns:
        The model as it was written.
    """
    import torch

    with quiet_exporter():
        program = torch.onnx.export(
            module,
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=opset,
            input_names=list(input_names or inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic),
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    model = program.model
    for node in model.graph:
        # The scopes (pkg.torch.onnx.name_scopes) stay: they are where linears get readable names from.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > external_bytes else None)
    return model


def histogram(model: ir.Model) -> str:
    """How many nodes of each type the graph has, most frequent first, on one line."""
    counts = collections.Counter(node.op_type for node in model.graph)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def offline() -> None:
    """Keep transformers off the network and quiet; call it before transformers is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    log: Any = transformers.logging  # untyped
    log.set_verbosity_error()
    log.disable_progress_bar()


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter: it logs that torchvision is not there, and warns about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_program(program: Callable[[], object]) -> None:
    """Run a sample's command line; what the user can mend ends in one line."""
    try:
        program()
    except FqonnxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
