"""The products and quantizers of decoder layers one behind the other, as decoding runs them, without attention between them.

    python -m benchmarks.chain

A call by itself pays for its launch and for cold caches. In a chain a product may read its weights, and a quantizer its factors, while the
work before makes what they wait for (``constant_weights``, ``constant_factors``): "apart" is without, "early" with. Both are replays of one
CUDA graph, back to back, and give the same bits. Codes, scales and inputs are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from benchmarks.results import Row, json_option, report, run, seconds_option
from benchmarks.timing import REPLAY_METHOD, Timer, about, replayed
from fqonnx.kernels import flat_quantize, rms_norm_flat_quantize, silu_mul_flat_quantize, w4a4_gemm

if TYPE_CHECKING:
    import torch

APART, EARLY = "apart", "early"

ROWS = (1, 16, 64)
EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of the layers: Llama-2-7B's."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 4
    right: int = 128

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Channels and columns of each product."""
        return {
            "qkv": (3 * self.hidden, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def bytes(self) -> int:
        """Of the weights, which is nearly all the traffic there is."""
        return self.layers * sum(n * k // 2 for n, k in self.weights.values())


class Chain:
    """The layers' operands on the GPU, for some rows."""

    def __init__(self, rows: int, shape: Shape = Shape(), device: str = "cuda") -> None:
        import torch

        generator = torch.Generator(device).manual_seed(rows)
        options: dict[str, Any] = {"device": device, "generator": generator}

        def factor(size: int) -> torch.Tensor:
            return (torch.randn(size, size, **options) / size**0.5).half()

        self.shape = shape
        self.right, self.left, self.inner_left = (
            factor(size) for size in (shape.right, shape.hidden // shape.right, shape.intermediate // shape.right)
        )
        self.gamma = torch.ones(shape.hidden, dtype=torch.float16, device=device)
        self.layers = [
            {name: torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **options) for name, (n, k) in shape.weights.items()}
            for _ in range(shape.layers)
        ]
        self.scales = {name: torch.rand(n, **options) * 1e-3 + 1e-4 for name, (n, _) in shape.weights.items()}
        self.x, self.residual = (torch.randn(rows, shape.hidden, **options).half() for _ in range(2))

    def run(self, *, early: bool) -> torch.Tensor:
        """One pass through all layers; the last product's result."""
        y, total = self.x, self.residual
        for layer in self.layers:
            y, total = self._after_norm("qkv", layer, y, total, early=early)
            codes = flat_quantize(y[:, : self.shape.hidden], self.left, self.right, constant_factors=early)
            y = self._product("o", layer, *codes, early=early)
            y, total = self._after_norm("gate_up", layer, y, total, early=early)
            gate, up = y.split(self.shape.intermediate, dim=1)
            codes = silu_mul_flat_quantize(gate, up, self.inner_left, self.right, constant_factors=early)
            y = self._product("down", layer, *codes, early=early)
        return y

    def _after_norm(
        self, name: str, layer: dict[str, torch.Tensor], y: torch.Tensor, total: torch.Tensor, *, early: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = rms_norm_flat_quantize(y, self.gamma, self.left, self.right, epsilon=EPSILON, residual=total, constant_factors=early)
        assert out.sum is not None, "asked for by the residual"
        return self._product(name, layer, out.q, out.scale, early=early), out.sum

    def _product(self, name: str, layer: dict[str, torch.Tensor], q: torch.Tensor, scale: torch.Tensor, *, early: bool) -> torch.Tensor:
        return w4a4_gemm(q, scale, layer[name], self.scales[name], layout="k128", constant_weights=early)


def measure(rows: int, seconds: float, bandwidth: float) -> Row:
    """Both forms of the chain for some rows."""
    import torch

    chain = Chain(rows)
    wanted = chain.run(early=False).clone()
    wrong = "" if torch.equal(chain.run(early=True), wanted) else f"{rows} rows: what begins early gives other bits"
    times: dict[str, float | None] = {}
    for name, early in ((APART, False), (EARLY, True)):
        times[name] = replayed(lambda early=early: chain.run(early=early), seconds)
    size = chain.shape.bytes
    return Row({"rows": rows}, times, EARLY, size / bandwidth * 1e6, size, 2 * rows * size * 2, wrong=wrong)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@seconds_option
@json_option
def main(seconds: float, as_json: bool) -> None:
    """Time the products and quantizers of four decoder layers, one behind the other."""
    timer = Timer(seconds)
    bandwidth = timer.copy_bandwidth()
    measured = [measure(rows, seconds, bandwidth) for rows in ROWS]
    report(
        f"Four layers of Llama-2-7B's sizes on {timer.device}, µs",
        measured,
        (APART, EARLY),
        as_json=as_json,
        **about(timer, bandwidth, REPLAY_METHOD),
    )


if __name__ == "__main__":
    run(main)
