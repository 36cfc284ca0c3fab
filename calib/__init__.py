"""Calibration: data, streamed statistics, transforms, weight quantizers and the solver that puts them together."""
