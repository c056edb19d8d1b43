"""Compiles the kernel when the package is built or installed; without a compiler the package goes without it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelBuildHook(BuildHookInterface):
    """Puts libviews.so into the wheel, which then is one for this platform; any Python can use it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # By path: to import the package would take numpy and Pillow, which are not there while it is built.
        compiler = runpy.run_path(str(Path(self.root, "pipelines", "native", "build.py")))
        try:
            compiler["build"]()
        except compiler["BuildError"] as error:
            self.app.display_warning(f"without the native backend's kernel: {error}")
            return
        build_data["artifacts"].append(str(compiler["LIBRARY"].relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
