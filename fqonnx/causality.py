"""Whether a model predicts the next token: what it predicts before the last token does not depend on that token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def with_other_end(tokens: Array) -> Array:
    """A copy of ids ``[batch, sequence]`` with another last token."""
    changed = np.array(tokens)
    changed[:, -1] = np.where(changed[:, -1] > 0, changed[:, -1] - 1, 1)
    return changed


def alike_before_the_end(logits: Array, others: Array) -> bool:
    """Whether logits ``[batch, sequence, vocabulary]`` of some tokens and of the same ``with_other_end`` are equal but for the last ones.

    Equal up to rounding: the same shapes take the same kernels, but blocks of a matrix product may be summed in another order.
    """
    before, after = logits[:, :-1].astype(np.float64), others[:, :-1].astype(np.float64)
    return bool(np.allclose(before, after, rtol=1e-3, atol=1e-4 * float(np.abs(before).max(initial=0.0))))
