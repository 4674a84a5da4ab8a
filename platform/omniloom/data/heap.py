"""Memory that has been freed goes back to the system."""

import ctypes


def trim_heap() -> None:
    """Have the allocator, Ray's jemalloc or the C library's own, give back what it holds and nobody uses."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallctl"):  # jemalloc
        allocator.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))  # of all arenas
    elif hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)
