"""`cpbench calibrate`: start ranks that measure this machine, world size after world size, and write the profile that is made of their rows.

The largest world measures compute and collectives, smaller ones collectives alone. What is measured, and how, is in calibration_rank.py; what
becomes of it is in calibrated.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cpbench.atomic import ANOTHER, refuse_existing, replace_file
from cpbench.environment import Machine
from cpbench.errors import ALL_FAILED, CpbenchError
from cpbench.launch import Launcher, Torchrun
from cpbench.projection.profile import DeviceProfile

if TYPE_CHECKING:
    from cpbench.projection.calibrated import Rows

MODULE = "cpbench.projection.calibration_rank"
DEADLINE = 1200.0  # seconds of one world size; a minute is usual
MOST_RANKS = 64
DEFAULT_FILE = Path("calibration.json")
POLL = 0.2
LOOK, BUSY = 0.5, 15.0  # seconds in which, and percent of all cores from which on, other programs count
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to calibrate: `device` is cpu or cuda."""

    device: str
    ranks: int
    quick: bool

    @property
    def worlds(self) -> list[int]:
        """Numbers of ranks that are measured: powers of two, and all. The last one measures compute too."""
        return sorted({self.ranks, *(1 << power for power in range(1, self.ranks.bit_length()) if 1 << power <= self.ranks)})


def asked(machine: Machine, device: str | None, ranks: int | None, quick: bool) -> Asked:
    """What the flags say. Raises CpbenchError for a device that is not here, and for more ranks than it can have."""
    kind = device or machine.device
    if kind not in ("cpu", "cuda") or (kind == "cuda" and machine.device != "cuda"):
        valid = "cpu or cuda" if machine.device == "cuda" else "cpu"
        raise CpbenchError(f"The device {kind!r} is not on this machine.", f"Valid here: {valid}.")
    here = machine.devices if kind == "cuda" else machine.cores
    most = here if kind == "cuda" else MOST_RANKS
    if ranks is not None and not 1 <= ranks <= most:
        raise CpbenchError(f"--max-ranks {ranks} is outside of 1 to {most}.", f"This machine has {here} {'GPUs' if kind == 'cuda' else 'cores'}.")
    return Asked(kind, here if ranks is None else ranks, quick)


def run(output: Path | None, device: str | None, ranks: int | None, quick: bool, quiet: bool) -> int:
    """The command: measure, write the profile, print what was found."""
    from cpbench.environment import detect_machine
    from cpbench.report import console
    from cpbench.report.calibration import calibration_view

    file = output or DEFAULT_FILE
    refuse_existing(file)
    if not file.absolute().parent.is_dir():
        raise CpbenchError(f"{file} cannot be written: its folder is not there.", ANOTHER)
    machine = detect_machine()
    messages, out, what = console.messages(), console.output(), asked(machine, device, ranks, quick)
    if not quiet and (text := others()):
        console.show(messages, [text])
    profile = calibrate(machine, what, lambda text: None if quiet else console.show(messages, [text]))
    replace_file(file, f"{profile.model_dump_json(by_alias=True, exclude_none=True, indent=1)}\n".encode())
    console.show(out, [*calibration_view(profile, out), "", f"Profile: {file}, for --hardware"])
    return 0


def others() -> str | None:
    """A warning where other programs are at work: a profile would describe them too."""
    import psutil

    busy = psutil.cpu_percent(interval=LOOK)
    return f"Other programs take {busy:.0f}% of the cores; a profile is of what is left. Calibrate when they are done." if busy > BUSY else None


def calibrate(machine: Machine, what: Asked, say: Say, launcher: Launcher | None = None) -> DeviceProfile:
    """Measure, fit, and say on the way what is done. Raises CpbenchError where ranks fail."""
    from cpbench.projection.calibrated import profile_of

    threads = max(1, machine.cores // what.ranks) if what.device == "cpu" else max(1, machine.cores // max(1, machine.devices))
    if what.device == "cpu" and what.ranks > machine.cores:
        say(f"{what.ranks} ranks on {machine.cores} cores: the profile will be of ranks that wait for cores.")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="cpbench-calibrate-") as folder:
        for world in what.worlds:
            job = {"device": what.device, "threads": threads, "quick": what.quick, "compute": world == what.worlds[-1]}
            rows += _run(launcher or Torchrun(MODULE), Path(folder) / f"world{world}", job, world, say)
    return profile_of(rows, machine, what.ranks, threads, what.quick)


def _run(launcher: Launcher, folder: Path, job: dict[str, Any], world: int, say: Say) -> Rows:
    """The rows of one world size."""
    folder.mkdir()
    file, written = folder / "job.json", folder / "rows.jsonl"
    written.touch()
    file.write_text(json.dumps({**job, "rows": str(written)}), encoding="utf-8")
    handle, begin, said = launcher.start(file, world, job["threads"], folder / "logs"), time.monotonic(), ""
    try:
        while (code := handle.poll()) is None and time.monotonic() - begin < DEADLINE:
            time.sleep(POLL)
            names = [json.loads(line)["what"] for line in written.read_text(encoding="utf-8").split("\n")[:-1]]
            if names and names[-1] != said:
                said = names[-1]
                say(f"{world} {'rank' if world == 1 else 'ranks'}: {said} measured, {time.monotonic() - begin:.0f} s")
    finally:
        handle.kill()
    if code is None:
        raise CpbenchError(f"Calibration with {world} ranks did not end in {DEADLINE:.0f} s.", "Try --quick, or fewer ranks with --max-ranks.", ALL_FAILED)
    if code:
        logs = sorted((folder / "logs").rglob("stderr.log"))
        last = next((line for log in logs for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()) if line.strip()), "no log")
        raise CpbenchError(f"Calibration with {world} ranks failed: {last.strip()[:200]}", "cpbench doctor checks this machine.", ALL_FAILED)
    return [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
