"""What a build or a verification found: ``report.json`` for machines, ``report.html`` for people."""

from __future__ import annotations

from fqonnx.report.data import (
    DataReport,
    EngineGroup,
    EngineLayer,
    EngineReport,
    GroupReport,
    LanguageReport,
    LeftReport,
    Report,
    SizeReport,
    TensorReport,
    load_report,
    save_report,
)

__all__ = [
    "DataReport",
    "EngineGroup",
    "EngineLayer",
    "EngineReport",
    "GroupReport",
    "LanguageReport",
    "LeftReport",
    "Report",
    "SizeReport",
    "TensorReport",
    "load_report",
    "save_report",
]
