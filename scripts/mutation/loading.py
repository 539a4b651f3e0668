"""Loads one module from the source of a mutant; every Python process of a test imports this."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import CodeType

ENVIRONMENT = ("ORCHARD_MUTANT_MODULE", "ORCHARD_MUTANT_FILE", "ORCHARD_MUTANT_SOURCE")
"""Names the module, the file that it has without the mutant, and the mutant's source."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles another source under the file name of the original, past its compiled copy."""

    def __init__(self, module: str, file: str, source: Path) -> None:
        super().__init__(module, file)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        code = self.source_to_code(self.source.read_bytes(), self.path)
        assert isinstance(code, CodeType)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, file: str, source: str) -> None:
        self.module, self.loader = module, _Loader(module, file, Path(source))

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.loader.path, loader=self.loader
        )


def load_mutant() -> None:
    """Load what the environment names, if it names something."""
    if ENVIRONMENT[0] in os.environ:
        sys.meta_path.insert(0, _Finder(*(os.environ[name] for name in ENVIRONMENT)))
