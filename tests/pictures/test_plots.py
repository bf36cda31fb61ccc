"""Charts are drawn; what they show is read off the figure, and text is measured: none cut off, none overprinted."""

import math
import re

import numpy as np
import pytest
from drawn import check_boxes, check_text, record, texts
from helpers import make_config
from PIL import Image

from shortv_hf.layer_contribution import LayerRanking
from shortv_hf.pictures import plots


pytestmark = pytest.mark.once

LAYERS = pytest.mark.parametrize("n_layers", [4, 12, 32, 80])
LONG = "some-organisation/a-name-of-a-model-" + 4 * "that-goes-on-and-on-" + 80 * "x"
NAMES = pytest.mark.parametrize("name", [None, "llava-hf/llava-1.5-7b-hf", LONG], ids=["none", "usual", "long"])


@pytest.fixture
def figures(monkeypatch):
    made = []
    make = plots._figure

    def keep(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(plots, "_figure", keep)
    return made


def check_figure(figure, all_axes):
    """Texts inside the figure and apart from each other, and the legend apart from the axes."""
    figure.draw_without_rendering()  # it was saved at another resolution
    renderer = figure.canvas.get_renderer()
    visible = [figure._suptitle] if figure._suptitle else []
    visible += [text for legend in figure.legends for text in legend.get_texts()]
    for axes in all_axes:
        visible += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            shown = [tick for tick in axis.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
            visible += [tick.label1 for tick in shown]
    boxes = {f"text {i}: {text.get_text()}": text.get_window_extent(renderer) for i, text in enumerate(visible)}
    boxes |= {f"legend {i}": legend.get_window_extent(renderer) for i, legend in enumerate(figure.legends)}
    own = {name: (box.x0, box.y0, box.x1, box.y1) for name, box in boxes.items()}
    legends = {name: own.pop(name) for name in list(own) if name.startswith("legend")}
    check_boxes(own, (figure.bbox.width, figure.bbox.height))
    for legend in legends.values():
        for axes in all_axes:
            check_boxes({"text legend": legend, "axes": axes.get_window_extent().extents}, figure.bbox.size)


class TestText:
    @pytest.mark.parametrize(
        "text", ["a few words", "", "two\nlines", LONG, f"ShortV on {LONG}", "x" * 50, "wé/ß" * 9]
    )
    @pytest.mark.parametrize("width", [1, 7, 30, 1000])
    def test_wrapped(self, text, width):
        lines = plots.wrap_text(text, len, width)
        assert all(len(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", text)
        assert len(lines) == text.count("\n") + 1 or width < 1000

    def test_breaks_at_spaces_then_at_marks(self):
        assert plots.wrap_text("ShortV on llava-1.5-7b", len, 12) == ["ShortV on", "llava-1.5-7b"]
        assert plots.wrap_text("shortv-llava", len, 8) == ["shortv-", "llava"]

    def test_narrower_than_a_character(self):
        assert plots.wrap_text("ab", lambda text: 10 * len(text), 5) == ["a", "b"]

    @pytest.mark.parametrize(("model", "name"), [("a/b", "b"), ("/x/y/", "y"), ("c", "c")])
    def test_short_name(self, model, name):
        assert plots.short_name(model) == name


class TestFrozenLayers:
    def draw(self, tmp_path, n_layers, name=None, t=64, v=576, **kwargs):
        config = make_config(base_model_name_or_path=name)
        config.text_config.num_hidden_layers = n_layers
        config.shortv_layers = list(range(1, n_layers, 2))
        return Image.open(plots.draw_frozen_layers(config, tmp_path / "x.png", t, v, **kwargs))

    @LAYERS
    @NAMES
    def test_all_text_can_be_read(self, monkeypatch, tmp_path, n_layers, name):
        drawn = record(monkeypatch)
        picture = self.draw(tmp_path, n_layers, name, v=2880)
        check_text(drawn)
        assert picture.width <= 2200
        written = "".join(texts(drawn)).replace(" ", "")
        assert f"ShortVon{(name or 'this model').split('/')[-1]}".replace(" ", "") in written
        for part in ("2880visualtokens)", "visual,frozen(KandVonly)", "text,alwayscomputed", "decoderlayer"):
            assert part in written
        labels = [int(text) for text in texts(drawn) if text.isdigit()]
        assert labels[0] == 0 and labels[1] <= 5 and n_layers - labels[-1] <= labels[1]

    @pytest.mark.parametrize("title", ["shortv-shapes-demo", LONG], ids=["usual", "long"])
    def test_title(self, monkeypatch, tmp_path, title):
        drawn = record(monkeypatch)
        self.draw(tmp_path, 12, "llava-hf/llava-1.5-7b-hf", title=title)
        check_text(drawn)
        written = "".join(texts(drawn))
        assert written.startswith(title) and "llava-1.5" not in written

    @LAYERS
    @pytest.mark.parametrize(("t", "v"), [(13, 64), (64, 2880), (1000, 1)])
    def test_a_column_per_layer_to_scale(self, monkeypatch, tmp_path, n_layers, t, v):
        drawn = record(monkeypatch)
        self.draw(tmp_path, n_layers, t=t, v=v)
        columns = [(colour, box) for _, kind, colour, box in drawn if kind == "rectangle"][:-3]  # then, the legend
        visual, text = columns[::2], columns[1::2]
        assert [colour for colour, _ in visual] == [plots.VISUAL, plots.FROZEN] * (n_layers // 2)
        assert [colour for colour, _ in text] == [plots.TEXT] * n_layers
        heights = [[bottom - top + 1 for _, (_, top, _, bottom) in part] for part in (visual, text)]
        assert sum(heights[0]) / sum(map(sum, heights)) == pytest.approx(v / (t + v), abs=0.04)
        rights = [right for _, (_, _, right, _) in text]
        assert all(right < left for right, (_, (left, *_)) in zip(rights, text[1:], strict=False))

    @pytest.mark.parametrize(
        ("reduction", "kept", "shares"),
        [
            ({"method": "fastv", "k": 2, "ratio": 0.5}, None, [1, 1, 0.5, 0.5]),
            ({"method": "vtw", "k": 3}, None, [1, 1, 1, 0]),
            ({"method": "prumerge"}, 4, [0.25] * 4),
        ],
        ids=str,
    )
    def test_what_a_reduction_takes_out_is_empty(self, monkeypatch, tmp_path, reduction, kept, shares):
        drawn = record(monkeypatch)
        config = make_config(visual_reduction=reduction, shortv_layers=[1])
        plots.draw_frozen_layers(config, tmp_path / "x.png", 16, 16, kept=kept)
        boxes = [(colour, box) for _, kind, colour, box in drawn if kind == "rectangle"]
        text = [box for colour, box in boxes if colour == plots.TEXT][:4]
        heights = []
        for left, top, _, _ in text:
            above = [box for colour, box in boxes if box[0] == left and box[3] < top]
            heights.append(sum(box[3] - box[1] for box in above))
        full = text[0][3] - text[0][1]
        assert [height / full for height in heights] == pytest.approx(shares, abs=0.05)
        check_text(drawn)
        assert "visual,takenout" in "".join(texts(drawn)).replace(" ", "")

    def test_how_many_a_reduction_leaves_has_to_be_known(self, tmp_path):
        config = make_config(visual_reduction={"method": "prumerge"})
        with pytest.raises(ValueError, match="depends on the image"):
            plots.draw_frozen_layers(config, tmp_path / "x.png", 16, 16)


class TestLayerScores:
    def scores(self, n_layers):
        """Visual scores 1000 times smaller than those of text; the last one 0, as in a real model."""
        text = [1.0 + layer % 3 for layer in range(n_layers)]
        return {"visual tokens": [value / 1000 for value in text[:-1]] + [0.0], "text tokens": text}

    def test_linear(self, figures, tmp_path):
        file = plots.plot_layer_scores({"visual": [1.0, 0.5], "text": [2.0, 3.0]}, "nats", tmp_path / "bars.png")
        Image.open(file).verify()
        axes = figures[0][1]
        assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[1.0, 0.5], [2.0, 3.0]]
        lefts = [[bar.get_x() for bar in bars] for bars in axes.containers]
        assert lefts[0][0] < lefts[1][0] < lefts[0][1] < lefts[1][1]  # side by side, layer by layer
        assert axes.get_ylabel() == "nats" and axes.get_yscale() == "linear"

    @LAYERS
    def test_small_scores_can_be_seen(self, figures, tmp_path, n_layers):
        plots.plot_layer_scores(self.scores(n_layers), "nats", tmp_path / "bars.png", log=True)
        figure, axes = figures[0]
        assert axes.get_yscale() == "log"
        foot, zoom = axes.get_window_extent().y0, 150 / figure.dpi
        for bars, values in zip(axes.containers, self.scores(n_layers).values(), strict=True):
            boxes = [bar.get_window_extent() for bar, value in zip(bars, values, strict=True) if value]
            assert len(boxes) >= n_layers - 1
            assert min(box.y1 - foot for box in boxes) * zoom > 10 and min(box.width for box in boxes) * zoom > 5

    def test_a_score_of_0_is_marked(self, figures, tmp_path):
        scores = {"visual tokens": [0.001, math.nan, -1e-8, 0.0], "text tokens": [1.0, 0.0, 2.0, 3.0]}
        plots.plot_layer_scores(scores, "nats", tmp_path / "bars.png", log=True)
        figure, axes = figures[0]
        marks = [(mark.get_text(), mark.xy[0], mark.get_color()) for mark in axes.texts]
        bars = [{bar.get_x() + bar.get_width() / 2: bar for bar in bars} for bars in axes.containers]
        visual, text = (list(each) for each in bars)
        expected = [("!", visual[1]), ("−", visual[2]), ("0", visual[3]), ("0", text[1])]
        assert [(mark, x) for mark, x, _ in marks] == [(mark, pytest.approx(x)) for mark, x in expected]
        assert [colour for *_, colour in marks] == [plots.VISUAL] * 3 + [plots.TEXT]
        assert all(each[x].get_height() == 0 for each in bars for _, x, _ in marks if x in each)
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["visual tokens", "text tokens", "exactly 0", "below 0", "not finite"]
        heights = [mark.get_window_extent().y0 - axes.get_window_extent().y0 for mark in axes.texts]
        assert all(0 <= height < 8 for height in heights)

    @pytest.mark.parametrize(
        ("values", "log"),
        [([1e-6, 1.0], False), ([-0.5, 0.9], False), ([0.2, 0.9], True), ([0.0, 0.0], True), ([math.inf, 1.0], True)],
        ids=str,
    )
    def test_axis_stays_linear(self, figures, tmp_path, values, log):
        """Where it was not asked for (cosine, random), and where nothing spans a decade."""
        plots.plot_layer_scores({"visual": values}, "x", tmp_path / "bars.png", log=log)
        _, axes = figures[0]
        assert axes.get_yscale() == "linear" and axes.get_ylim()[0] <= 0 < axes.get_ylim()[1]

    @LAYERS
    @NAMES
    def test_all_text_can_be_read(self, figures, tmp_path, n_layers, name):
        ranking = LayerRanking(
            [0.0] * n_layers, list(range(n_layers)), "lc", "visual", "forward", 0, model={"name": name},
            data={"name": f"gqa,{'/a/long/path/of/pictures,' * 9}, 20 each, seed 0", "samples": 220},
        )  # fmt: skip
        title = plots.ranking_title(ranking, "Layer Contribution (nats)")
        scores = {"visual tokens": [0.0] * n_layers, "text tokens": [0.0, *[2e-9] * (n_layers - 2), 1e3]}
        plots.plot_layer_scores(scores, "Layer Contribution (nats)", tmp_path / "bars.png", log=True, title=title)
        figure, axes = figures[0]
        check_figure(figure, [axes])
        written = re.sub(r"\s", "", figure._suptitle.get_text())
        assert written == re.sub(r"\s", "", title) and figure.bbox.width / figure.dpi <= 12
        assert all(part in title for part in (name or "unnamed model", "220 samples", "gqa", "forward"))
        labels = [int(tick.get_text()) for tick in axes.get_xticklabels()]
        assert labels[0] == 0 and labels[1] <= 5 and n_layers - labels[-1] <= labels[1]

    def test_title_is_no_formula(self, figures, tmp_path):
        plots.plot_layer_scores({"visual": [1.0]}, "x", tmp_path / "bars.png", title="data $HOME and $x_{")

    def test_title_of_a_random_ranking(self):
        ranking = LayerRanking([0.5, 0.1], [1, 0], "random", "visual", None, 7, model={"name": "a/b"})
        assert plots.ranking_title(ranking, "random number") == "a/b: random number\nseed 7"


class TestCurves:
    def test_curves(self, figures, tmp_path):
        curves = {"a": {"x": [0, 1], "y": [3, 4]}, "b": {"x": [0, 1], "y": [5, 6], "low": [4, 5], "high": [6, 7]}}
        file = plots.plot_curves({"left": curves, "right": curves}, "N", tmp_path / "curves.png")
        Image.open(file).verify()
        left, right = figures[0][1]
        assert (left.get_ylabel(), right.get_ylabel(), left.get_xlabel()) == ("left", "right", "N")
        assert [list(line.get_ydata()) for line in left.lines] == [[3, 4], [5, 6]] and len(left.collections) == 1

    def test_curves_that_coincide_are_all_seen(self, figures, tmp_path):
        """Pixels of every colour inside the axes."""
        same = {"x": [0, 6, 12], "y": [1, 2, 4]}
        file = plots.plot_curves({"y": {name: same for name in "abcd"}}, "N", tmp_path / "curves.png")
        figure, (axes,) = figures[0]
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)[::-1]
        left, bottom, right, top = (round(edge * 150 / figure.dpi) for edge in axes.get_window_extent().extents)
        for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)):
            near = np.abs(pixels[bottom:top, left:right] - colour).sum(-1) < 30
            assert near.sum() > 100, colour

    @pytest.mark.parametrize("panels", [1, 2, 5])
    @NAMES
    def test_all_text_can_be_read(self, figures, tmp_path, panels, name):
        """Curves that only one panel has are in the legend, in the colour they have there."""
        names = ["measured, eager", "FLOPs bound", "roofline bound"]
        chart = {
            f"speed-up, {name}\nv = {number}, batch 16": {each: {"x": [0, 4], "y": [1, 2]} for each in names}
            for number in range(panels)
        }
        last = f"speed-up, {name}\nv = {panels - 1}, batch 16"
        chart[last] = {"measured, compiled": {"x": [0, 4], "y": [1, 2]}, **chart[last]}
        plots.plot_curves(chart, "frozen layers N", tmp_path / "curves.png")
        figure, all_axes = figures[0]
        check_figure(figure, all_axes)
        assert figure.bbox.width / figure.dpi <= 15
        legend = figure.legends[0]
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted([*names, "measured, compiled"])
        for axes in all_axes:
            for line in axes.lines:
                place = [text.get_text() for text in legend.get_texts()].index(line.get_label())
                assert legend.legend_handles[place].get_color() == line.get_color()
