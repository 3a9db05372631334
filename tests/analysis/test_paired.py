import numpy as np
import pytest

from pruneattn.analysis.paired import paired_test, unit_scores

stats = pytest.importorskip("scipy.stats")


def test_a_clip_is_right_or_wrong():
    logits, targets = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 2.0]]), np.array([[1, 0], [0, 1], [1, 0]])
    assert unit_scores(logits, targets, multilabel=False).tolist() == [1, 1, 0]


def test_a_class_has_an_average_precision():
    logits = np.array([[3.0, 0.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    targets = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    units = unit_scores(logits, targets, multilabel=True)
    assert units[:2] == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0]) and np.isnan(units[2])


def test_the_paired_test_equals_students_t_test():
    a, b = np.random.default_rng(0).random((2, 30))
    found = paired_test(np.append(a - b, np.nan))
    assert found["difference"] == pytest.approx((a - b).mean())
    assert found["difference_se"] == pytest.approx((a - b).std(ddof=1) / 30**0.5)
    assert found["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_equal_runs_do_not_differ():
    assert paired_test(np.zeros(5)) == {"difference": 0.0, "difference_se": 0.0, "p": 1.0}
