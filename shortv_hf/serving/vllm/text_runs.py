"""Text tokens as sequences of their own: what paged attention has to be told for queries of text tokens alone.

vLLM schedules n tokens in a step, of several requests one behind the other: a prompt or a chunk of one, or a decoding
request's one token. A *run* is a maximal block of text tokens of one request. A run's queries attend to all that its
request has in the cache up to them, visual tokens included, so each run is a sequence of its own: it has the request's
block table, and ends where the run ends. K and V of all n tokens are written before, by the dense slot mapping.

Shapes: n scheduled tokens, R requests, T text tokens, S runs, B blocks of a block table. No import of vLLM.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


KEPT = ("max_seq_len", "slot_mapping", "causal")  # the same for any queries of the step, or an upper bound of it


@dataclass(frozen=True)
class TextRuns:
    """The runs of a step.

    Attributes:
        rows: `[T]`, the text tokens among the scheduled ones, ascending.
        bounds: `[S + 1]`, where runs begin and end in `rows`.
        requests: `[S]`, the request of each run.
        behind: `[S]`, how many scheduled tokens of the request come after the run.
    """

    rows: np.ndarray
    bounds: np.ndarray
    requests: np.ndarray
    behind: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, starts: np.ndarray) -> "TextRuns":
        """The runs of the tokens at `rows`, one at least.

        Args:
            rows: `[T]`, ascending.
            starts: `[R + 1]`, where each request's scheduled tokens begin; n is the last.
        """
        requests = np.searchsorted(starts, rows, side="right") - 1
        begins = (np.diff(rows, prepend=-2) != 1) | (np.diff(requests, prepend=-1) != 0)
        first = np.flatnonzero(begins)
        bounds = np.append(first, len(rows))
        last = bounds[1:] - 1
        requests = requests[first]
        return cls(rows, bounds, requests, starts[requests + 1] - 1 - rows[last])

    def __len__(self) -> int:
        return len(self.requests)

    def queries(self, common: Any) -> Any:
        """vLLM's `CommonAttentionMetadata` of the step for these queries alone: each run is a sequence.

        Raises:
            ValueError: it holds something that this function does not know, of which there may be one per request.
        """
        device = common.seq_lens.device
        bounds = torch.from_numpy(self.bounds.astype(np.int32))
        requests, behind = torch.from_numpy(self.requests), torch.from_numpy(self.behind.astype(np.int32))
        there, behind_there = (each.to(device, non_blocking=True) for each in (requests, behind))
        longest, prefilling, table_rows = common.seq_lens_cpu_upper_bound, common.is_prefilling, common.req_idx
        replaced = {
            "query_start_loc": bounds.to(device, non_blocking=True),
            "query_start_loc_cpu": bounds,
            "seq_lens": common.seq_lens[there] - behind_there,
            "seq_lens_cpu_upper_bound": None if longest is None else longest[requests] - behind,
            "num_reqs": len(self),
            "num_actual_tokens": len(self.rows),
            "max_query_len": int(np.diff(self.bounds).max()),
            "block_table_tensor": common.block_table_tensor[there],
            "is_prefilling": None if prefilling is None else prefilling[requests],
            "req_idx": None if table_rows is None else table_rows[self.requests],
            "positions": None,
            "_num_computed_tokens_cache": None,
            "_token_to_req_indices_cache": None,
        }
        rest = {
            each.name: getattr(common, each.name) for each in fields(common) if each.name not in {*replaced, *KEPT}
        }
        if unknown := sorted(name for name, value in rest.items() if value is not None):
            raise ValueError(f"ShortV does not know what vLLM means by {', '.join(unknown)} in its attention metadata")
        return common.replace(**replaced)


def text_rows(is_visual: np.ndarray) -> tuple[np.ndarray, bool]:
    """The rows `[T]` to compute among n scheduled tokens, and whether what comes of them counts.

    A chunk of visual tokens only has no text token, and attention no query. One of them stands in, the last, and what is
    computed of it is thrown away.

    Args:
        is_visual: `[n]` bool.
    """
    rows = np.flatnonzero(~is_visual)
    if rows.size:
        return rows, True
    return np.array([is_visual.size - 1]), False
