"""The pictures of the authors' code, as masks: which patches are left after each layer. The clone carries those of one image;
with `SHORTV_REDUCTION_GOLDENS=FOLDER`, which holds `illava`, all of which there are inputs are compared."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


FULL = os.environ.get("SHORTV_REDUCTION_GOLDENS")
FOLDER = (Path(FULL) / "illava" if FULL else Path(__file__).parent.parent / "goldens" / "illava") / "ov"
if not (FOLDER / "manifest.json").exists() or not (FOLDER / "model").exists():
    pytest.skip("the released code's model is not there", allow_module_level=True)

from test_illava_goldens import manifest, models, onevision_inputs, options_of  # noqa: E402

from shortv_hf.pictures.merging import follow_merging, token_patches  # noqa: E402
from shortv_hf.tower import TowerMerging  # noqa: E402
from shortv_hf.vision import Watch  # noqa: E402


assert models  # a fixture
MASKS = load_file(FOLDER / "vis_masks.safetensors")
IMAGE, N_TOKENS = 390, 27 * 27 + 27 * 28  # an overview and a tile, each row of which ends in a newline
VIS_1X1 = {"method": "illava", "vit_k": [2, 3, 4, 5, 6, 7, 8], "vit_r": 80, "llm_k": [8], "llm_r": 0.5}


def of_this_clone(model, options):
    """Those options for the model, of which the clone carries the tower only."""
    return options if max(options["llm_k"]) < model.config.text_config.num_hidden_layers else {**options, "llm_k": []}


def compare_tower(name, layout, steps):
    steps = [step for step in steps if step.title.startswith("vision")]
    expected = {key: mask for key, mask in MASKS.items() if key.startswith(f"{name}/attention_map_vit")}
    assert len(expected) == len(steps) > 0
    for step in steps:
        left = step.title.split()[3]
        assert torch.equal(layout.split(step.kept), expected[f"{name}/attention_map_vit_token_{left}"].bool())


def inputs_of_vis_1x1():
    ids = MASKS["vis_1x1/input_ids_official"][0].tolist()
    at = ids.index(-200)
    tensors = {
        "input_ids": torch.tensor([ids[:at] + [IMAGE] * N_TOKENS + ids[at + 1 :]]),
        "pixel_low": MASKS["vis_1x1/pixel_low"],
        "image_sizes": torch.tensor([[384, 384]]),
    }
    return onevision_inputs({"kind": "image", "patches_per_image": [2]}, tensors)


def passes_of(model, inputs, options):
    with torch.no_grad(), model.using(visual_reduction=options), Watch() as watch:
        model(**inputs)
    return next(each for each in watch.seen if isinstance(each, TowerMerging))


def test_one_tile(models):  # noqa: F811
    """The decoder's masks are compared by the released ranks: there, the layer that ranks is not causal. The second is drawn
    wrong there, as if half of the tokens were of each picture, and none a newline."""
    model, inputs = models["ov"], inputs_of_vis_1x1()
    options = of_this_clone(model, VIS_1X1)
    layout, _, steps = follow_merging(model, inputs, options)
    compare_tower("vis_1x1", layout, steps)
    tower = passes_of(model, inputs, options)
    tokens = token_patches(model, inputs, layout, tower)
    rank = MASKS["vis_1x1/llm_rank"].tolist()
    assert len(tokens) == len(rank) == 13 * 13 + 13 * 14
    kept = rank[: len(rank) - round(len(rank) / 2)]
    found = torch.zeros(2, layout.n, dtype=torch.bool)
    found[0, [tokens[i][0] for i in kept if i < 169]] = True
    found[1, tower.left[1][[i - 351 // 2 for i in kept if 0 <= i - 351 // 2 < 169]]] = True
    assert torch.equal(found.view(2, 27, 27), MASKS["vis_1x1/attention_map_llm_layer_8"].bool())
    assert [tokens[169 + 14 * row + 13] for row in range(13)] == [[]] * 13
    assert sum(tokens, []) == [patch + 729 * i for i in range(2) for patch in tower.left[i].tolist()]


@pytest.mark.parametrize("name", ["both_vis_single", "both_video_pool1", "both_video"])
def test_released_pictures(models, monkeypatch, name):  # noqa: F811
    file = FOLDER / "cases" / f"{name}.safetensors"
    if not file.exists() or not any(key.startswith(name) for key in MASKS):
        pytest.skip("not in this clone")
    case, tensors, model = manifest("ov")[name], load_file(file), models["ov"]
    inputs, options = onevision_inputs(case, tensors), of_this_clone(model, options_of(case, "attention"))
    if name == "both_video_pool1":  # frames are not pooled there, for which there is no option here
        monkeypatch.setattr(type(model.model), "apply_pooling", lambda self, features: features)
    layout, _, steps = follow_merging(model, inputs, options)
    compare_tower(name, layout, steps)
    expected = MASKS.get(f"{name}/attention_map_llm_layer_{options['llm_k'][0]}")
    if expected is not None:
        assert torch.equal(layout.split(steps[-1].kept), expected.bool())
