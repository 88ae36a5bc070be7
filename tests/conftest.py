"""Where the tests find real data, strict numerics for all of them, and how their programs are compiled."""

import gc
import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import pytest

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
if _SHARED.is_dir():
    os.environ.setdefault("FEDJAX_LAB_DATA", str(_SHARED))

MOST_BYTES = 2e9
QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# XLA's older emitters of CPU code take half the time to compile; jaxlib 0.12 is without them.
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a property test compiles, which no time limit for one example allows for.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly rather than well, and keep compiled programs between runs, workers and the tests' processes.

    Nearly all of the suite's time is compiling; JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs it as users' programs are. A
    second run of a test then takes about half the time. ``make clean`` or ``pytest --cache-clear`` forgets the
    programs. A folder of the user's own choice is left in place.
    """
    if QUICKLY not in os.environ:
        os.environ[QUICKLY] = "1"
        jax.config.update(QUICKLY.lower(), True)
        if _knows(OLDER_EMITTERS):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLDER_EMITTERS}".strip()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(config, "cache", None) is None:
        return
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax_programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def _knows(flag: str) -> bool:
    """Whether XLA has this flag: it ends a process that is started with another one."""
    asked = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(asked, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True, check=False).returncode


@pytest.fixture
def data_dir() -> str:
    """The folder with mnist/, shakespeare/ and insteval/; the test is skipped where there is none."""
    folder = os.environ.get("FEDJAX_LAB_DATA")
    if not folder:
        pytest.skip("needs the real data sets: set FEDJAX_LAB_DATA to their folder")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget a module's programs where a worker has gathered gigabytes of them."""
    yield
    status = pathlib.Path("/proc/self/statm")
    if status.exists() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimized():
    """Programs as users have them: compiled quickly, two of the same arithmetic may round differently."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
