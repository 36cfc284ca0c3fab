"""TensorRT and TensorRT-RTX engines, by one code path.

What sets the two apart is their ``Flavour``: TensorRT builds on and for the GPU of the machine and runs the fqonnx ops in plugins;
TensorRT-RTX builds ahead of time, without a GPU and for several at once, and gets the ops' bodies in place of the calls: it has no plugins
of ours.

Polygraphy's loaders make the builder's configuration, build, and keep the timing cache. The model is parsed here: their loader does not say
which node the parser refuses, and finds no external data of a model that is not a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fqonnx.engines import EngineOptions
from fqonnx.engines.tensorrt_layers import LISTING, Origin, read_layers, summarize
from fqonnx.engines.tensorrt_library import RTX, TENSORRT, Flavour, first_line, load_plugins, one_line_errors, plugin_library, this_gpu
from fqonnx.engines.tensorrt_progress import deferred_signals, make_monitor
from fqonnx.errors import ArtifactError, EngineError, UsageError
from fqonnx.progress import Silent
from fqonnx.report.data import EngineReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from fqonnx.engines import Profile, Profiles
    from fqonnx.progress import Progress

_log = logging.getLogger(__name__)

_CACHE_FORMAT = 1
"""Raised when what lies in the cache would be built or described otherwise."""

_LEVELS = range(6)
_TARGET = re.compile(r"sm_?(\d{1,2})(\d)[af]?")


class _Builder:
    """What both engines do. Networks are strongly typed: the model's own types are the engine's."""

    flavour: Flavour

    def require(self, target: str | None = None, options: EngineOptions | None = None) -> None:
        """Make sure that the library is here and builds for the target.

        Raises:
            EngineError: It is not installed, or does not build for ``target``; TensorRT also without a GPU or without the plugins.
            UsageError: An option that the library has no use for.
        """
        options = options or EngineOptions()
        if self.flavour is RTX and (options.timing_cache is not None or options.version_compatible):
            name = "--timing-cache" if options.timing_cache is not None else "--version-compatible"
            raise UsageError(f"{name} is for --engine tensorrt, TensorRT-RTX has no such thing: leave it out")
        if options.optimization_level is not None and options.optimization_level not in _LEVELS:
            raise UsageError(f"optimization level {options.optimization_level} is out of range: give 0 to {_LEVELS[-1]}")
        trt = self.flavour.load()
        self.capabilities(trt, target)
        if self.flavour.plugins:
            load_plugins(trt)

    def lowering(self, target: str | None) -> str | None:
        """Plugins run kernels, which want operands stored for the GPU; inlined bodies take them as they are best read."""
        return (target or this_gpu().target) if self.flavour.plugins else None

    def capabilities(self, trt: Any, target: str | None) -> list[tuple[int, int]]:
        """The compute capabilities that ``target`` names.

        Raises:
            EngineError: The library does not build for them.
        """
        raise NotImplementedError

    def build(
        self,
        model_path: Path,
        out_path: Path,
        *,
        profiles: Sequence[Profiles] = (),
        target: str | None = None,
        options: EngineOptions | None = None,
        progress: Progress | None = None,
    ) -> EngineReport:
        """Build an engine, or take it from the cache, where engines lie under the hash of all that they depend on.

        Args:
            model_path: The artifact's ``model.onnx``; external data is found beside it.
            out_path: The ``.plan`` file to write; it appears whole or not at all.
            profiles: Sets of shapes of every input with dynamic dimensions.
            target: Compute capabilities such as ``sm89`` or ``sm80,sm89``. None is every GPU that TensorRT-RTX builds for by default, and
                this machine's for TensorRT.
            options: See there.
            progress: Told how far the builder is.

        Raises:
            EngineError: The library is not installed, does not know the target, or refuses the model.
            UsageError: A profile is missing, of an unknown input, or does not fit the input.
        """
        from fqonnx.model import load

        options = options or EngineOptions()
        self.require(target, options)
        trt = self.flavour.load()
        model = load(model_path)
        wanted = EngineReport(
            engine=self.flavour.name,
            version=trt.__version__,
            target=tuple(f"sm{major}{minor}" for major, minor in self.capabilities(trt, target)),
            gpu=this_gpu().name if self.flavour.plugins else None,
            version_compatible=options.version_compatible,
            profiles=tuple({name: (p.minimum, p.optimum, p.maximum) for name, p in sorted(given.items())} for given in profiles),
        )
        cached = _cache_path(wanted, model_path, model, options)
        if not options.rebuild and (found := _take(cached, out_path)) is not None:
            _log.info("the engine is the one in %s: --force builds it again", cached.parent)
            return found
        started = time.perf_counter()
        origin = Origin.of(model)
        plan, listing = _Network(self.flavour, trt, model, model_path, origin).build(
            profiles, self.capabilities(trt, target), options, progress or Silent()
        )
        layers = read_layers(listing, origin)
        report = replace(
            wanted,
            file_bytes=len(plan),
            seconds=time.perf_counter() - started,
            layers=layers,
            groups=summarize(layers, origin) if layers else (),
        )
        _write(out_path, plan)
        _keep(cached, out_path, report)
        return report


class TensorRt(_Builder):
    """Builds ``engine.plan`` with ``tensorrt``, on the GPU that is to run it."""

    flavour = TENSORRT

    def capabilities(self, trt: Any, target: str | None) -> list[tuple[int, int]]:
        """This machine's, and no other.

        Raises:
            EngineError: ``target`` is another, or there is no GPU.
        """
        del trt
        gpu = this_gpu()
        if target is not None and _parse_targets(target) != [gpu.capability]:
            raise EngineError(
                f"TensorRT builds for the GPU that it runs on, here {gpu.name} ({gpu.target}), not for {target}: "
                "leave --target out, or build on such a GPU"
            )
        return [gpu.capability]


class TensorRtRtx(_Builder):
    """Builds ``engine.plan`` with ``tensorrt_rtx``; neither the build nor the package needs a GPU in the building machine."""

    flavour = RTX

    def capabilities(self, trt: Any, target: str | None) -> list[tuple[int, int]]:
        """Those named; none in particular for None.

        Raises:
            EngineError: TensorRT-RTX does not build for one.
        """
        known = {name: name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
        found = [] if target is None else _parse_targets(target)
        for (major, minor), named in zip(found, [] if target is None else target.split(","), strict=True):
            if f"SM{major}{minor}" not in known:
                raise EngineError(f"TensorRT-RTX does not build for target {named!r}: choose from {', '.join(known.values())}")
        return found


def _parse_targets(target: str) -> list[tuple[int, int]]:
    matches = [_TARGET.fullmatch(name.strip()) for name in target.split(",")]
    if None in matches:
        raise UsageError(f"unknown target {target!r}: give compute capabilities, such as sm89 or sm80,sm89")
    return [(int(match[1]), int(match[2])) for match in matches if match is not None]


class _Network:
    """A parsed model, ready to be built.

    Raises:
        EngineError: The parser refuses the model, or made something else of an fqonnx op than it should.
    """

    def __init__(self, flavour: Flavour, trt: Any, model: ir.Model, path: Path, origin: Origin) -> None:
        self._flavour, self._trt, self._name, self._origin = flavour, trt, path.name, origin
        self._logger = _make_logger(trt)
        self._builder = trt.Builder(self._logger)
        self._network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parser = trt.OnnxParser(self._network, self._logger)
        # The parser refers to the weights in these bytes until the engine is built.
        self._bytes = _parsable(model, inline=not flavour.plugins)
        if not self._parser.parse(self._bytes, str(path)):
            raise EngineError(f"{flavour.title} cannot parse {path.name}: {_parser_errors(self._parser, origin)}")
        require_taken(flavour, network_layers(self._network), origin)

    def build(
        self, profiles: Sequence[Profiles], capabilities: Sequence[tuple[int, int]], options: EngineOptions, progress: Progress
    ) -> tuple[bytes, str]:
        """The plan, and the inspector's listing of it.

        Raises:
            EngineError: The builder refuses the network.
            UsageError: The profiles do not fit.
        """
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork

        _require_profiles(self._network, profiles)
        with deferred_signals() as signals, progress.task("Building the engine", 100) as task:
            monitor = make_monitor(self._trt, task, signals)
            common: dict[str, Any] = {
                "profiles": [_polygraphy_profile(self._network, given) for given in profiles or [{}]],
                "profiling_verbosity": self._trt.ProfilingVerbosity.DETAILED,
                "progress_monitor": monitor,
                "builder_optimization_level": options.optimization_level,
            }
            timing_cache: Path | None = None
            if self._flavour is RTX:
                make_config = CreateConfigRTX(compute_capabilities=list(capabilities) or None, **common)
            else:
                timing_cache = options.timing_cache or _default_timing_cache(self._trt)
                timing_cache.parent.mkdir(parents=True, exist_ok=True)
                common |= {"version_compatible": options.version_compatible, "load_timing_cache": _if_there(timing_cache)}
                # On by default in TensorRT, off in Polygraphy.
                make_config = CreateConfig(tf32=True, **common)
            what = f"{self._flavour.title} cannot build {self._name}"
            with warnings.catch_warnings(), one_line_errors(what, self._logger, self._remedy):
                # Polygraphy reads settings that newer versions have deprecated.
                warnings.simplefilter("ignore", DeprecationWarning)
                config = make_config(self._builder, self._network)
                if options.version_compatible:
                    config.plugins_to_serialize = [str(plugin_library())]
                built = EngineBytesFromNetwork(
                    (self._builder, self._network, self._parser), config=config, save_timing_cache=_text(timing_cache)
                )
                try:
                    plan = bytes(built())
                finally:
                    if monitor.failure is not None:
                        raise monitor.failure
        return plan, self._logger.listing or self._inspect(plan)

    def _remedy(self, reason: str) -> str:
        """Which node a message of the builder is about, and what to do."""
        node = self._origin.node_in(reason)
        about = f"this is {node}: " if node else ""
        return f"{about}keep {'it' if node else 'the linear before it'} in float with --keep, or build for --engine onnxruntime"

    def _inspect(self, plan: bytes) -> str:
        """What the inspector says of the loaded engine; nothing where it cannot be loaded here."""
        engine = self._trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if engine is None:
            return ""
        listing: str = engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.ONELINE)
        return listing


def _make_logger(trt: Any) -> Any:
    """A logger that keeps errors and the engine's listing and prints nothing. A function, since its base class is there once imported."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(first_line(message))
            elif message.startswith(LISTING):
                self.listing = message

    return Logger()


