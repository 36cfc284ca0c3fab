"""TensorRT plugins without a GPU: NVIDIA's own lean runtime takes them, and their interfaces are laid out as TensorRT's are."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fqonnx.plugins import library, toolchain
from tests.plugin_support import require_compiler
from tests.tensorrt_fields import BAD_FIELDS, BadField
from tests.tensorrt_harness import compile_host_library, field_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FIELDS = {
    "FlatQuantize": {"bits": "INT32", "packed": "INT32"},
    "SiluMulFlatQuantize": {"bits": "INT32", "packed": "INT32", "gate": "INT32"},
    "RmsNormFlatQuantize": {"bits": "INT32", "packed": "INT32", "epsilon": "FLOAT32"},
    "AddRmsNormFlatQuantize": {"bits": "INT32", "packed": "INT32", "epsilon": "FLOAT32"},
    "W4A4Gemm": {"packed": "INT32", "layout": "CHAR", "layout_shape": "INT32", "layout_perm": "INT32", "dtype": "INT32"},
}
OPS = pytest.mark.parametrize("op", FIELDS)


# --- layouts ----------------------------------------------------------------------------------------------------------------------------

DATA = ("Dims64", "PluginTensorDesc", "DynamicPluginTensorDesc", "PluginField", "PluginFieldCollection", "InterfaceInfo", "DimsExprs")

_CLASS = re.compile(r"^Class (?:implemented|nvinfer1)::(\w+)\n +size=(\d+) align=(\d+)", re.MULTILINE)
_TABLE = re.compile(r"^Vtable for implemented::(\w+)\n.*\n((?:\d+ .*\n)+)", re.MULTILINE)
_FUNCTION = re.compile(r"^(\d+) .*::(~?)(\w+)$", re.MULTILINE)


def layouts(folder: Path, *flags: str) -> str:
    """Sizes, tables of virtual functions, places of members and numbers of enumerators, as text."""
    source = Path(__file__).parent / "tensorrt" / "layouts.cpp"
    options = ["-std=c++17", "-fdump-lang-class", "-Wno-invalid-offsetof", f"-I{library.FOLDER / 'tensorrt'}", *flags]
    subprocess.run(["g++", *options, source, "-o", "layouts"], cwd=folder, check=True)
    dump = next(folder.glob("*.class")).read_text()
    lines = sorted(f"{name} has {size} bytes, on borders of {align}" for name, size, align in _CLASS.findall(dump) if name in DATA)
    lines += subprocess.run([folder / "layouts"], capture_output=True, text=True, check=True).stdout.splitlines()
    for name, entries in sorted(_TABLE.findall(dump)):
        lines.append(name)
        for place, destructor, function in _FUNCTION.findall(entries):
            lines.append(f"  {name} {int(place) // 8 - 2} {'destructor' if destructor else function}")
    return "\n".join(lines) + "\n"


def test_interfaces_are_laid_out_as_tensorrts(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    """What this file says is what the headers of TensorRT 10.13 to 11.1 give; a change of it is a library that crashes in TensorRT."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    golden("tensorrt_layouts", layouts(tmp_path))


