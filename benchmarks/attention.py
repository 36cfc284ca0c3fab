"""Steps of one token through attention: caches of fp16 and int8, beside torch's attention on the same cache.

    python -m benchmarks.attention

Every call of a replayed CUDA graph has caches of its own, more than a second-level cache holds. Ours is rotary embedding, the new key and
value, and attention; torch's is attention alone (``scaled_dot_product_attention``, the past as it lies in the buffer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from benchmarks.results import Row, json_option, report, run, seconds_option
from benchmarks.timing import REPLAY_METHOD, Timer, about, replayed
from fqonnx.kernels import decode_attention

if TYPE_CHECKING:
    import torch

OURS, INT8, TORCH = "fp16", "int8", "torch"
TOLERANCE = 5e-3
"""Of a result against torch's, relative to its norm; an int8 cache is held against the fp16 one that it means."""

INT8_STEP = 1 / 30
_COLD_BYTES = 400 << 20
"""Of the caches of one graph together, at least."""


@dataclass(frozen=True)
class Case:
    """Sizes of a step.

    Attributes:
        model: Whose heads.
        heads: Of queries.
        kv_heads: Of keys and values.
        batch: Sequences.
        past: Tokens behind each.
        capacity: Tokens that the buffers hold.
        head: Width of a head.
    """

    model: str
    heads: int
    kv_heads: int
    batch: int
    past: int = 512
    capacity: int = 1024
    head: int = 128

    @property
    def bytes(self) -> int:
        """Of the keys and values that are read, in fp16."""
        return 2 * 2 * self.batch * self.kv_heads * (self.past + 1) * self.head

    @property
    def copies(self) -> int:
        """Caches of a graph."""
        return max(4, -(-_COLD_BYTES // self.bytes))


CASES = tuple(Case(model, 32, kv_heads, batch) for model, kv_heads in (("llama-2-7b", 32), ("llama-3-8b", 8)) for batch in (1, 16, 64))


class Step:
    """A case's operands on the GPU."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        import torch

        generator = torch.Generator(device).manual_seed(case.batch)
        options: dict[str, Any] = {"device": device, "generator": generator}
        shape = (case.batch, case.kv_heads, case.capacity, case.head)
        self.case = case
        widths = [case.heads * case.head, case.kv_heads * case.head, case.kv_heads * case.head]
        self.q, self.k, self.v = torch.randn(case.batch, sum(widths), **options).half().split(widths, dim=1)
        self.past = torch.full((case.batch,), case.past, dtype=torch.int32, device=device)
        angles = 6.3 * torch.rand(case.capacity, case.head // 2, **options)
        self.rotary = (angles.cos().half(), angles.sin().half())
        codes = [torch.randint(-128, 128, shape, dtype=torch.int8, **options) for _ in range(case.copies)]
        self.scales = (torch.full((case.kv_heads, case.head), INT8_STEP, device=device),) * 2
        self.int8 = [(key, key.flip(2).contiguous()) for key in codes]
        self.float = [(key.half() * INT8_STEP, value.half() * INT8_STEP) for key, value in self.int8]

    def ours(self, index: int, *, int8: bool) -> torch.Tensor:
        """The kernel on one of the caches."""
        key, value = (self.int8 if int8 else self.float)[index]
        scales = self.scales if int8 else None
        return decode_attention(
            self.q, self.k, self.v, key, value, self.past, rotary=self.rotary, scales=scales, longest=self.case.past + 1
        )

    def peer(self, index: int) -> torch.Tensor:
        """Attention of torch's, for the query as it is, on one of the caches with the new token in it."""
        from torch.nn.functional import scaled_dot_product_attention

        case, (key, value) = self.case, self.float[index]
        tokens = case.past + 1
        q = self.q.reshape(case.batch, case.heads, 1, case.head)
        y = scaled_dot_product_attention(q, key[:, :, :tokens], value[:, :, :tokens], enable_gqa=case.kv_heads != case.heads)
        return y.reshape(case.batch, -1)

    def wrong(self) -> str:
        """What is wrong with a result; empty where nothing is."""
        import torch

        plain = decode_attention(self.q, self.k, self.v, *self.float[0], self.past, longest=self.case.past + 1)
        pairs = [("fp16", plain, self.peer(0)), ("int8", self.ours(1, int8=True), self.ours(1, int8=False))]
        for name, got, wanted in pairs:
            error = float(torch.linalg.vector_norm((got - wanted).float()) / torch.linalg.vector_norm(wanted.float()))
            if not error <= (TOLERANCE if name == "fp16" else 2 * TOLERANCE):  # NaN is wrong
                return f"{self.case.model}, batch {self.case.batch}, {name}: relative error {error:.4f}"
        return ""


def measure(case: Case, seconds: float, bandwidth: float) -> Row:
    """One case."""
    step = Step(case)
    wrong = step.wrong()
    times: dict[str, float | None] = {
        OURS: replayed(lambda: [step.ours(index, int8=False) for index in range(case.copies)], seconds) / case.copies,
        INT8: replayed(lambda: [step.ours(index, int8=True) for index in range(case.copies)], seconds) / case.copies,
        TORCH: replayed(lambda: [step.peer(index) for index in range(case.copies)], seconds) / case.copies,
    }
    sizes = {"model": case.model, "batch": case.batch}
    return Row(sizes, times, OURS, case.bytes / bandwidth * 1e6, case.bytes, wrong=wrong)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@seconds_option
@json_option
def main(seconds: float, as_json: bool) -> None:
    """Time attention's steps of one token."""
    timer = Timer(seconds)
    bandwidth = timer.copy_bandwidth()
    measured = [measure(case, seconds, bandwidth) for case in CASES]
    report(
        f"A step of attention, 512 tokens behind it, on {timer.device}, µs",
        measured,
        (OURS, INT8, TORCH),
        as_json=as_json,
        **about(timer, bandwidth, REPLAY_METHOD),
    )


if __name__ == "__main__":
    run(main)
