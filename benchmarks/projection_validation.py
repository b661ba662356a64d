"""How far projections are from measurements: those that others published, or those of this machine.

    python benchmarks/projection_validation.py
    python benchmarks/projection_validation.py --measure --turns 5 --keep FOLDER

The first projects every row of cpbench/projection/studies with the machine of its study put into the nearest profile, and fits nothing to a row
that it predicts. The second needs a quiet machine for about twenty minutes: two ranks are calibrated, cells are swept over gloo and projected with
compute measured by each rank alone, all in turn and several times, because a machine that others share too has slow minutes. Turns that are kept in a
folder are added to. Printed is every row with its parts, the mean and worst error of the turn in the middle, and how far a measurement is from the
same one in another turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from cpbench.projection.pricing import PricedClock
from cpbench.projection.profile import load_profile
from cpbench.projection.published import Study, load_study, study_names
from cpbench.projection.simulated import META, without_storage
from cpbench.projection.studied import Studied, studied
from cpbench.reading import read
from cpbench.results import CellResult
from cpbench.stats import median

SMALL, WAITING = 0.020, 1 / 3  # seconds, and part of the time that is waited: shorter cells, and those bound by communication, are judged apart
COUNTED = 0.01  # by what part peaks may differ
TURNS = 5
SWEEPS = (
    ("--model", "qwen3-tiny", "--layouts", "cp2,tp2,tp2sp", "--strategy", "ring,allgather,ulysses", "--seq", "4k,2k,1k,256,64"),
    ("--model", "deepseek-v3-tiny", "--layouts", "cp2,tp2", "--strategy", "ring", "--seq", "1k"),
    ("--model", "qwen3-moe-tiny", "--layouts", "cp2/ep2,tp2/ep2", "--strategy", "allgather", "--router", "uniform", "--seq", "1k"),
)
SAME = ("--layers", "4", "--quiet")
RESTS_ON = {
    "meta-context-parallel": "kernel rates of H100 x 800/989, two-line NVLink, 35 GB/s of 50 between hosts; eager kernels of cpbench's own program",
    "ring-flash-attention": "the rate of one GPU alone, from the same table; merges and order of cpbench's own ring",
    "sglang-tp-sp": "assumed constants of a 910B; cpbench's own order of kernels",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="hold projections against this machine instead of against what was published")
    parser.add_argument("--quick", action="store_true", help="with --measure: a few sizes and cells, to see that it works")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"with --measure: how many to add ({TURNS})")
    parser.add_argument("--keep", type=Path, help="with --measure: a folder for the files of all turns")
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            take_turns(folder, 1 if options.quick else options.turns, options.quick)
            hold_against_each_other(folder)
    else:
        against_published()


def against_published() -> None:
    """Every row of every study."""
    errors = []
    for name in study_names():
        study = load_study(name)
        print(f"\n{study.title}\n  {study.source}\n  rests on: {RESTS_ON[name]}")
        for row in study.rows:
            found = studied(study, row)
            print(f"  {row.layout:13} {row.strategy:9} {row.partition:10} {row.tokens:9,} {row.machine:7} {_beside(found)}", flush=True)
            if found.error is not None and not row.is_rate:
                errors.append(found.error)
        if any(row.is_rate for row in study.rows):
            _show_merges(study)
        print("  unknown: " + "; ".join(study.unknown))
    print(f"\n{_summary('published times', errors)}")


def _beside(found: Studied) -> str:
    """A row as it was published and as it is projected; of a change, in percentage points or bytes."""
    row = found.row
    if row.unit == "GB":
        return f"published {row.value:+8.1f} GB  projected {found.value / 1e9:+8.2f} GB  {row.model}"
    if row.change is not None:
        points = 100 * (found.value - row.change)
        return f"published {row.change:+8.1%}  projected {found.value:+8.1%} of {found.baseline_s:.2f} s  {points:+5.1f} points  {row.model}"
    assert row.seconds is not None and found.error is not None
    parts = f"work {1e3 * found.slowest.work_s:9.2f}, waits {1e3 * found.slowest.exposed_s:8.2f} ms"
    return f"published {1e3 * row.seconds:9.2f} ms  projected {1e3 * found.seconds:9.2f} ms  {found.error:+6.1%}{' rate' if row.is_rate else '     '}  {parts}"


def _show_merges(study: Study) -> None:
    """What a ring's merges take operator by operator as cpbench has them, and as ring_flash_attn/utils.py (0.1.8) does."""
    for machine in study.machines.values():
        seconds = []
        for is_ours in (True, False):
            clock = PricedClock(load_profile(machine.device))
            with without_storage("cuda"), clock:
                out, new = (torch.empty(8192, 32, 128, dtype=dtype, device=META) for dtype in (torch.float32, torch.bfloat16))
                part = torch.empty(8192, 32, 1, device=META)
                out.lerp_(new.to(out.dtype), part) if is_ours else out - part * (out - new.to(out.dtype))
            seconds.append(clock.seconds)
        ours, theirs = (7e3 * taken for taken in seconds)
        print(f"  seven merges, {machine.title}: {ours:.2f} ms in the projected program, {theirs:.2f} ms by the library's operators unless fused")