def test_the_headers_of_this_machine_say_the_same(tmp_path: Path) -> None:
    headers = toolchain.find_tensorrt_headers()
    if headers is None:
        pytest.skip("no headers of TensorRT: set TENSORRT_INCLUDE_DIR")
    require_compiler()
    (tmp_path / "empty.cu").write_text("")
    nvcc = toolchain.find_toolchain().nvcc
    included = subprocess.run([nvcc, "-M", "empty.cu"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    cuda = next(Path(path).parent for path in included if path.endswith("/cuda_runtime_api.h"))
    theirs = layouts(tmp_path, "-DFQ_TENSORRT_SDK", "-isystem", str(headers), "-isystem", str(cuda), "-w").splitlines()
    golden = (Path(__file__).parent / "golden" / "tensorrt_layouts.txt").read_text().splitlines()
    # All but the logger of the other major version.
    assert [line for line in theirs if line not in golden] == []
    assert {line.split()[0] for line in golden if line not in theirs} in ({"Logger10", "LoggerFinder10"}, {"Logger11", "LoggerFinder11"})


# --- the library ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that is built; else its code for the host, which has the same entry points."""
    path = library.library_path()
    if path is not None and hasattr(ctypes.CDLL(str(path)), "getCreators"):
        return path
    require_compiler()
    return compile_host_library(tmp_path_factory.mktemp("tensorrt"))


def test_entry_points(plugin_library: Path) -> None:
    """Those of the third version alone: TensorRT takes ``getPluginCreators`` for the second's."""
    loaded = ctypes.CDLL(str(plugin_library))
    assert loaded.getCreators
    assert loaded.setLoggerFinder
    assert not hasattr(loaded, "getPluginCreators")


def test_the_second_version_is_nowhere() -> None:
    for path in (library.FOLDER / "tensorrt").iterdir():
        assert not re.search(r"IPluginV2|PluginV2|IPluginCreator\b|getPluginCreators|REGISTER_TENSORRT_PLUGIN", path.read_text()), path


# --- TensorRT's lean runtime ------------------------------------------------------------------------------------------------------------


class Registry:
    """The lean runtime's, with the library loaded."""

    def __init__(self, trt: Any, path: Path) -> None:
        self.trt = trt
        self.registry = trt.get_plugin_registry()
        self.path = path
        self.load()

    def load(self) -> None:
        self.handle = self.registry.load_library(str(self.path))
        assert self.handle is not None

    def creators(self) -> list[Any]:
        return [creator for creator in self.registry.all_creators if creator.plugin_namespace == "fqonnx"]

    def create(self, op: str, fields: Mapping[str, Any], phase: str = "BUILD") -> Any:
        creator = self.registry.get_creator(op, "1", "fqonnx")
        given = []
        for name, value in fields.items():
            data, kind, length = field_data(value)
            given.append(self.trt.PluginField(name, data[:length], self.trt.PluginFieldType(kind)))
        return creator.create_plugin("layer", self.trt.PluginFieldCollection(given), getattr(self.trt.TensorRTPhase, phase))

    def capability(self, plugin: Any, name: str) -> Any:
        return plugin.get_capability_interface(getattr(self.trt.PluginCapabilityType, name))

    def unload(self) -> None:
        gc.collect()  # plugins go before the library that their code is in
        self.registry.deregister_library(self.handle)


@pytest.fixture(scope="module")
def registry(plugin_library: Path) -> Iterator[Registry]:
    made = Registry(pytest.importorskip("tensorrt_lean"), plugin_library)
    yield made
    made.unload()


def test_creators_are_listed(registry: Registry) -> None:
    creators = {creator.name: creator for creator in registry.creators()}
    assert creators.keys() == FIELDS.keys()
    for op, creator in creators.items():
        assert creator.plugin_version == "1"
        assert creator.interface_info.kind == "PLUGIN CREATOR_V3ONE"
        assert (creator.interface_info.major, creator.interface_info.minor) == (1, 0)
        assert creator.api_language == registry.trt.APILanguage.CPP
        assert {field.name: field.type.name for field in creator.field_names} == FIELDS[op]
        assert type(creator) is registry.trt.IPluginCreatorV3One
    assert registry.registry.get_creator("FlatQuantize", "2", "fqonnx") is None
    assert registry.registry.get_creator("FlatQuantize", "1", "") is None


@pytest.mark.parametrize("name", ["IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One"])
def test_this_tensorrt_has_the_interfaces_in_the_version_that_is_implemented(registry: Registry, name: str) -> None:
    base = getattr(registry.trt, name)
    info = type("Implemented", (base,), {"__init__": base.__init__})().interface_info
    header = (library.FOLDER / "tensorrt" / "interfaces.h").read_text()
    assert f'return {{"{info.kind}", {info.major}, {info.minor}}};' in header


@OPS
@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_a_plugin_and_its_capabilities(registry: Registry, op: str, phase: str) -> None:
    fields: dict[str, Any] = {
        "bits": 4,
        "packed": 0,
        "gate": 1,
        "epsilon": 0.125,
        "layout": b"plain",
        "layout_shape": [0, -1],
        "layout_perm": [0, 1],
        "dtype": 10,
    }
    if phase == "RUNTIME":
        fields["layout"] = 0
        fields = {name: value for name, value in fields.items() if not name.startswith("layout_")}
    fields = {name: value for name, value in fields.items() if name in FIELDS[op]}
    plugin = registry.create(op, fields, phase)
    assert plugin.interface_info.kind == "PLUGIN"
    core, build, runtime = (registry.capability(plugin, name) for name in ("CORE", "BUILD", "RUNTIME"))
    for capability, kind in ((core, "CORE"), (build, "BUILD"), (runtime, "RUNTIME")):
        assert capability.interface_info.kind == f"PLUGIN_V3ONE_{kind}"
        assert (capability.interface_info.major, capability.interface_info.minor) == (1, 0)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (op, "1", "fqonnx")
    assert build.num_outputs == {"AddRmsNormFlatQuantize": 3, "W4A4Gemm": 1}.get(op, 2)
    assert build.format_combination_limit == (1 if op == "W4A4Gemm" else 3)
    metadata = {
        "FlatQuantize": "bits=4 packed=0",
        "SiluMulFlatQuantize": "bits=4 packed=0 gate=1",
        "RmsNormFlatQuantize": "bits=4 packed=0 epsilon=0.125",
        "AddRmsNormFlatQuantize": "bits=4 packed=0 epsilon=0.125",
        "W4A4Gemm": "packed=0 layout=0 dtype=10",
    }[op]
    assert build.metadata_string == metadata
    # What was timed with other kernels is no use.
    assert re.fullmatch(rf"{metadata} sources: [0-9a-f]{{16,}}", build.timing_cache_id)


@pytest.mark.parametrize("case", BAD_FIELDS, ids=str)
def test_bad_fields_make_no_plugin(registry: Registry, case: BadField, capfd: pytest.CaptureFixture[str]) -> None:
    """The reason goes to TensorRT's log, or where that has no logger yet to standard error."""
    assert registry.create(case.op, case.fields) is None
    assert capfd.readouterr().err == f"fqonnx: {case.op} (layer): {case.message}\n"


@pytest.mark.parametrize("missing", ["packed", "layout", "dtype"])
def test_a_state_that_is_not_whole_makes_no_plugin(registry: Registry, missing: str, capfd: pytest.CaptureFixture[str]) -> None:
    state = {"packed": 0, "layout": 1, "dtype": 10}
    assert registry.create("W4A4Gemm", state, "RUNTIME") is not None
    assert registry.create("W4A4Gemm", {name: value for name, value in state.items() if name != missing}, "RUNTIME") is None
    assert f"the engine holds no field {missing}: it was built with another version of fqonnx, build it anew" in capfd.readouterr().err


def test_a_library_loaded_twice_is_there_once(registry: Registry) -> None:
    assert registry.registry.load_library(str(registry.path)) is None
    assert len(registry.creators()) == len(FIELDS)


def test_a_library_comes_and_goes(registry: Registry) -> None:
    for _ in range(2):
        registry.unload()
        assert registry.creators() == []
        registry.load()
        assert len(registry.creators()) == len(FIELDS)
        assert registry.create("FlatQuantize", {"bits": 8}) is not None
