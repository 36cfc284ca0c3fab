"""``calibration.safetensors``: what calibration decided, for people and tools; the integer codes themselves live in the model.

Per group, fp32: ``<group>.left`` ``[n1, n1]``, ``.right`` ``[n2, n2]``, ``.channel_scale`` ``[K]``, ``.clip`` ``[1]``, ``.weight_scale``
``[N, K / G]``, ``.bias_correction`` ``[N]``; what a transform or the recipe does not have is absent. The metadata holds the recipe.
Equal solutions give equal bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fqonnx.calib.solution import GroupSolution
    from fqonnx.recipe import Recipe


def write_record(path: Path, names: Sequence[str], solution: Callable[[str], GroupSolution], recipe: Recipe) -> None:
    """Write the solutions of the groups ``names`` one at a time: one solution is in memory at any moment.

    The format (safetensors) starts with a table of every tensor's place, which is known only at the end: tensors go to a temporary
    file beside ``path`` first.

    Args:
        path: The file to write.
        names: Group names, in the order of the file.
        solution: Loads one solution by name.
        recipe: Goes to the metadata.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "fqonnx-calibration-1", "recipe": json.dumps(recipe.to_dict(), sort_keys=True)}}
    with tempfile.TemporaryFile(dir=path.parent) as tensors:
        for name in names:
            found = solution(name)
            parts = {
                "left": found.left,
                "right": found.right,
                "channel_scale": found.channel_scale,
                "clip": np.array([found.clip]),
                "weight_scale": found.scales,
                "bias_correction": found.bias,
            }
            for part, array in parts.items():
                if array is None:
                    continue
                start = tensors.tell()
                tensors.write(np.ascontiguousarray(array, dtype="<f4").tobytes())
                table[f"{name}.{part}"] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, tensors.tell()]}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        tensors.seek(0)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(tensors, file)