def take_turns(folder: Path, turns: int, quick: bool) -> None:
    """Calibrate, sweep and project, so often in turn; behind the turns that a folder has."""
    first = len(list(folder.glob("profile*.json")))
    for turn in range(first, first + turns):
        profile = folder / f"profile{turn}.json"
        _cpbench("calibrate", "--max-ranks", "2", "--device", "cpu", "--output", str(profile), "--quiet", *(["--quick"] if quick else []))
        for number, sweep in enumerate(SWEEPS[-2:] if quick else SWEEPS):
            measured, projected = (str(folder / f"{kind}{turn}-{number}.json") for kind in ("measured", "projected"))
            _cpbench("sweep", *sweep, *SAME, "--set", "timing.max_seconds=2", "--output", measured)
            _cpbench("project", *sweep, *SAME, "--hardware", str(profile), "--compute", "measured", "--output", projected)


def hold_against_each_other(folder: Path) -> None:
    """Of every cell the turns in which it was measured and projected."""
    turns: dict[str, list[tuple[CellResult, CellResult]]] = defaultdict(list)
    for file in sorted(folder.glob("projected*.json")):
        projected = {cell.id: cell for cell in read(file).cells}
        for cell in read(file.with_name(file.name.replace("projected", "measured"))).cells:
            turns[cell.id].append((cell, projected[cell.id]))
    errors: dict[bool, list[float]] = {True: [], False: []}
    peaks, again = [], []
    print(f"{max(map(len, turns.values()))} turns. Cell, measured and projected: TTFT, error; compute; waiting; peak of live tensors, error (ms, MB)")
    for name, pairs in turns.items():
        failed = [cell for pair in pairs for cell in pair if cell.status != "ok"]
        if failed:
            print(f"{name}: {failed[0].status} {failed[0].reason or ''}")
            continue
        cells, others = zip(*pairs, strict=True)
        time, held = median_of(cells, "ttft_s"), median_of(others, "projected_peak_live_bytes")
        error = median([other.metrics["projected_ttft_s"].median / cell.metrics["ttft_s"].median for cell, other in pairs]) - 1
        errors[time < SMALL or median_of(cells, "exposed_comm_s") > WAITING * time].append(error)
        again += [cell.metrics["ttft_s"].median / median_of([*cells[:turn], *cells[turn + 1 :]], "ttft_s") - 1 for turn, cell in enumerate(cells) if cells[1:]]
        peak = max(cell.memory.peak_live_bytes for cell in cells if cell.memory and cell.memory.peak_live_bytes)
        peaks.append(held / peak - 1)
        whole, *parts = (
            f"{1e3 * median_of(cells, part):8.2f} {1e3 * median_of(others, f'projected_{part}'):8.2f}" for part in ("ttft_s", "compute_s", "exposed_comm_s")
        )
        sizes = f"{peak / 1e6:8.2f} {held / 1e6:8.2f} {peaks[-1]:+.2%}"
        print(f"{name.split('/l')[0]:26} {_of(cells[0]):26} {whole} {error:+6.1%}; {'; '.join(parts)}; {sizes}")
    print(_summary(f"cells above {1e3 * SMALL:.0f} ms", errors[False]))
    print(_summary(f"shorter cells, and those that wait for more than {WAITING:.0%} of their time", errors[True]))
    print(_summary("a turn of a cell, against the others of the same cell", again))
    print(_summary("peaks of live tensors", peaks), f"{sum(abs(more) > COUNTED for more in peaks)} differ by more than {COUNTED:.0%}")


def median_of(cells: Sequence[CellResult], name: str) -> float:
    """A metric in the turn in the middle."""
    return median([cell.metrics[name].median for cell in cells])


def _of(cell: CellResult) -> str:
    return f"{cell.key['layout']} {cell.key['strategy']} {cell.key['lengths'][0]}"


def _summary(what: str, errors: Sequence[float]) -> str:
    if not errors:
        return f"{what}: none."
    sizes = [abs(error) for error in errors]
    mean, bias = sum(sizes) / len(sizes), sum(errors) / len(errors)
    return f"{what}: {len(errors)} rows, mean absolute error {mean:.1%}, worst {max(sizes):.1%}, bias {bias:+.1%}."


def _cpbench(*arguments: str) -> None:
    """A command in a process of its own. Exits where it fails."""
    done = subprocess.run([sys.executable, "-m", "cpbench", *arguments], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"cpbench {' '.join(arguments)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
