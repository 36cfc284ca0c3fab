"""What a report says of the machine and the software it was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def environment() -> dict[str, str]:
    """Versions and the machine, for the report."""
    found = {"python": platform.python_version()}
    for package in ("fqonnx", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "polygraphy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"platform": platform.platform(), "cpus": str(len(os.sched_getaffinity(0)))}
