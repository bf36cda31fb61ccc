"""The demonstration in the browser, as a Space. SHORTV_MODEL, a variable of the Space, names another model."""

import os

from shortv_hf.web.command import demo


demo(
    os.environ.get("SHORTV_MODEL"),
    host="0.0.0.0",
    port=7860,
    dtype="float32" if "SHORTV_MODEL" not in os.environ else "auto",
)
