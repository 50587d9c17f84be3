"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real conversations: $RDFKERN_TEST_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RDFKERN_TEST_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real conversations at {folder}; set RDFKERN_TEST_DATA to their folder")
    return folder
