"""Full garbage collections, put off while programs are traced and compiled.

Tracing makes many objects, which calls for a collection of all generations now and then. One looks at everything that
the imported modules hold: .08 s, where a round of W2 is traced in .3. The younger generations are collected as always.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside, _before = 0, gc.get_threshold()  # how many threads are inside, and what held before the first of them
NEVER = 1 << 30


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """No full collection in here, unless one is asked for; as it was afterwards. Also a decorator."""
    global _inside, _before
    with _lock:
        _inside += 1
        if _inside == 1:
            _before = gc.get_threshold()
            gc.set_threshold(*_before[:2], NEVER)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
