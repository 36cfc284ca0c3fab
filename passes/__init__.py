"""Graph passes on onnx-ir: make a model ready, find its linears, quantize them, fuse the result into kernels."""
