"""The device that models run on: its name, and how much of its memory is in use."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any

from fqonnx.errors import EngineError

_DEVICE = 0
"""The CUDA device that ONNX Runtime's sessions use."""


def device_name(device: str) -> str:
    """What it is called: the GPU's name, or the CPU's.

    Raises:
        EngineError: ``cuda`` without a driver or a device.
    """
    if device == "cuda":
        name = ctypes.create_string_buffer(256)
        _check(_driver().cuDeviceGetName(name, len(name), _handle()), "cuDeviceGetName")
        return name.value.decode()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class Memory:
    """How much memory is in use: of the GPU by all that runs there, or on the CPU the resident memory of this process.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        EngineError: ``cuda`` without a driver or a device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            self._context = ctypes.c_void_p()
            # The context that the runtime works in: made here, it is not part of the first model's memory.
            _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(self._context), _handle()), "cuDevicePrimaryCtxRetain")

    def used(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._device != "cuda":
            return _resident()
        driver, free, total = _driver(), ctypes.c_size_t(), ctypes.c_size_t()
        _check(driver.cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            _check(driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return total.value - free.value


def _resident() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


@cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"no NVIDIA driver here ({error}): use --device cpu, or install one") from None
    _check(driver.cuInit(0), "cuInit")
    return driver


def _handle() -> ctypes.c_int:
    handle = ctypes.c_int()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), _DEVICE), "cuDeviceGet")
    return handle


def _check(status: int, call: str) -> None:
    if status:
        raise EngineError(f"the NVIDIA driver fails in {call} (error {status}): use --device cpu, or check `nvidia-smi`")
