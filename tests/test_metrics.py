"""Every figure against a value worked out by hand or by a plain formula."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqonnx import metrics
from fqonnx.metrics import Divergence, LogitsDivergence, MeanCosine, Perplexity, is_floating


def diverge(*pairs):
    accumulator = Divergence()
    for reference, candidate in pairs:
        accumulator.update(np.asarray(reference), np.asarray(candidate))
    return accumulator


class TestDivergence:
    def test_hand_computed(self):
        # r = (3, 4), c = (3, 3): r·c = 21, |r| = 5, |c| = sqrt 18, error (0, -1).
        d = diverge(([3.0, 4.0], [3.0, 3.0]))
        assert d.cosine == pytest.approx(21 / (5 * math.sqrt(18)), rel=1e-15)
        assert d.rel_l2 == pytest.approx(0.2)
        assert d.sqnr_db == pytest.approx(10 * math.log10(25))
        assert d.max_abs == 1.0
        assert (d.samples, d.elements, d.exact) == (1, 2, 1)

    def test_samples_of_any_shape_are_one_long_vector(self):
        split = diverge(([[3.0], [4.0]], [[3.0], [3.0]]), (2.0, 1.0), (np.zeros((0, 7)), np.zeros((0, 7))))
        whole = diverge(([3.0, 4.0, 2.0], [3.0, 3.0, 1.0]))
        assert (split.cosine, split.rel_l2, split.sqnr_db, split.max_abs) == (whole.cosine, whole.rel_l2, whole.sqnr_db, whole.max_abs)
        assert split.samples == 3

    def test_chunks_do_not_change_the_figures(self, monkeypatch):
        rng = np.random.default_rng(0)
        r, c = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
        c[2, 3] = np.inf
        whole = diverge((r, c))
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 4)
        chunked = diverge((r, c))
        assert (whole.inf, whole.mismatched) == (chunked.inf, chunked.mismatched) == (1, 1)
        c[2, 3] = 0.0
        assert diverge((r, c)).rel_l2 == pytest.approx(np.linalg.norm(c - r) / np.linalg.norm(r), rel=1e-14)

    def test_equal(self):
        d = diverge(([1.0, -2.0], [1.0, -2.0]))
        assert (d.cosine, d.rel_l2, d.sqnr_db, d.max_abs) == (1.0, 0.0, math.inf, 0.0)

    @pytest.mark.parametrize(
        ("candidate", "expected"),
        [([0.0, 0.0], (1.0, 0.0, math.inf, 0.0)), ([0.0, -2.0], (0.0, math.inf, -math.inf, 2.0))],
    )
    def test_zero_reference(self, candidate, expected):
        d = diverge(([0.0, 0.0], candidate))
        assert (d.cosine, d.rel_l2, d.sqnr_db, d.max_abs) == expected

    def test_zero_candidate(self):
        d = diverge(([3.0, 4.0], [0.0, 0.0]))
        assert (d.cosine, d.rel_l2, d.sqnr_db, d.max_abs) == (0.0, 1.0, 0.0, 4.0)

    @pytest.mark.parametrize("pairs", [(), (([], []),)])
    def test_without_elements_nothing_is_known(self, pairs):
        d = diverge(*pairs)
        assert all(math.isnan(x) for x in (d.cosine, d.rel_l2, d.sqnr_db, d.max_abs))

    def test_scalar(self):
        assert diverge((np.float32(2), np.float32(1))).rel_l2 == 0.5

    def test_nan_on_one_side_spoils_every_figure_for_good(self):
        d = diverge(([1.0, math.nan, 1.0], [1.0, 1.0, math.nan]), ([1.0], [1.0]))
        assert (d.nan_reference, d.nan, d.inf_reference, d.inf, d.mismatched) == (1, 1, 0, 0, 2)
        assert all(math.isnan(x) for x in (d.cosine, d.rel_l2, d.sqnr_db, d.max_abs))
        assert d.worst_sample == 0

    def test_nan_on_both_sides_is_no_agreement(self):
        assert math.isnan(diverge(([math.nan, 1.0], [math.nan, 1.0])).rel_l2)

    def test_equal_infinities_agree_and_the_rest_counts(self):
        d = diverge(([-math.inf, 3.0, 4.0], [-math.inf, 3.0, 3.0]))
        assert (d.inf_reference, d.inf, d.mismatched, d.rel_l2) == (1, 1, 0, pytest.approx(0.2))

    @pytest.mark.parametrize("candidate", [math.inf, 0.0])
    def test_an_infinity_on_one_side_or_of_the_other_sign_is_a_mismatch(self, candidate):
        d = diverge(([-math.inf, 1.0], [candidate, 1.0]))
        assert d.mismatched == 1
        assert math.isnan(d.rel_l2)

    def test_integers_and_booleans_count_exact_matches(self):
        assert diverge(([1, 2, 3], [1, 2, 4])).exact == 2
        assert diverge(([True, False], [True, True])).exact == 1
        assert diverge(([2**60], [2**60 + 1])).exact == 0  # equal as float64

    def test_half_precision_is_widened_before_anything_is_summed(self):
        # 4096 ones: a running float16 sum sticks at 2048, a bfloat16 one at 256.
        for dtype in (np.float16, ml_dtypes.bfloat16):
            d = diverge((np.ones(4096, dtype), np.full(4096, 0.5, dtype)))
            assert d.rel_l2 == 0.5
        big = np.full(4, 60000, np.float16)
        assert diverge((big, -big)).max_abs == 120000.0

    def test_worst_sample(self):
        d = diverge(([1.0], [1.1]), ([1.0], [2.0]), ([1.0], [1.2]))
        assert d.worst_sample == 1

    def test_update_returns_the_sample_alone(self):
        d = Divergence()
        assert d.update(np.array([1.0]), np.array([2.0])) == 1.0
        assert d.update(np.array([2.0]), np.array([2.0])) == 0.0
        assert math.isnan(d.update(np.array([2.0]), np.array([math.nan])))

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"reference \[2\], candidate \[1, 2\]"):
            diverge(([1.0, 2.0], [[1.0, 2.0]]))

    @settings(deadline=None)
    @given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20), st.integers(0, 2**31), st.floats(0.1, 10))
    def test_figures_agree_with_each_other(self, values, seed, factor):
        r = np.array(values) / 8
        c = r + np.random.default_rng(seed).normal(size=r.shape)
        d, scaled = diverge((r, c)), diverge((r * factor, c * factor))
        assert -1 <= d.cosine <= 1
        if 1e-6 < d.rel_l2 < math.inf:
            assert d.sqnr_db == pytest.approx(-20 * math.log10(d.rel_l2))
            assert scaled.rel_l2 == pytest.approx(d.rel_l2)


class TestMeanCosine:
    def test_mean_over_the_last_axis(self):
        m = MeanCosine()
        m.update(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 5.0]]))
        m.update(np.array([1.0, 0.0]), np.array([-1.0, 0.0]))
        assert m.value == pytest.approx((math.sqrt(0.5) + 1 - 1) / 3)
        assert m.count == 3

    def test_zero_vectors(self):
        m = MeanCosine()
        m.update(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        assert m.value == pytest.approx(1 / 3)

    def test_empty_scalar_and_nan(self):
        m = MeanCosine()
        m.update(np.zeros((0, 4)), np.zeros((0, 4)))
        assert math.isnan(m.value)
        m.update(np.float32(2), np.float32(3))
        assert m.value == 1.0
        m.update(np.array([1.0, math.nan]), np.array([1.0, 1.0]))
        assert math.isnan(m.value)

    def test_rows_in_chunks(self, monkeypatch):
        rng = np.random.default_rng(1)
        r, c = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 8)
        m = MeanCosine()
        m.update(r, c)
        expected = [r[i] @ c[i] / np.linalg.norm(r[i]) / np.linalg.norm(c[i]) for i in range(9)]
        assert m.value == pytest.approx(np.mean(expected))


class TestLogitsDivergence:
    def test_hand_computed(self):
        # p = (1/4, 3/4), q = (1/2, 1/2): KL = 1/4 log 1/2 + 3/4 log 3/2; an arbitrary shift of the logits changes nothing.
        m = LogitsDivergence()
        m.update(np.log([[1.0, 3.0]]) + 7, np.zeros((1, 2)) - 900)
        assert m.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
        assert m.top1 == 0.0

    def test_stable_for_huge_logits(self):
        m = LogitsDivergence()
        m.update(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32), np.array([[1e4, 0.0], [1e4, 0.0]], np.float32))
        assert m.kl == pytest.approx(1e4 / 2)
        assert m.top1 == 0.5

    def test_masked_classes_add_nothing(self):
        m = LogitsDivergence()
        m.update(np.array([0.0, 0.0, -math.inf]), np.array([0.0, 0.0, -math.inf]))
        assert (m.kl, m.top1) == (0.0, 1.0)

    def test_a_class_that_the_candidate_rules_out_is_infinitely_bad(self):
        m = LogitsDivergence()
        m.update(np.array([0.0, 0.0]), np.array([0.0, -math.inf]))
        assert m.kl == math.inf

    @pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    def test_rows_without_a_softmax(self, bad):
        m = LogitsDivergence()
        m.update(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], bad]))
        assert math.isnan(m.kl)
        assert m.top1 == 0.5

    def test_empty_and_scalar(self):
        m = LogitsDivergence()
        m.update(np.zeros((0, 3)), np.zeros((0, 3)))
        assert math.isnan(m.kl)
        assert math.isnan(m.top1)
        with pytest.raises(ValueError, match="axis of classes"):
            m.update(np.float32(1), np.float32(1))

    def test_rows_in_chunks(self, monkeypatch):
        rng = np.random.default_rng(2)
        r, c = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
        whole = LogitsDivergence()
        whole.update(r, c)
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 8)
        chunked = LogitsDivergence()
        chunked.update(r, c)
        assert chunked.count == 15
        assert chunked.kl == pytest.approx(whole.kl)
        assert chunked.top1 == whole.top1

    def test_symmetric_figures_by_hand(self):
        m = LogitsDivergence()
        # p = (3/4, 1/4), q = (1/4, 3/4), so their middle is uniform: KL of each to it is 3/4 log(3/2) + 1/4 log(1/2).
        m.update(np.log([[3.0, 1.0]]), np.log([[1.0, 3.0]]))
        assert m.js == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert m.total_variation == pytest.approx(0.5)
        assert m.kl == pytest.approx(0.5 * math.log(3))

    def test_distributions_without_a_common_class(self):
        m = LogitsDivergence()
        m.update(np.array([[0.0, -math.inf]]), np.array([[-math.inf, 0.0]]))
        assert (m.js, m.total_variation, m.kl) == (pytest.approx(math.log(2)), 1.0, math.inf)

    def test_equal_distributions_are_at_no_distance(self):
        m = LogitsDivergence()
        logits = np.random.default_rng(5).normal(size=(4, 9))
        m.update(logits, logits + 7)  # the same for all classes of a row changes nothing
        assert m.js == pytest.approx(0, abs=1e-15)
        assert m.total_variation == pytest.approx(0, abs=1e-15)

    def test_a_nan_makes_the_symmetric_figures_nan(self):
        m = LogitsDivergence()
        assert math.isnan(m.js)
        m.update(np.array([[0.0, math.nan]]), np.array([[0.0, 1.0]]))
        assert math.isnan(m.js)
        assert math.isnan(m.total_variation)


class TestPerplexity:
    def test_hand_computed(self):
        # Predictions at t = 0 and 1: p(token 1) = 1/4, p(token 0) = 1/2; the last row has nothing to predict.
        logits = np.log([[[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]]])
        m = Perplexity()
        m.update(logits, np.array([[0, 1, 0]]))
        assert m.count == 2
        assert m.value == pytest.approx(math.sqrt(8))

    def test_uniform_is_the_vocabulary_whatever_the_chunks(self, monkeypatch):
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 16)
        m = Perplexity()
        for length in (5, 1, 9):  # a single token predicts nothing
            m.update(np.full((2, length, 7), 3, np.float16), np.random.default_rng(0).integers(0, 7, (2, length), np.uint16))
        assert m.count == 2 * (4 + 8)
        assert m.value == pytest.approx(7)

    def test_padding_is_neither_predicted_nor_predicts(self):
        rng = np.random.default_rng(3)
        logits, tokens = rng.normal(size=(1, 6, 5)), rng.integers(0, 5, (1, 6))
        padded, exact = Perplexity(), Perplexity()
        padded.update(logits, tokens, np.array([[0, 1, 1, 1, 0, 0]]))
        exact.update(logits[:, 1:4], tokens[:, 1:4])
        assert padded.count == 2
        assert padded.value == exact.value

    def test_bad_input(self):
        m = Perplexity()
        assert math.isnan(m.value)
        with pytest.raises(ValueError, match="token 5 is outside the vocabulary of 5"):
            m.update(np.zeros((1, 2, 5)), np.array([[0, 5]]))
        with pytest.raises(ValueError, match=r"expected \[B, S, V\]"):
            m.update(np.zeros((1, 2, 5)), np.array([0, 1]))

    def test_chunks_with_their_targets_are_the_whole_text(self):
        rng = np.random.default_rng(8)
        logits, tokens = rng.normal(size=(2, 11, 6)), rng.integers(0, 6, (2, 11))
        whole, chunked = Perplexity(), Perplexity()
        whole.update(logits, tokens)
        for start in range(0, 10, 4):
            part = slice(start, min(start + 4, 10))
            chunked.score(logits[:, part], tokens[:, part.start + 1 : part.stop + 1])
        assert chunked.count == whole.count == 20
        assert chunked.value == pytest.approx(whole.value)

    def test_scores_by_hand(self):
        m = Perplexity()
        m.score(np.log([[1.0, 3.0], [2.0, 2.0]]), np.array([1, 0]))
        assert m.value == pytest.approx((0.75 * 0.5) ** -0.5)
        with pytest.raises(ValueError, match=r"expected \[\.\., V\] and \[\.\.\]"):
            m.score(np.zeros((2, 3)), np.zeros(3, int))

    def test_not_finite(self):
        m = Perplexity()
        m.update(np.array([[[0.0, -1e6], [0.0, 0.0]]]), np.array([[0, 1]]))
        assert m.value == math.inf
        m.update(np.array([[[math.nan, 0.0], [0.0, 0.0]]]), np.array([[0, 1]]))
        assert math.isnan(m.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_floats(dtype):
    assert is_floating(np.zeros(1, dtype))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_no_floats(dtype):
    assert not is_floating(np.zeros(1, dtype))
