"""The deliberately simple reference for token reduction: one row, no cache, the stock Hugging Face model in eager.

Methods in the decoder drop nothing here: from layer k on, nobody may attend to the tokens that the method drops. Methods
before it are computed in plain loops from the attention matrices that the stock vision tower returns, and the language
model is then given the shorter sequence. ShortV layers throw the updates of visual tokens away, as in `helpers.py`.
"""

from contextlib import contextmanager

import torch
from helpers import discard_updates
from illava_reference import merges_in_decoder, merging, tower_states

from shortv_hf.upstream import family_of, image_features


@contextmanager
def hidden_tokens(stock, first_layer: int, dropped: torch.Tensor):
    """From `first_layer` on, the tokens at `dropped` `[S]` bool are masked as keys."""

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(dropped, torch.finfo(mask.dtype).min)}

    layers = stock.model.language_model.layers[first_layer:]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def text_logits(stock, inputs: dict, new: list[int], options: dict, layers: list[int]) -> torch.Tensor:
    """Logits `[text tokens, vocabulary]` of one row without padding: the prompt's text, then the `new` tokens that
    follow a prefill of the prompt alone."""
    options = dict(options)
    method = options.pop("method")
    ids = torch.cat([inputs["input_ids"], torch.tensor([new], dtype=torch.long)], dim=1)
    visual = ids == stock.config.image_token_id
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        if not images:
            return stock(input_ids=ids).logits[0]
        if method == "illava":
            return illava_logits(stock, ids, images, len(new), options, layers)
        if method in ("fastv", "vtw"):
            k, dropped = options["k"], visual[0].clone()
            if method == "fastv":
                dropped[fastv_kept(stock, inputs, layers, **options)] = False
            with discard_updates(stock, layers, visual), hidden_tokens(stock, k, dropped):
                return stock(input_ids=ids, **images).logits[0][~visual[0]]
        features, lengths = shorter_features(stock, images, method, options)
        embeds, mask = [], []
        for is_visual, embed in zip(visual[0], stock.get_input_embeddings()(ids)[0], strict=True):
            if not is_visual:
                embeds.append(embed[None])
                mask.append(torch.zeros(1, dtype=torch.bool))
            else:  # the first token of an image brings all its features, the others none
                if lengths[0][1] == 0:
                    embeds.append(features[0])
                    mask.append(torch.ones(len(features[0]), dtype=torch.bool))
                lengths[0][1] += 1
                if lengths[0][0] == lengths[0][1]:
                    features.pop(0), lengths.pop(0)
        embeds, mask = torch.cat(embeds)[None], torch.cat(mask)[None]
        with discard_updates(stock, layers, mask):
            return stock(inputs_embeds=embeds).logits[0][~mask[0]]


def illava_logits(stock, ids, images, n_new, options, layers):
    """As `text_logits`, of all `ids`, of which `n_new` come after the prompt."""
    options = {"vit_k": [], "llm_k": [], "llm_r": 1, **options}
    features, lengths = illava_features(stock, images, options)
    embeds, mask, windows, place = [], [], [], 0
    tokens = iter(zip(ids[0].tolist(), stock.get_input_embeddings()(ids)[0], strict=True))
    for token, embed in tokens:
        if token != stock.config.image_token_id:
            embeds.append(embed[None])
        else:
            embeds.append(features.pop(0))
            windows.append(list(range(place, place + len(embeds[-1]))))
            for _ in range(lengths.pop(0) - 1):
                next(tokens)
        mask += [token == stock.config.image_token_id] * len(embeds[-1])
        place += len(embeds[-1])
    embeds, mask = torch.cat(embeds)[None], torch.tensor(mask)[None]
    decoder, n = stock.model.language_model.layers, place - n_new

    def attentions():
        with discard_updates(stock, layers, mask[:, :n]):
            return stock(inputs_embeds=embeds[:, :n], output_attentions=True).attentions

    merges = merges_in_decoder(attentions, decoder, windows, options, n - 1)
    with discard_updates(stock, layers, mask), merging(decoder, merges):
        return stock(inputs_embeds=embeds).logits[0][~mask[0]]


def illava_features(stock, images, options):
    """Per image the projected features that the language model gets, and how many image tokens the prompt has for it."""
    model, pixels, sizes = stock.model, images["pixel_values"], images.get("image_sizes")
    given = [(pixels[i : i + 1], () if sizes is None else (sizes[i : i + 1],)) for i in range(len(pixels))]
    dense = [image_features(model.get_image_features(*(picture, *size)))[0] for picture, size in given]
    lengths = [len(each) for each in dense]
    if not options["vit_k"]:
        return dense, lengths
    tower, found = model.vision_tower, []
    tower = getattr(tower, "vision_model", tower)
    for picture, size in given:
        states = tower.pre_layrnorm(tower.embeddings(picture.flatten(0, -4)))
        if size:  # how many tiles the image has, of those that it is padded to
            states = states[: model_tiles(stock, size[0][0])]
        parts = [tower_states(clip_layers(stock)[:-1], each, options, others=1)[0][1:] for each in states]
        projected = model.multi_modal_projector(torch.stack(parts))
        if size:
            vision = stock.config.vision_config
            patch, vision.patch_size = vision.patch_size, vision.image_size // round(projected.shape[1] ** 0.5)
            packed, _ = model.pack_image_features([projected], size[0], "default", model.image_newline)
            vision.patch_size = patch
            found.append(packed[0])
        else:
            found.append(projected[0])
    return found, lengths