def _parser_errors(parser: Any, origin: Origin) -> str:
    """The first error with its node and group, and how many more there are."""
    if parser.num_errors == 0:
        return "no reason given: check it with onnx.checker"
    error = parser.get_error(0)
    name, op, group = error.node_name(), error.node_operator(), origin.group_of(error.node_name())
    node = f"node {name!r} ({op}{f', of group {group!r}' if group else ''}): " if op else ""
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    if name in origin.calls and "lugin not found" in error.desc():
        return f"{node}the library of plugins has none for it: build it anew with `fqonnx plugin build`"
    remedy = f"keep it in float with --keep {group!r}" if group else "export the model without this operator"
    return f"{node}{first_line(error.desc())}{more}: {remedy}, or build for --engine onnxruntime"


def _parsable(model: ir.Model, *, inline: bool) -> bytes:
    """The model as the parser gets it; external data stay where they are. ``model`` is changed.

    With ``inline`` it has standard operators only. Else the functions of fqonnx ops are taken out: a plugin is then all that the parser can
    make of a call, and an error where it has none.
    """
    import onnx_ir as ir

    from fqonnx.ops import DOMAIN, inline_bodies

    if inline:
        inline_bodies(model)
    else:
        for identifier in [identifier for identifier in model.functions if identifier[0] == DOMAIN]:
            del model.functions[identifier]
    return bytes(ir.to_proto(model).SerializeToString())


