"""Run the engine of a build directory with TensorRT or TensorRT-RTX alone, and compare it with ONNX Runtime.

This is what an application does: nothing of fqonnx is imported. The plugins of a TensorRT engine are in the library that `fqonnx plugin
path` prints; TensorRT-RTX, and version-compatible plans of TensorRT, need none.

    python samples/deploy_tensorrt.py OUT inputs.npz --plugins "$(fqonnx plugin path)"
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LARGEST_ERROR = 0.05
"""Relative L2 between the engine and ONNX Runtime of the same model: sums are rounded in another order, and a code may flip."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


class DeployError(Exception):
    """A line for the user: what is wrong, and what to do."""


def load_engine(folder: Path, plugins: Path | None) -> tuple[Any, Any, list[Any]]:
    """The library, the engine in ``folder``, and what must live as long as the engine.

    Raises:
        DeployError: The folder has no engine, or it does not load here.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        plan = (folder / "engine.plan").read_bytes()
    except OSError as error:
        raise DeployError(f"{error.filename}: {error.strerror}: give the folder of an `fqonnx build --engine ...`") from None
    built = manifest["plan"]
    try:
        trt = importlib.import_module(MODULES[built["engine"]])
    except ImportError as error:
        raise DeployError(f"{built['engine']} is not installed ({error}): pip install {built['engine']}") from None
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    if built["version_compatible"]:
        runtime.engine_host_code_allowed = True  # what the plan has inside is code
    elif built["engine"] == "tensorrt":
        if plugins is None:
            raise DeployError('this engine needs its plugins: give --plugins "$(fqonnx plugin path)"')
        if not trt.get_plugin_registry().load_library(str(plugins)):
            raise DeployError(f"TensorRT does not take the plugins in {plugins}: build them with `fqonnx plugin build`")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        made = f"by {built['engine']} {built['version']} for {built['gpu'] or ', '.join(built['target']) or 'GPUs from Ampere on'}"
        raise DeployError(f"{trt.__name__} {trt.__version__} does not load this engine, which was built {made}: build it again")
    return trt, engine, [runtime, logger]


def run(trt: Any, engine: Any, inputs: Arrays, *, profile: int = 0, device: str = "cuda") -> Arrays:
    """Run an engine once on arrays of the host.

    Raises:
        DeployError: An input is missing or does not fit, or the engine fails.
    """
    import torch

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    stream = torch.cuda.Stream() if device == "cuda" else None
    handle = 0 if stream is None else stream.cuda_stream
    context = engine.create_execution_context()
    if context is None or not context.set_optimization_profile_async(profile, handle):
        raise DeployError(f"the engine has no profile {profile}, or no room to run")
    tensors = {}
    for name in (name for name in names if modes[name] == trt.TensorIOMode.INPUT):
        if name not in inputs:
            raise DeployError(
                f"input {name!r} is missing: the engine's inputs are {', '.join(n for n in names if modes[n] == modes[name])}"
            )
        wanted = trt.nptype(engine.get_tensor_dtype(name))
        tensors[name] = torch.from_numpy(np.ascontiguousarray(inputs[name].astype(wanted))).to(device)
        if not context.set_input_shape(name, tuple(tensors[name].shape)):
            raise DeployError(
                f"profile {profile} does not take shape {list(tensors[name].shape)} of input {name!r}: choose another --profile"
            )
    outputs = [name for name in names if modes[name] != trt.TensorIOMode.INPUT]
    for name in outputs:
        dtype = torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype
        tensors[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=device)
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())  # which made the tensors
    if not context.execute_async_v3(handle):
        raise DeployError("the engine failed")
    if stream is not None:
        stream.synchronize()
    return {name: tensors[name].cpu().numpy() for name in outputs}


def reference(model: Path, inputs: Arrays) -> Arrays:
    """What ONNX Runtime makes of the build's model on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def compare(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> float:
    """Print the relative L2 of every output; the largest of floats, not a number where an element is none."""
    worst = 0.0
    for name, array in expected.items():
        if array.dtype.kind != "f":
            print(f"{name}: {np.mean(array == actual[name]):.2%} of the elements are equal")
            continue
        wide = array.astype(np.float64)
        error = float(np.linalg.norm(actual[name].astype(np.float64) - wide) / max(np.linalg.norm(wide), 1e-30))
        print(f"{name} {list(array.shape)}: relative L2 {error:.3g}")
        worst = error if np.isnan(error) else max(worst, error)
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Load, run, compare; 0 where the engine does what ONNX Runtime does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the build directory")
    parser.add_argument("inputs", type=Path, help="arrays by input name, as numpy.savez writes them")
    parser.add_argument("--plugins", type=Path, help="the library of the plugins")
    parser.add_argument("--profile", type=int, default=0, help="which of the engine's optimization profiles")
    given = parser.parse_args(arguments)
    try:
        with np.load(given.inputs) as file:
            inputs = dict(file)
        trt, engine, _alive = load_engine(given.out, given.plugins)
        worst = compare(reference(given.out / "model.onnx", inputs), run(trt, engine, inputs, profile=given.profile))
    except (DeployError, OSError, TypeError, ValueError) as error:  # TypeError: numpy has no such type, such as bfloat16
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("PASSED" if worst <= LARGEST_ERROR else "FAILED")
    return 0 if worst <= LARGEST_ERROR else 1


if __name__ == "__main__":
    raise SystemExit(main())
