"""TensorRT-RTX engines, built ahead of time; neither the build nor the package needs a GPU in the building machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fqonnx.errors import EngineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fqonnx.engines import Profile


class TensorRtRtx:
    """Builds ``engine.plan`` with ``tensorrt_rtx``, strongly typed: the model's own types are the engine's."""

    def require(self, target: str | None = None) -> None:
        """Make sure that ``tensorrt_rtx`` is here and knows the target.

        Raises:
            EngineError: It is not installed, or does not build for ``target``.
        """
        _capability(_import(), target)

    def build(self, model_path: Path, out_path: Path, *, profiles: Mapping[str, Profile], target: str | None = None) -> None:
        """Build an engine with one optimisation profile.

        Args:
            model_path: The artifact's ``model.onnx``; external data is found beside it.
            out_path: The ``.plan`` file to write; it appears whole or not at all.
            profiles: Shapes of every input with dynamic dimensions.
            target: Compute capability such as ``sm89``; None is TensorRT-RTX's default, an engine for every GPU it supports.

        Raises:
            EngineError: ``tensorrt_rtx`` is not installed, does not know the target, or refuses the model.
            UsageError: A profile is missing, of an unknown input, or does not fit the input.
        """
        trt = _import()
        capability = _capability(trt, target)
        logger = _make_logger(trt)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(_standard_model(model_path), str(model_path)):
            raise EngineError(f"TensorRT-RTX cannot parse {model_path.name}: {_parser_errors(parser)}")
        config = builder.create_builder_config()
        if capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)
        _add_profile(builder, network, config, profiles)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"TensorRT-RTX cannot build {model_path.name}: {logger.summary()}: keep the node's linear in float with --keep, "
                "or build for --engine onnxruntime"
            )
        partial = out_path.with_name(f".{out_path.name}.partial")
        try:
            partial.write_bytes(plan)
            partial.replace(out_path)
        finally:
            partial.unlink(missing_ok=True)


def _make_logger(trt: Any) -> Any:
    """A logger that keeps errors for the message and prints nothing. A function, since the base class exists only once imported."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def summary(self) -> str:
            # The first error is the cause, those after it its echo up the call chain.
            return re.sub(r"^(IBuilder|ITensor|INetwork)\S*: ", "", self.errors[0]).rstrip(" .")[:400] if self.errors else "no reason given"

    return Logger()


def _parser_errors(parser: Any) -> str:
    """The first error with its node, and how many more there are."""
    if parser.num_errors == 0:
        return "no reason given: check it with onnx.checker"
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    reason = " ".join(error.desc().split()).rstrip(" .")[:400]
    return f"{node}{reason}{more}: export the model without this operator, or build for --engine onnxruntime"


def _standard_model(path: Path) -> bytes:
    """The model with standard operators only, serialized; external data stay where they are, beside ``path``."""
    import onnx_ir as ir

    from fqonnx.model import load
    from fqonnx.ops import inline_bodies

    model = load(path)
    inline_bodies(model)
    return bytes(ir.to_proto(model).SerializeToString())


def _import() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise EngineError(f"TensorRT-RTX is not usable here ({error}): pip install 'fqonnx[tensorrt-rtx]'") from None
    return tensorrt_rtx


def _capability(trt: Any, target: str | None) -> Any:
    """The ``ComputeCapability`` of a target, or None for none in particular."""
    if target is None:
        return None
    match = re.fullmatch(r"sm_?(\d+)", target)
    capability = trt.ComputeCapability.__members__.get(f"SM{match[1]}") if match else None
    if capability is None:
        known = ", ".join(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        raise EngineError(f"TensorRT-RTX does not build for target {target!r}: choose from {known}")
    return capability


def _add_profile(builder: Any, network: Any, config: Any, profiles: Mapping[str, Profile]) -> None:
    inputs = {tensor.name: tensor for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    unknown = sorted(set(profiles) - set(inputs))
    if unknown:
        raise UsageError(f"shapes are given for {unknown[0]!r}, which is no input: the inputs are {', '.join(inputs)}")
    for name, wanted in profiles.items():
        _require_fit(name, tuple(inputs[name].shape), wanted)
    dynamic = {name: tuple(tensor.shape) for name, tensor in inputs.items() if -1 in tuple(tensor.shape)}
    missing = sorted(set(dynamic) - set(profiles))
    if missing:
        expected = "x".join(str(d) if d >= 0 else "?" for d in dynamic[missing[0]])
        raise UsageError(f"input {missing[0]!r} is {expected}: give --min-shapes, --opt-shapes and --max-shapes for it")
    profile = builder.create_optimization_profile()
    for name in dynamic:
        wanted = profiles[name]
        profile.set_shape(name, wanted.minimum, wanted.optimum, wanted.maximum)
    if dynamic:
        config.add_optimization_profile(profile)


def _require_fit(name: str, shape: tuple[int, ...], profile: Profile) -> None:
    for what, given in (("min", profile.minimum), ("opt", profile.optimum), ("max", profile.maximum)):
        if len(given) != len(shape) or any(d not in (-1, g) for d, g in zip(shape, given, strict=True)):
            expected = "x".join(str(d) if d >= 0 else "?" for d in shape)
            raise UsageError(f"{what} shape {'x'.join(map(str, given))} does not fit input {name!r}, which is {expected}")
    if not all(low <= best <= high for low, best, high in zip(profile.minimum, profile.optimum, profile.maximum, strict=True)):
        raise UsageError(f"the shapes of {name!r} are not in order: every dimension needs min <= opt <= max")
