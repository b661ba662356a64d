"""Which sizes a calibration measures on which kind of device: as many as a minute allows, or those that show that it works (quick)."""

from __future__ import annotations

from dataclasses import dataclass

BEFORE = 1e-3  # seconds of work before each collective
BEHIND = (3e-4, BEFORE, 3e-3, 1e-2, 3e-2)  # before those that say what it matters, which are these, with bytes received
BEHIND_TRIALS = tuple((operation, size) for operation in ("send_recv", "all_reduce") for size in (1 << 16, 1 << 20))
Gemm = tuple[int, int, int]  # m, n, k


@dataclass(frozen=True)
class Sizes:
    """`heads`: (query heads, kv heads, head size). `attentions`: (query rows, key rows, whether a causal square). `work` runs beside a transfer."""

    dtypes: tuple[str, ...]
    gemms: tuple[Gemm, ...]
    heads: tuple[tuple[int, int, int], ...]
    attentions: tuple[tuple[int, int, bool], ...]
    moved_bytes: tuple[int, ...]
    collective_bytes: tuple[int, ...]
    work: Gemm


def gemms_of(sides: tuple[int, ...]) -> tuple[Gemm, ...]:
    """Of each side a cube, many rows as activations have, and a product that widens and one that narrows."""
    return tuple(shape for s in sides for shape in ((s, s, s), (4 * s, s, s), (2 * s, 4 * s, s), (2 * s, s, 4 * s)))


def attentions_of(rows: tuple[int, ...]) -> tuple[tuple[int, int, bool], ...]:
    """Of each number of rows a causal square, a full one, and one with more keys."""
    return tuple(shape for n in rows for shape in ((n, n, True), (n, n, False), (n, 3 * n, False)))


def powers(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """first, first x factor, ... up to last."""
    found = [first]
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return tuple(found)


_CPU_HEADS = ((8, 2, 32), (4, 1, 128))
_GPU_HEADS = ((32, 8, 128), (32, 8, 64))
_GPU_DTYPES = ("bfloat16", "float16", "float32", "fp8")
SIZES = {
    ("cpu", False): Sizes(
        ("float32", "bfloat16"),
        gemms_of((32, 64, 128, 256, 512)),
        _CPU_HEADS,
        attentions_of((128, 256, 512, 1024)),
        powers(1 << 16, 1 << 26),
        powers(1 << 12, 1 << 26),
        (256, 256, 256),
    ),
    ("cpu", True): Sizes(
        ("float32",),
        gemms_of((32, 128)),
        _CPU_HEADS[:1],
        attentions_of((64, 256)),
        powers(1 << 16, 1 << 22, 8),
        powers(1 << 12, 1 << 22, 4),
        (256, 256, 256),
    ),
    ("cuda", False): Sizes(
        _GPU_DTYPES,
        gemms_of((128, 256, 512, 1024, 2048, 4096)),
        _GPU_HEADS,
        attentions_of((256, 1024, 4096, 16384)),
        powers(1 << 20, 1 << 30, 4),
        powers(1 << 12, 1 << 29),
        (4096, 4096, 4096),
    ),
    ("cuda", True): Sizes(
        _GPU_DTYPES[:1],
        gemms_of((256, 2048)),
        _GPU_HEADS[:1],
        attentions_of((256, 2048)),
        powers(1 << 20, 1 << 28, 8),
        powers(1 << 12, 1 << 26, 4),
        (4096, 4096, 4096),
    ),
}
