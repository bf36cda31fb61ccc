import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the real Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
