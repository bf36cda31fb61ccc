"""Charts are drawn; what they show is read off the figure, not the pixels."""

import pytest
from PIL import Image

from shortv_hf import plots


pytestmark = pytest.mark.once


@pytest.fixture
def figures(monkeypatch):
    made = []
    make = plots._figure

    def keep(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(plots, "_figure", keep)
    return made


def test_layer_scores(figures, tmp_path):
    file = plots.plot_layer_scores({"visual": [1.0, 0.5], "text": [2.0, 3.0]}, "nats", tmp_path / "bars.png")
    Image.open(file).verify()
    axes = figures[0][1]
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[1.0, 0.5], [2.0, 3.0]]
    lefts = [[bar.get_x() for bar in bars] for bars in axes.containers]
    assert lefts[0][0] < lefts[1][0] < lefts[0][1] < lefts[1][1]  # side by side, layer by layer
    assert axes.get_ylabel() == "nats" and axes.get_yscale() == "linear"


def test_curves(figures, tmp_path):
    curves = {"a": {"x": [0, 1], "y": [3, 4]}, "b": {"x": [0, 1], "y": [5, 6], "low": [4, 5], "high": [6, 7]}}
    file = plots.plot_curves({"left": curves, "right": curves}, "N", tmp_path / "curves.png")
    Image.open(file).verify()
    left, right = figures[0][1]
    assert (left.get_ylabel(), right.get_ylabel(), left.get_xlabel()) == ("left", "right", "N")
    assert [list(line.get_ydata()) for line in left.lines] == [[3, 4], [5, 6]] and len(left.collections) == 1
