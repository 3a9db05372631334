import csv
import json

import numpy as np
import pytest
import torch

from pruneattn.analysis.clusters import (
    COLORS,
    Clusters,
    Example,
    ValueCounts,
    cluster_rows,
    find_clusters,
    fit_clusters,
    load_clusters,
    nearest_patches,
    plot_clusters,
)
from pruneattn.data import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.plot import BLANK

FEATURES = FeatureConfig(frames=128, mean=-9.0, std=4.0)


def lumps(rng, count=20000):
    """Five overlapping clusters of different sizes, and a spike of equal values like that of padding."""
    parts = [
        rng.normal(centre, 0.08, int(count * share))
        for centre, share in ((-0.9, 0.1), (-0.5, 0.3), (-0.1, 0.3), (0.3, 0.2), (0.8, 0.1))
    ]
    return np.concatenate([*parts, np.full(count // 10, -1.25)])


def by_definition(**changes):
    values = dict(
        statistic="intensity",
        boundaries=(-0.5, 0.0, 0.5, 1.0),
        centres=(-1.0, -0.2, 0.2, 0.7, 1.5),
        shares=(0.2,) * 5,
        mean=-9.0,
        std=4.0,
        clips=3,
        patches=192,
        data="three clips",
    )
    return Clusters(**{**values, **changes})


def test_counts_keep_count_sum_and_order_in_bounded_memory():
    values = lumps(np.random.default_rng(0))
    counts = ValueCounts()
    for part in np.array_split(np.random.default_rng(1).permutation(values), 37):
        counts.add(torch.from_numpy(part).reshape(1, -1))
    assert counts.counts.sum() == len(values) and len(counts.values) < 3.5 / 1e-4
    assert (counts.values * counts.counts).sum() == pytest.approx(values.sum())
    spread = np.repeat(counts.values, counts.counts)
    assert np.abs(spread - np.sort(values)).max() <= 1e-4
    assert (np.diff(counts.values) > 0).all()


def test_clusters_are_those_of_scikit_learn_on_the_whole_array():
    cluster = pytest.importorskip("sklearn.cluster")
    values = lumps(np.random.default_rng(2))
    counts = ValueCounts()
    for part in np.array_split(values, 11):
        counts.add(part)
    boundaries, centres, shares = fit_clusters(counts)
    whole = cluster.KMeans(5, n_init=10, random_state=3).fit(values[:, None])
    expected = np.sort(whole.cluster_centers_[:, 0])
    np.testing.assert_allclose(centres, expected, atol=1e-3)
    order = np.argsort(whole.cluster_centers_[:, 0])
    np.testing.assert_allclose(shares, np.bincount(whole.labels_)[order] / len(values), atol=1e-3)
    numbers = by_definition(boundaries=boundaries).assign(torch.from_numpy(values)).numpy()
    assert (numbers == np.argsort(order)[whole.labels_]).mean() > 0.999


def test_a_value_on_a_boundary_belongs_to_the_lower_cluster():
    values = torch.tensor([[-3.0, -0.5, -0.4999], [0.5, 0.51, 9.0]])
    assert by_definition().assign(values).tolist() == [[0, 0, 1], [2, 3, 4]]


def test_too_few_values_are_rejected():
    pytest.importorskip("sklearn")
    counts = ValueCounts()
    counts.add(torch.ones(100))
    with pytest.raises(UserError, match="1 distinct patch values are too few for 5 clusters"):
        fit_clusters(counts)


def test_saved_clusters_are_loaded_again(tmp_path):
    by_definition().save(tmp_path / "clusters.json")
    assert load_clusters(tmp_path / "clusters.json", FEATURES) == by_definition()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: create it with pruneattn analyze clusters"),
        ("{", "is not a clusters.json of pruneattn analyze clusters"),
        ("[]", "is not a clusters.json of pruneattn analyze clusters"),
        ('{"statistic": "intensity"}', "is not a clusters.json of pruneattn analyze clusters"),
        (
            json.dumps(vars(by_definition(mean=-4.0))),
            "mean -4 and std 4, .*-9 and 4: run pruneattn analyze clusters with this checkpoint",
        ),
    ],
)
def test_other_files_are_rejected(tmp_path, content, message):
    path = tmp_path / "clusters.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"clusters\.json:? .*{message}"):
        load_clusters(path, FEATURES)


def test_the_command_clusters_every_patch(analysis_run, analyze, tmp_path):
    """Shares, boundaries and files against the statistic computed directly from every clip."""
    sklearn = pytest.importorskip("sklearn.cluster")
    run = analysis_run("ast")
    analyze("clusters", *run.options(tmp_path / "out"), "--statistic", "variation")
    saved = load_clusters(tmp_path / "out" / "clusters.json", run.model.features)
    cells = torch.stack([fbank.view(8, 16, 8, 16).transpose(1, 2).reshape(64, 256) for fbank in run.fbanks()])
    values = cells.double().std(-1, correction=0).flatten()  # [clips * 64]
    assert saved.clips == len(cells) and saved.patches == len(values) and saved.statistic == "variation"
    fitted = sklearn.KMeans(5, n_init=10, random_state=1).fit(values.numpy()[:, None], sample_weight=None)
    inertia = (values - torch.tensor(saved.centres)[saved.assign(values)]).square().sum()
    assert inertia <= fitted.inertia_ * 1.02
    with open(tmp_path / "out" / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cluster"] for row in rows] == ["C1", "C2", "C3", "C4", "C5"]
    counts = torch.bincount(saved.assign(values), minlength=5) / len(values)
    assert [float(row["share"]) for row in rows] == pytest.approx(counts.tolist(), abs=2e-3)
    assert float(rows[0]["up_to"]) == float(rows[1]["above"]) == saved.boundaries[0]
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"clusters.{suffix}").stat().st_size > 10000


@pytest.mark.parametrize("frames, stride", [(121, (10, 10)), (100, (10, 16)), (100, 16)])
def test_every_patch_counts_at_any_stride(analysis_run, frames, stride):
    """Overlapping patches all count, each with its own cells; frames that no patch covers do not."""
    pytest.importorskip("sklearn")
    run = analysis_run("ast", frames=frames, stride=stride)
    found, counts, _ = find_clusters(run.analysis(), "variation", examples=1)
    values = [
        fbank[frame : frame + 16, mel : mel + 16].double().std(correction=0).item()
        for fbank in run.fbanks()
        for frame, mel in run.corners()
    ]
    assert found.patches == len(values) == 7 * run.model.num_patches
    spread = np.repeat(counts.values, counts.counts)
    assert np.abs(spread - np.sort(values)).max() < 2e-4


@pytest.mark.parametrize("frames, stride", [(61, (10, 10)), (52, (7, 16)), (40, (16, 3)), (48, 16)])
def test_a_cell_has_the_color_of_the_patch_with_the_nearest_center(analysis_run, frames, stride):
    run = analysis_run("ast", frames=frames, stride=stride)
    model, corners = run.model, run.corners()
    fbank = torch.randn(frames, 128, generator=torch.Generator().manual_seed(0))
    clusters = by_definition(boundaries=(-0.08, -0.03, 0.03, 0.08))
    numbers = [
        sum(fbank[frame : frame + 16, mel : mel + 16].mean().item() > edge for edge in clusters.boundaries)
        for frame, mel in corners
    ]
    counts = ValueCounts()
    counts.add(torch.linspace(-1, 1, 50))
    dataset = run.analysis().dataset
    figure = plot_clusters(model, dataset, clusters, counts, [Example(0, fbank, frames)])
    lower = figure.subfigs[1]
    image = np.asarray(lower.axes[1].images[0].get_array())
    colors = pytest.importorskip("matplotlib.colors")
    expected = np.full((128, frames, 3), BLANK)
    for mel in range(128):
        for frame in range(frames):
            if any(t <= frame < t + 16 and m <= mel < m + 16 for t, m in corners):
                distances = [((t + 7.5 - frame) ** 2 + (m + 7.5 - mel) ** 2, t, m) for t, m in corners]
                number = numbers[distances.index(min(distances))]
                expected[mel, frame] = colors.to_rgb(COLORS[number])
    assert np.array_equal(image, expected) and len(set(numbers)) == 5
    assert ("nearest center" in lower.get_supxlabel()) == (min(model.stride) < 16)


def test_of_two_nearest_patches_the_lower_one_is_taken():
    assert nearest_patches(64, 16, 4).tolist() == [cell // 16 for cell in range(64)]
    assert nearest_patches(20, 3, 2).tolist() == [0] * 10 + [1] * 10  # cell 9 is 1.5 from both centers
    assert nearest_patches(19, 10, 1).tolist() == [0] * 19


def test_the_outer_clusters_have_no_outer_edge():
    rows = cluster_rows(by_definition())
    assert rows[0]["above"] == -np.inf and rows[4]["up_to"] == np.inf and rows[2]["centre"] == 0.2
