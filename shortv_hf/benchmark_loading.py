"""Time to load a checkpoint: `from_pretrained` of the ShortV class against the stock one, from the same files."""

import tempfile
import time

from transformers.utils import logging


def time_loading(stock, shortv, repeats: int) -> dict:
    """Load the weights of `stock` by its class and by that of `shortv` in turn, from a temporary directory into CPU
    memory.

    Returns:
        Seconds by class, one per repetition: `{"stock": [...], "shortv": [...]}`. A first round, which brings the files
        into the system's cache, is left out.
    """
    times = {"stock": [], "shortv": []}
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        for round_ in logging.tqdm(range(repeats + 1), desc="loading"):
            for name, model in (("stock", stock), ("shortv", shortv)):
                options = {} if name == "stock" else {"shortv_layers": model.config.shortv_layers}
                start = time.perf_counter()
                type(model).from_pretrained(folder, dtype=model.dtype, **options)
                if round_:
                    times[name].append(time.perf_counter() - start)
    return times
