"""Where the tests find real data, and strict numerics for all of them."""

import os
import pathlib

import jax
import pytest

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
if _SHARED.is_dir():
    os.environ.setdefault("FEDJAX_LAB_DATA", str(_SHARED))

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def data_dir() -> str:
    """The folder with mnist/, shakespeare/ and insteval/; the test is skipped where there is none."""
    folder = os.environ.get("FEDJAX_LAB_DATA")
    if not folder:
        pytest.skip("needs the real data sets: set FEDJAX_LAB_DATA to their folder")
    return folder