def model_tiles(stock, size):
    config = stock.config
    count = family_of(stock.model).image_size_to_num_patches
    return count(size, config.image_grid_pinpoints, config.vision_config.image_size)


def fastv_kept(stock, inputs, layers, k, ratio, start=0) -> list[int]:
    """Positions of the visual tokens that stay, of those from `start` on."""
    visual = inputs["input_ids"] == stock.config.image_token_id
    with discard_updates(stock, layers, visual):
        weights = stock(**inputs, output_attentions=True).attentions[k - 1]
    scores = weights[0, :, -1].mean(0)
    positions = [i for i in visual[0].nonzero()[:, 0].tolist() if i >= start]
    best = sorted(positions, key=lambda position: -float(scores[position]))
    return best[: round(len(positions) * (1 - ratio))]


def shorter_features(stock, images, method, options):
    """Per image the projected features that the language model gets, and [its image tokens in the prompt, 0]."""
    if "image_sizes" in images:
        return next_features(stock, images, method, options)
    tower = stock.model.vision_tower(images["pixel_values"], output_hidden_states=True, output_attentions=True)
    found, lengths = [], []
    for i, states in enumerate(tower.hidden_states[-2]):
        patches = states[1:]
        attentions = [layer[i] for layer in tower.attentions]
        if method in ("vtc_cls", "random"):
            scores = patch_scores(method, options, attentions, len(patches))
            new = patches[sorted(sorted(range(len(patches)), key=lambda j: -scores[j])[: options["token_num"]])]
        elif method == "downsample":
            side, factor = round(len(patches) ** 0.5), options["factor"]
            grid = patches.view(side, side, -1)
            blocks = [
                grid[y : y + factor, x : x + factor].mean((0, 1))
                for y in range(0, side, factor)
                for x in range(0, side, factor)
            ]
            new = torch.stack(blocks)
        else:
            layer = clip_attentions(stock)[-1]
            normed = clip_layers(stock)[-1].layer_norm1(tower.hidden_states[-2][i])
            new = prumerge(patches, layer.q_proj(normed), layer.k_proj(normed), method == "prumerge_plus")
        found.append(stock.model.multi_modal_projector(new))
        lengths.append([len(patches), 0])
    return found, lengths


def patch_scores(method, options, attentions, n, tile=0):
    if method == "random":
        generator = torch.Generator().manual_seed(options["seed"])
        return torch.rand(3, n, generator=generator)[tile].tolist()
    return sum(weights.mean(0)[0, 1:] for weights in attentions[options["layer"] : -1]).tolist()


def clip_layers(stock):
    tower = stock.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def clip_attentions(stock):
    return [layer.self_attn for layer in clip_layers(stock)]


def prumerge(patches, queries, keys, plus):
    n, width = patches.shape
    attention = (queries[0] @ keys.T * width**-0.5).softmax(-1)[1:].tolist()
    keys = keys[1:]
    ordered = sorted(attention)

    def quantile(q):
        place = q * (n - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low])

    bound = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    number = sum(a > bound for a in attention)
    number = int(n * (number / n))  # a rate, as released: 8 of 55 become 7
    kept = sorted(range(n), key=lambda i: -attention[i])[:number]
    if plus and number:
        kept += [i for i in range(0, n - 1, max(int(int(n / number) / 3), 1)) if i not in kept]
    tokens = []
    for i in kept:
        similar = {j: float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(n) if j != i}
        nearest = sorted(similar, key=lambda j: -similar[j])[:32]
        tokens.append(patches[i] + sum(attention[j] * patches[j] for j in nearest))
    if len(kept) < n:
        tokens.append(sum(attention[j] * patches[j] for j in range(n) if j not in kept))
    return torch.stack(tokens)


def next_features(stock, images, method, options):
    """LLaVA-NeXT, selecting methods: pack the projected features, each with its tile and patch written behind it."""
    model, config = stock.model, stock.config
    found, lengths = [], []
    for pixels, size in zip(images["pixel_values"], images["image_sizes"], strict=True):
        features = model.get_image_features(pixels[None], size[None])
        features = image_features(features)[0]
        tower = model.vision_tower(pixels, output_attentions=True)
        n, tiles = tower.last_hidden_state.shape[1] - 1, len(pixels)
        names = torch.arange(tiles * n).view(tiles, n, 1).double()
        packed, _ = model.pack_image_features([names], size[None], "default", torch.tensor([-1.0]))
        names = packed[0][:, 0].long().tolist()
        kept = {name for name in names if name < 0}
        for tile in range(tiles):
            attentions = [layer[tile] for layer in tower.attentions]
            scores = patch_scores(method, options, attentions, n, tile)
            there = [name - tile * n for name in names if name // n == tile and name >= 0]
            kept |= {tile * n + j for j in sorted(there, key=lambda j: -scores[j])[: options["token_num"]]}
        found.append(features[[name in kept for name in names]])
        lengths.append([len(names), 0])
    assert config.vision_feature_select_strategy == "default"
    return found, lengths
