"""On a GPU, every family gives what it gives on the CPU, where the other tests compare it with the references."""

import copy

import pytest
import torch
from families import FAMILIES, build, greedy, inputs, kinds, shortv_of


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LAYERS = [0, "1.mlp", 3]
REDUCTIONS = [  # from layer 3 on, since Qwen3-VL adds features to visual tokens before it
    None,
    {"method": "fastv", "k": 3, "ratio": 0.5},
    {"method": "vtw", "k": 3},
    {"method": "random", "token_num": 2},
]
CASES = [(family, kind) for family in FAMILIES for kind in kinds(family)]
TOLERANCE = {"atol": 1e-3, "rtol": 1e-3}


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions, which cut pictures into patches, round to TF32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def answers(model, given):
    """Logits of the prompt where it is not padded, and those of six tokens decoded on a cache."""
    given = {name: value.to(model.device) for name, value in given.items()}
    with torch.no_grad():
        logits = model(**given).logits[given["attention_mask"].bool()]
    decoded = greedy(model, given, return_dict_in_generate=True, output_logits=True)
    return logits.cpu(), torch.stack(decoded.logits, dim=1).cpu()


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: (reduction or {}).get("method", "none"))
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_the_cpu_gives(family, kind, reduction):
    model, given = shortv_of(build(family), LAYERS, reduction), inputs(family, kind)
    expected = answers(model, given)
    for actual, wanted in zip(answers(copy.deepcopy(model).cuda(), given), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


@pytest.mark.parametrize("options", [{"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled(options):
    """The README's recipe, and CUDA graphs, which the second and third call record and replay."""
    model, given = shortv_of(build("llava"), LAYERS).cuda(), inputs("llava", "image")
    given = {name: value.cuda() for name, value in given.items()}
    with torch.no_grad():
        expected = model(**given).logits
        model.model.language_model.compile(**options)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(model(**given).logits, expected, **TOLERANCE)
