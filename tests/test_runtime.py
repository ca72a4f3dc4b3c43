"""What a command sets up before it computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Prints OpenMP's variables when PyTorch is about to be imported, which is when OpenMP reads them.
WATCH = """
import json, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps(dict(os.environ)))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
from lsgm.cli import main
main(["describe", "mnist_demo"])
"""


def at_import(**variables: str) -> dict[str, str]:
    """OpenMP's variables at the import of PyTorch in a command that a user starts with ``variables``."""
    others = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "KMP_", "OMP_"))}
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, env={**others, **variables}, check=True, capture_output=True, text=True)
    return {key: value for key, value in json.loads(done.stdout).items() if key.startswith(("GOMP_", "KMP_", "OMP_"))}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
        ({"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "1"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY"}),
    ],
)
def test_a_command_limits_spinning_before_pytorch_is_imported(given: dict[str, str], kept: set[str]) -> None:
    found = at_import(**given)
    assert set(found) == kept
    assert given.items() <= found.items()
