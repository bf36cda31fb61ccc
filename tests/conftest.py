import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the real Hub
sys.path.insert(0, str(Path(__file__).parent))  # for the helpers, wherever a test stands
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, also in the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
