"""Work shared out to several processes, as `accelerate launch` and `torch.distributed.run` start them.

Only after [`join`], which commands call: whoever calls the package's functions under such a launcher has shares of their own.
"""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch


T = TypeVar("T")

_joined = False


def join():
    """From here on this process is one of those that its environment tells of."""
    global _joined
    _joined = True


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if _joined else 0


def size() -> int:
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", 1)) if _joined else 1


def share(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """This process's part of the items, with their numbers among all."""
    return ((number, item) for number, item in enumerate(items) if number % size() == rank())


def gather(own: list[T]) -> list[T]:
    """What all processes have, in each of them; to be called by all."""
    if size() == 1:
        return own
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # joins the processes, if nothing has yet
    return gather_object(own)


def own_device(device: str) -> str:
    """The device of this process, where `device` leaves it open: each of several has a GPU of its own."""
    if size() == 1 or device != "auto":
        return device
    return (
        f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        if torch.cuda.is_available()
        else "cpu"
    )
