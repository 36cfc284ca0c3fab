"""Storage of int4 codes: packing as ONNX defines it, and weight layouts as kernels read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fqonnx.errors import ModelError
from fqonnx.ops import LAYOUTS, from_layout, int4_tensor, lazy_int4_tensor, pack_int4, reference, to_layout, unpack_int4
from fqonnx.ops.layout import CONTAINERS, check_container
from tests.ops_graphs import constant, empty_model, proto

if TYPE_CHECKING:
    from pathlib import Path

Codes = npt.NDArray[np.int8]

any_codes = hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9), elements=st.integers(-8, 7))
row_codes = st.tuples(st.integers(1, 5), st.integers(0, 3)).flatmap(
    lambda shape: hnp.arrays(np.int8, (shape[0], 128 * shape[1]), elements=st.integers(-8, 7))
)


@given(any_codes)
def test_packing_is_undone(codes: Codes) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8
    assert packed.size == (codes.size + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape), codes, strict=True)


@given(any_codes)
def test_packing_is_that_of_onnx(codes: Codes) -> None:
    want = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4), "w")
    assert want.data_type == onnx.TensorProto.INT4
    assert pack_int4(codes).tobytes() == want.raw_data
    assert int4_tensor(codes, "w").tobytes() == want.raw_data


def test_the_even_index_is_in_the_low_nibble_and_views_are_packed_in_their_own_order() -> None:
    codes = np.array([[1, -2, 7], [-8, 0, -1]], np.int8)
    assert pack_int4(codes).tolist() == [0xE1, 0x87, 0xF0]
    assert pack_int4(codes.T).tolist() == [0x81, 0x0E, 0xF7]
    assert pack_int4(codes[0]).tolist() == [0xE1, 0x07]
    assert codes.tolist() == [[1, -2, 7], [-8, 0, -1]]


@pytest.mark.parametrize("code", [-9, 8, 127, -128])
def test_codes_beyond_four_bits_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"4-bit codes are -8\.\.7, not "):
        pack_int4(np.array([0, code], np.int8))


def test_bytes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\] 4-bit codes take 5 bytes, not 4"):
        unpack_int4(np.zeros(4, np.uint8), (3, 3))


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 8).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_rows_pack_each_on_its_own(codes: Codes) -> None:
    packed = reference.pack_rows(codes)
    assert packed.shape == (*codes.shape[:-1], codes.shape[-1] // 2)
    np.testing.assert_array_equal(packed, (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4), strict=True)
    np.testing.assert_array_equal(reference.unpack_rows(packed), codes, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(codes=row_codes)
def test_layouts_are_undone_and_only_reorder_within_blocks(layout: str, codes: Codes) -> None:
    stored = to_layout(codes, layout)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(from_layout(stored, layout), codes, strict=True)
    blocks = (len(codes), codes.shape[1] // 128, 128)
    np.testing.assert_array_equal(np.sort(stored.reshape(blocks)), np.sort(codes.reshape(blocks)))


def test_plain_is_the_order_of_k() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (3, 7)).astype(np.int8)
    np.testing.assert_array_equal(to_layout(codes, "plain"), codes)


def test_k128_places_each_code_where_its_definition_says() -> None:
    logical = np.arange(128, dtype=np.int8)[None]
    stored = to_layout(logical, "k128")[0]
    for t in range(4):
        for j in range(4):
            for i in range(4):
                for h in range(2):
                    assert stored[((t * 4 + j) * 4 + i) * 2 + h] == ((j * 2 + h) * 4 + t) * 4 + i


def test_k128_unpacks_by_one_shift_and_masks_into_the_operands_of_wgmma() -> None:
    """Thread t of a quad holds, for each step of 32 along K, bytes k = 4 t + i (its first registers) and k = 16 + 4 t + i (its last)."""
    codes = np.random.default_rng(1).integers(-8, 8, (5, 256)).astype(np.int8)
    words = pack_int4(to_layout(codes, "k128")).view("<u4").reshape(5, 2, 4, 4)  # row, block, thread, step
    low = ((words << np.uint32(4)) & np.uint32(0xF0F0F0F0)).view(np.int8).reshape(5, 2, 4, 4, 4)
    high = (words & np.uint32(0xF0F0F0F0)).view(np.int8).reshape(5, 2, 4, 4, 4)
    wide = codes.astype(int).reshape(5, 2, 4, 32) * 16
    for t in range(4):
        np.testing.assert_array_equal(low[:, :, t], wide[..., 4 * t : 4 * t + 4])
        np.testing.assert_array_equal(high[:, :, t], wide[..., 16 + 4 * t : 20 + 4 * t])


@pytest.mark.parametrize("convert", [to_layout, from_layout])
def test_what_fits_no_layout_is_refused(convert: object) -> None:
    assert callable(convert)
    with pytest.raises(ModelError, match="rows of 192 codes do not fit a weight layout of blocks of 128: use layout 'plain'"):
        convert(np.zeros((2, 192), np.int8), "k128")
    with pytest.raises(ModelError, match="unknown weight layout 'k32': choose from plain, k128"):
        convert(np.zeros((2, 128), np.int8), "k32")
    with pytest.raises(ValueError, match=r"weight codes are \[N, K\], not \[128\]"):
        convert(np.zeros(128, np.int8), "k128")


@pytest.mark.parametrize(
    ("bits", "packed", "k", "fits"), [(4, True, 6, True), (4, True, 7, False), (8, True, 6, False), (8, False, 7, True)]
)
def test_containers(bits: int, packed: bool, k: int, fits: bool) -> None:
    assert CONTAINERS == ("int8", "packed")
    if fits:
        check_container(bits=bits, packed=packed, k=k)
    else:
        with pytest.raises(ModelError, match=f"rows of {k} {bits}-bit codes cannot be packed two a byte: use the int8 container"):
            check_container(bits=bits, packed=packed, k=k)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1)])
def test_int4_tensors_hold_the_codes(shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(2).integers(-8, 8, shape).astype(np.int8)
    tensor = int4_tensor(codes, "w")
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) == ("w", ir.DataType.INT4, shape, (codes.size + 1) // 2)
    np.testing.assert_array_equal(np.asarray(tensor.numpy(), np.int8), codes)
    np.testing.assert_array_equal(np.asarray(onnx.numpy_helper.to_array(ir.serde.serialize_tensor(tensor)), np.int8), codes)


def test_a_lazy_tensor_reads_when_written_and_keeps_nothing(tmp_path: Path) -> None:
    codes = np.random.default_rng(3).integers(-8, 8, (6, 10)).astype(np.int8)
    reads = []

    def read() -> Codes:
        reads.append(1)
        return codes

    model = empty_model([])
    constant(model.graph, "w", lazy_int4_tensor(read, codes.shape, "w"))
    assert not reads
    for count in (1, 2):
        assert proto(model).graph.initializer[0].raw_data == pack_int4(codes).tobytes()
        assert len(reads) == count
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    assert (tmp_path / "model.onnx.data").read_bytes()[:30] == pack_int4(codes).tobytes()


def test_a_lazy_tensor_refuses_codes_of_another_shape() -> None:
    tensor = lazy_int4_tensor(lambda: np.zeros((2, 3), np.int8), (3, 2), "w")
    with pytest.raises(ValueError, match=r"w: codes are \[2, 3\] where \[3, 2\] was declared"):
        tensor.tobytes()
