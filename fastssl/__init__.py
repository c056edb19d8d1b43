"""fastssl: self-supervised training of image encoders at the speed of the hardware."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"


def _bind_own_rooms() -> None:
    """Make `pipelines` and `shard_tools` mean the packages beside this one.

    Both are common names: `python -m` puts the working directory first on the path, where a folder of that name would
    be imported in place of ours. Raises ImportError if a foreign one is loaded already, or ours is missing.
    """
    home = Path(__file__).resolve().parent.parent
    for room in ("shard_tools", "pipelines"):
        own = home / room / "__init__.py"
        loaded = sys.modules.get(room)
        if loaded is not None:
            found = Path(getattr(loaded, "__file__", None) or "an unnamed place")
            if found.resolve() != own:
                raise ImportError(
                    f"package {room!r} was already imported from {found.parent}, but fastssl needs {own.parent}; "
                    f"import fastssl first, or rename the other package"
                )
            continue
        if not own.is_file():
            raise ImportError(
                f"fastssl needs its own package {room!r} in {own.parent}, which is missing; reinstall fastssl-train"
            )
        spec = spec_from_file_location(room, own, submodule_search_locations=[str(own.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[room] = module
        spec.loader.exec_module(module)


_bind_own_rooms()
