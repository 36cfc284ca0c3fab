"""Memory that a verification may take. Read as attributes of this module where they are used, so that there is one place to set them."""

SESSION_BYTES = 1 << 30
"""Weights, as ONNX Runtime's CPU provider holds them, above which a model runs segment by segment instead of in one session."""

SEGMENT_BYTES = 256 << 20
"""Weights of one such segment: small, since the other model stays in memory beside it."""

TAP_BYTES = 256 << 20
"""Layer outputs of one model that a single pass over the data holds at once; more of them take more passes."""
