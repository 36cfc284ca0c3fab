"""Kernels and runtime plugins of the ops in domain ``fqonnx``."""