@dataclass(frozen=True)
class NetworkLayer:
    """A layer of a parsed network: the ONNX node that it came from, and whether it is a plugin."""

    node: str
    is_plugin: bool


def network_layers(network: Any) -> list[NetworkLayer]:
    """The layers of a parsed network."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [NetworkLayer(_node_of(layer), layer.type.name.startswith("PLUGIN")) for layer in layers]


def _node_of(layer: Any) -> str:
    metadata = layer.metadata or ""
    return metadata.removeprefix("[ONNX Layer: ").removesuffix("]") if metadata else str(layer.name)


def require_taken(flavour: Flavour, layers: Sequence[NetworkLayer], origin: Origin) -> None:
    """Make sure that every fqonnx op became what it should: a plugin in TensorRT, its body in TensorRT-RTX. Never silently the other.

    Raises:
        EngineError: One did not; the message names it.
    """
    plugins = {layer.node for layer in layers if layer.is_plugin}
    bodies = {layer.node.rpartition("/")[0] for layer in layers if not layer.is_plugin}
    for name, op in origin.calls.items():
        taken = name in plugins if flavour.plugins else name in bodies and name not in plugins
        if not taken:
            found = "a plugin" if name in plugins else "its body of standard operators" if name in bodies else "nothing"
            wanted = "the plugin" if flavour.plugins else "its body"
            raise EngineError(
                f"{flavour.title} made {found} of node {name!r} ({op}) instead of {wanted}: fqonnx does not know this version's parser, "
                "install another version or build for --engine onnxruntime"
            )


def _require_profiles(network: Any, profiles: Sequence[Profiles]) -> None:
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    for given in profiles or [{}]:
        unknown = sorted(set(given) - set(inputs))
        if unknown:
            raise UsageError(f"shapes are given for {unknown[0]!r}, which is no input: the inputs are {', '.join(inputs)}")
        for name, wanted in given.items():
            _require_fit(name, inputs[name], wanted)
        missing = sorted(set(dynamic) - set(given))
        if missing:
            expected = _in_words(dynamic[missing[0]])
            raise UsageError(f"input {missing[0]!r} is {expected}: give --min-shapes, --opt-shapes and --max-shapes for it")


def _require_fit(name: str, shape: tuple[int, ...], profile: Profile) -> None:
    for what, given in (("min", profile.minimum), ("opt", profile.optimum), ("max", profile.maximum)):
        if len(given) != len(shape) or any(d not in (-1, g) for d, g in zip(shape, given, strict=True)):
            raise UsageError(f"{what} shape {_in_words(given)} does not fit input {name!r}, which is {_in_words(shape)}")
    if not all(low <= best <= high for low, best, high in zip(profile.minimum, profile.optimum, profile.maximum, strict=True)):
        raise UsageError(f"the shapes of {name!r} are not in order: every dimension needs min <= opt <= max")


def _in_words(shape: Sequence[int]) -> str:
    return "x".join(str(dim) if dim >= 0 else "?" for dim in shape) or "a scalar"


def _polygraphy_profile(network: Any, given: Mapping[str, Profile]) -> Any:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    profile = PolygraphyProfile()
    for name in (network.get_input(index).name for index in range(network.num_inputs)):
        if name in given:
            profile.add(name, given[name].minimum, given[name].optimum, given[name].maximum)
    return profile


# --- The cache ---------------------------------------------------------------------------------------------------------------------------


CACHE_VARIABLE = "FQONNX_ENGINE_CACHE"
"""Environment variable that names another folder for built engines and timing caches."""


def _cache_folder() -> Path:
    from fqonnx.plugins.library import cache_folder

    named = os.environ.get(CACHE_VARIABLE, "")
    return Path(named).absolute() if named else cache_folder() / "engines"


def _default_timing_cache(trt: Any) -> Path:
    return _cache_folder() / f"timing-{trt.__version__}-{this_gpu().target}.cache"


def _if_there(path: Path) -> str | None:
    return str(path) if path.is_file() else None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _cache_path(wanted: EngineReport, model_path: Path, model: ir.Model, options: EngineOptions) -> Path:
    """Where the engine lies, or will: under the hash of the model, its shapes, the library, the GPUs, the options and the plugins."""
    import onnx_ir as ir

    from fqonnx.artifact import file_hash
    from fqonnx.sizes import constants

    files = [model_path, *sorted({Path(tensor.path) for tensor in constants(model) if isinstance(tensor, ir.ExternalTensor)})]
    if wanted.engine == TENSORRT.name:
        files.append(plugin_library())
    key = [_CACHE_FORMAT, wanted.to_dict(), options.optimization_level, [file_hash(file) for file in files]]
    return _cache_folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.plan"


def _take(cached: Path, out_path: Path) -> EngineReport | None:
    """Copy an engine out of the cache; None where it holds none, or not a whole one."""
    from fqonnx.artifact import file_hash

    try:
        noted = json.loads(cached.with_suffix(".json").read_text(encoding="utf-8"))
        if file_hash(cached) != noted["sha256"]:
            return None
        report = EngineReport.from_dict(noted["engine"])
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        return None
    _write(out_path, cached)
    return replace(report, cached=True)


def _keep(cached: Path, out_path: Path, report: EngineReport) -> None:
    """Copy an engine to the cache, as well as that goes: a build does not fail for want of it."""
    from fqonnx.artifact import file_hash, write_json

    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _write(cached, out_path)
        write_json(cached.with_suffix(".json"), {"sha256": file_hash(cached), "engine": report.to_dict()})
    except OSError as error:
        _log.warning("the engine is not kept for the next build: %s: %s", cached.parent, error.strerror)


def _write(path: Path, content: bytes | Path) -> None:
    """Write a file, or copy one, so that it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another build may write the same to the cache
    try:
        if isinstance(content, Path):
            shutil.copyfile(content, partial)
        else:
            partial.write_bytes(content)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
