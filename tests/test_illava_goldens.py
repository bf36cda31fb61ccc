"""The released code of iLLaVA on tiny models of LLaVA-OneVision and Qwen2-VL, without its faults (`fp32_causal` and `attn`)
and with the log-sum-exp that it takes for attention in Qwen2-VL (`fp32`).

The clone carries a few cases, of LLaVA-OneVision the vision tower alone. With `SHORTV_REDUCTION_GOLDENS=FOLDER`, which holds `illava`, every case runs.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shortv_hf import ShortVLlavaOnevisionForConditionalGeneration, ShortVQwen2VLForConditionalGeneration
from shortv_hf.stream import Stream
from shortv_hf.tower import TowerMerging, merger_of, tower_layers
from shortv_hf.upstream import ON_4, find_cache


FULL = os.environ.get("SHORTV_REDUCTION_GOLDENS")
FOLDER = Path(FULL) / "illava" if FULL else Path(__file__).parent / "goldens" / "illava"
CLASSES = {"ov": ShortVLlavaOnevisionForConditionalGeneration, "q2vl": ShortVQwen2VLForConditionalGeneration}
# The released code works on one window at a fixed place, drops text between vision blocks, and shows the language model
# the first frame of a video only. What its towers do is right in these cases too.
FAULTS_IN_DECODER = {
    "ov": {"start_mismatch", "multi_4d", "multi_list", "multi_anyres", "both_video_pool1"},
    "q2vl": {"both_two_images", "llm_two_images", "llm_two_images_multi_k", "vit_video", "both_video"},
}
if not FULL:
    FAULTS_IN_DECODER["ov"] |= set(json.loads((FOLDER / "ov" / "manifest.json").read_text())["cases"])
if not ON_4:  # 5.x has other positions after a video of more frames than rows
    FAULTS_IN_DECODER["q2vl"].add("dense_video_long")
VARIANTS = {"ov": {"fp32_causal": "attention"}, "q2vl": {"attn": "attention", "fp32": "lse"}}
KEYS_OF_4 = {
    r"^vision_tower.(?!vision_model)": "model.vision_tower.vision_model.",
    r"^model.vision_tower.(?!vision_model)": "model.vision_tower.vision_model.",
    r"^language_model.lm_head": "lm_head",
    r"^language_model.model": "model.language_model",
    r"^multi_modal_projector": "model.multi_modal_projector",
    r"^image_newline": "model.image_newline",
}


def close(actual, expected):
    torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-4, rtol=0)


def manifest(family):
    return json.loads((FOLDER / family / "manifest.json").read_text())["cases"]


def cases():
    for family, variants in VARIANTS.items():
        for name in manifest(family):
            for variant in variants:
                yield pytest.param(family, name, variant, id=f"{family}-{name}-{variant}")


@pytest.fixture(scope="module")
def models():
    """The tiny models, which a 5.x wrote."""
    found = {}
    for family, model_class in CLASSES.items():
        raw = json.loads((FOLDER / family / "model" / "config.json").read_text())
        kwargs = {}
        if ON_4:
            rope = raw["text_config"].pop("rope_parameters")
            raw["text_config"]["rope_theta"] = rope["rope_theta"]
            if "mrope_section" in rope:
                sections = {"mrope_section": rope["mrope_section"]}
                raw["text_config"]["rope_scaling"] = {"type": "mrope", "rope_type": "default", **sections}
            if family == "ov":
                kwargs["key_mapping"] = KEYS_OF_4
        raw["model_type"] = model_class.config_class.model_type
        config = model_class.config_class.from_dict(raw)
        model, loading = model_class.from_pretrained(
            FOLDER / family / "model", config=config, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        missing = loading.pop("missing_keys")
        assert not any(loading.values()) and all("language_model" in key or "lm_head" in key for key in missing)
        assert family == "ov" or not missing
        found[family] = model.eval()
    return found


def onevision_inputs(case, tensors):
    inputs = {"input_ids": tensors["input_ids"].long()}
    if "pixel_low" in tensors:
        pixels = (tensors["pixel_low"].float() / 32).repeat_interleave(7, 2).repeat_interleave(7, 3)
        pixels = torch.nn.functional.pad(pixels, (0, 6, 0, 6))
        if case["kind"] == "video":
            inputs["pixel_values_videos"] = pixels[None]
        else:
            counts = case["patches_per_image"]
            tiles = pixels.split(counts)
            most = max(counts)
            inputs["pixel_values"] = torch.stack(
                [torch.nn.functional.pad(each, (0, 0, 0, 0, 0, 0, 0, most - len(each))) for each in tiles]
            )
            inputs["image_sizes"] = tensors["image_sizes"].long()
            if "hf_batch_num_images" in case:
                inputs["batch_num_images"] = torch.tensor(case["hf_batch_num_images"])
    return inputs


def qwen_inputs(case, tensors):
    pixels = (tensors["pixel_low"].float() / 32).view(-1, 3, 2, 2, 2).repeat_interleave(7, 3).repeat_interleave(7, 4)
    inputs = {"input_ids": tensors["input_ids"].long()}
    suffix = "_videos" if case["kind"] == "video" else ""
    inputs[f"pixel_values{suffix}"] = pixels.reshape(len(pixels), -1)
    inputs[f"{case['kind']}_grid_thw"] = tensors["grid_thw"].long()
    if not ON_4:
        inputs["mm_token_type_ids"] = tensors["mm_token_type_ids"].long()
    return inputs


@torch.no_grad()
def generate(model, inputs, steps=8):
    """The logits of greedy steps, the tokens, and the cache."""
    output = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return torch.cat(output.logits), new, find_cache(output)


@torch.no_grad()
def encode(model, kind, inputs):
    """The vision tower alone."""
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
    if kind == "video":
        pixels = given.pop("pixel_values_videos")  # the argument has several names, and 4.x no defaults
        if "video_grid_thw" not in given:
            given |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        model.model.get_video_features(pixels, **given)
    else:
        model.model.get_image_features(**given)


def options_of(case, score):
    given = case["illava_config"]
    return {
        "method": "illava",
        "vit_k": given["illava_vit_k"] if given["enable_illava_vit"] else [],
        "vit_r": given["illava_vit_r"] or 1,
        "llm_k": given["illava_llm_k"] if given["enable_illava_llm"] else [],
        "llm_r": given["illava_llm_r"] or 1,
        "score": score,
    }


@pytest.mark.parametrize(("family", "name", "variant"), list(cases()))
def test_released_code(models, monkeypatch, family, name, variant):
    case, tensors = manifest(family)[name], load_file(FOLDER / family / "cases" / f"{name}.safetensors")
    if f"{variant}/logits" not in tensors:
        pytest.skip("not run in this variant")
    model = models[family]
    make_inputs = onevision_inputs if family == "ov" else qwen_inputs
    inputs = make_inputs(case, tensors)
    if "hf_vision_aspect_ratio" in case:  # as an argument, not every version hands it on
        monkeypatch.setattr(model.config, "vision_aspect_ratio", case["hf_vision_aspect_ratio"])
    streams, towers, init = [], [], Stream.__init__

    def keep_stream(self, *args):
        init(self, *args)
        streams.append(self)

    monkeypatch.setattr(Stream, "__init__", keep_stream)
    enter = TowerMerging.__enter__
    monkeypatch.setattr(TowerMerging, "__enter__", lambda self: (towers.append(self), enter(self))[1])
    prefixes = ("fp32/", "fp32_causal/") if family == "ov" else (f"{variant}/",)  # towers of the first two are alike
    expected = {k.split("/")[1]: value for prefix in prefixes for k, value in tensors.items() if k.startswith(prefix)}
    with model.using(visual_reduction=options_of(case, VARIANTS[family][variant])), noted_states(model) as states:
        if name in FAULTS_IN_DECODER[family]:
            encode(model, case["kind"], inputs)
        else:
            logits, new, cache = generate(model, inputs)
            close(logits, expected["logits"])
            assert new.tolist() == expected["gen_ids"].tolist()
            lengths = [layer.keys.shape[2] for layer in cache.layers]
            assert lengths == case["cache_len_per_layer_after_8_tokens"]
    assert bool(towers) == bool(
        case["illava_config"]["enable_illava_vit"] and "input_ids" in inputs and len(inputs) > 1
    )
    if towers:
        check_tower(towers[0], expected, family)
        kept = "vit_features" if family == "ov" else "vit_hidden"
        if kept in expected:
            found = states["tower"]
            close(found[0] if isinstance(found, tuple) else found, expected[kept])
        if family == "q2vl":
            close(states["merger"], expected["image_embeds"])
    if any(key.startswith("llm_keep") for key in expected) and name not in FAULTS_IN_DECODER[family]:
        check_decoder(streams[0], expected, states)


def check_tower(tower, expected, family):
    """`tower` merged what the released code did."""
    starts = torch.tensor([0, *tower.dense_lengths]).cumsum(0) if family == "q2vl" else [0] * len(tower.left)
    kept = [patches + start for patches, start in zip(tower.left, starts, strict=False)]
    assert torch.cat(kept).tolist() == expected["vit_kept"].flatten().tolist()
    layers = sorted({merge.layer for merge in tower.merges})
    for merge in tower.merges:
        for i, picture in enumerate(merge.pictures):
            if family == "ov":
                order = expected["vit_merge_idx"][layers.index(merge.layer), picture]
            else:
                order = expected[f"vit_merge_idx.{layers.index(merge.layer)}.{picture}"]
            assert merge.scores[i].argsort(stable=True)[: len(order)].tolist() == order.tolist()
            assert set((merge.map.target[i] == order[-1]).nonzero()[:, 0].tolist()) == set(order.tolist())


@contextmanager
def noted_states(model):
    """What the last layer of the tower and its merger return first, and by decoder layer what it gets first."""
    found = {}

    def note(name, of):
        def hook(module, args, output):
            found.setdefault(name, args[0] if of == "input" else output)

        return hook

    merger = merger_of(model)
    watched = [("tower", tower_layers(model)[-1], "output")] + ([("merger", merger, "output")] if merger else [])
    watched += [(i, layer.input_layernorm, "input") for i, layer in enumerate(model.model.language_model.layers)]
    handles = [module.register_forward_hook(note(name, of), prepend=name == "merger") for name, module, of in watched]
    yield found
    for handle in handles:
        handle.remove()


def check_decoder(stream, expected, states):
    """`stream` merged what the released code did. Of two tokens whose scores differ by 6.5e-10 the order is not compared,
    only that the same ones stay."""
    for stage in (stage for stage in stream.stages if stage.map is not None):
        k, kept, target = stage.layer, stage.chosen.index[0], stage.map.target[0]
        moved = (target != torch.arange(len(target))).nonzero()[:, 0]
        if "llm_keep" in expected:
            assert stream.position_ids[0, stage.kept.index[0]].tolist() == expected["llm_keep"].tolist()
            assert target[moved].unique().tolist() == expected["llm_dst"].tolist()
            close(merged_token(stage, states, target[moved][0]), expected["llm_merged_token"])
        else:
            assert kept.tolist() == expected[f"llm_keep.{k}"].tolist()
            assert stream.position_ids[-3:, 0, stage.kept.index[0]].tolist() == expected[f"llm_pos.{k}"].tolist()
            ranks = [value for key, value in sorted(expected.items()) if key.startswith(f"llm_rank.{k}.")]
            groups = groups_before(stream, stage)
            for number, rank in enumerate(ranks, 1):
                window = (groups == number).nonzero()[:, 0]
                into = target[moved[groups[moved] == number]][0]
                close(merged_token(stage, states, into), expected[f"llm_merged.{k}.{number - 1}"])
                scores = stream.scores[k][0, window]
                assert scores.argsort(descending=True, stable=True).tolist() == rank.tolist()


def merged_token(stage, states, into):
    """What layer k gets at the place that was `into` before."""
    return states[stage.layer][0, stage.chosen.index[0].tolist().index(int(into))]


def groups_before(stream, stage):
    before = stream.rows(stage.layer - 1)
    return stream.groups[0] if before is None else stream.groups[0, before.index[0]]
