"""What the root offers, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import checkpointer


def test_import_loads_neither_torch_nor_a_framework() -> None:
    """A script that only reads policies or records pays for no framework."""
    code = "import checkpointer, json, sys; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    roots = {module.partition(".")[0] for module in json.loads(output)}
    assert set() == roots & {"torch", "numpy", "lightning", "pytorch_lightning", "transformers", "safetensors"}


def test_all_is_sorted_and_importable() -> None:
    """Every promised name is there, once, where one looks for it."""
    assert sorted(set(checkpointer.__all__)) == checkpointer.__all__
    assert [] == [name for name in checkpointer.__all__ if not hasattr(checkpointer, name)]


def test_all_names_every_public_value() -> None:
    """Nothing public slips into the root by way of an import."""
    modules = {name for name in dir(checkpointer) if type(getattr(checkpointer, name)) is type(sys)}
    public = {name for name in dir(checkpointer) if not name.startswith("_")} - modules
    assert set(checkpointer.__all__) == public


def test_names_are_imported_at_their_first_use() -> None:
    """The command line begins at once; modules of the package are attributes, as before."""
    code = (
        "import checkpointer, sys; assert 'checkpointer.manager' not in sys.modules; "
        "checkpointer.CheckpointManager; assert 'checkpointer.manager' in sys.modules; "
        "checkpointer.errors.SaveError; print(hasattr(checkpointer, 'nothing'))"
    )
    assert "False\n" == subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_version_is_the_distributions() -> None:
    """The version one asks the module for is the one that was installed."""
    assert metadata.version("torch-checkpointer") == checkpointer.__version__
