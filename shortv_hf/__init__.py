"""ShortV for Hugging Face: vision-language models that freeze visual tokens in ineffective decoder layers.

Importing the package registers the classes with the Auto classes, so that ShortV repos load without remote code: at once
where Transformers is imported already, else as soon as it is. Until then nothing heavy is imported; a command's `--help`
and a plug-in's entry point cost no torch.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_shortv import *  # noqa: F403
    from .hub.auto import AutoModelForVision2Seq as AutoModelForVision2Seq
    from .modeling_shortv import *  # noqa: F403


__version__ = "0.7.0"


def lazy_names(
    package: str, modules: dict[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package (PEP 562) whose names, `{module: names}`, are imported when they
    are asked for."""
    places = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return getattr_, lambda: sorted({*places, *vars(sys.modules[package])}), sorted(places)


def __getattr__(name: str) -> Any:
    # Which classes there are is known to `modeling_shortv` alone, so names are told by how they begin.
    if name == "AutoModelForVision2Seq":
        return import_module(".hub.auto", __name__).AutoModelForVision2Seq
    if name == "__all__" or name.startswith("ShortV") or name in ("apply_shortv", "illava_defaults"):
        modules = [import_module(f".{each}", __name__) for each in ("configuration_shortv", "modeling_shortv")]
        names = {public: getattr(module, public) for module in modules for public in module.__all__}
        if name == "__all__":
            return ["AutoModelForVision2Seq", *names]
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


class _RegisterLater(MetaPathFinder):
    """Registers the classes right after the first import of Transformers, or of a file of ours that needs it.

    That is the one moment at which nothing of either is half imported: a class of Transformers can be what asks for the
    Auto classes, and ours derive from it. Who only looks for a spec, as many libraries do, or fails to import changes
    nothing. The finder stays where it is, since other threads can be going through the list.
    """

    def __init__(self) -> None:
        self.done = False
        self.here = threading.local()  # `busy`: this thread looks for a spec, or executes a module, in here already

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.done or getattr(self.here, "busy", False) or not self._needs_transformers(name):
            return None
        with self._busy():
            spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                with self._busy():
                    execute(module)
                    import_module(".hub.auto", __name__)
                self.done = True

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this loader alone
        return spec

    @staticmethod
    def _needs_transformers(name: str) -> bool:
        package, _, module = name.rpartition(".")
        ours = package == __name__ and module != "cli" and Path(__file__).with_name(f"{module}.py").is_file()
        return name == "transformers" or ours

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.here.busy = True
        try:
            yield
        finally:
            self.here.busy = False


if "transformers" in sys.modules:
    import_module(".hub.auto", __name__)
else:
    sys.meta_path.insert(0, _RegisterLater())
