"""A group's transform taken over to another scheme: which directions are loud does not depend on how many bits there are.

Fitting transforms is most of the time of a calibration. Where the same group is solved in several schemes, to see which it needs, one fit
serves them all; clips, which do depend on the bits, are chosen anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fqonnx.calib.clips import with_clip
from fqonnx.calib.transforms.base import FittedTransform

if TYPE_CHECKING:
    from fqonnx.calib.solution import Array, GroupSolution
    from fqonnx.calib.transforms.base import Problem


def adapt(base: GroupSolution, problem: Problem) -> FittedTransform:
    """The transform of ``base``, with the activation clip of the smallest output error for the problem's bits; 1 without tokens.

    Weight clips are left to the weight quantizer.
    """

    def tensor(array: Array | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(problem.weight.device)

    fitted = FittedTransform(tensor(base.channel_scale), tensor(base.left), tensor(base.right))
    return with_clip(fitted, problem)
