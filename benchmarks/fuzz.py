"""What happens to untrusted input: so many broken inputs of every kind, each held to what tests/fuzz/guard.py allows.

    python benchmarks/fuzz.py --inputs 10000
    python benchmarks/fuzz.py --kind config --first 4711 --inputs 1
    python benchmarks/fuzz.py --guided --inputs 100000

An input is allowed to be answered or refused with a sentence; a traceback, 2 s of a processor, 500 MB, a file written outside its folder and
code that runs are findings. Prints one line for each kind and each finding with its number, by which it is found again; the exit code is 1
where there is one. Where an input hangs in C code for a minute the process ends with the stack. With --guided inputs are mutated by atheris,
where it is installed, towards branches that none has taken yet; what is found is then left as a file.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import multiprocessing
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

sys.path.insert(0, str(Path(__file__).parents[1]))  # targets and inputs are shared with the tests

from tests.fuzz.guard import Finding, guarded, import_everything
from tests.fuzz.inputs import made, seeds
from tests.fuzz.targets import TARGETS

HANGS_AFTER = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(TARGETS))
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    options = parser.parse_args()
    if options.guided and find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install atheris")
    failed = False
    for kind in [options.kind] if options.kind else TARGETS:
        how, what = (guided, (kind, options.inputs)) if options.guided else (fuzz, (kind, options.first, options.inputs))
        process = multiprocessing.get_context("spawn").Process(target=how, args=what)
        process.start()  # a process of its own: what one kind leaves in memory is no other's
        process.join()
        if options.guided:
            print(f"{kind:10}{options.inputs:7} inputs, guided by coverage: {'a finding' if process.exitcode else 'no finding'}", flush=True)
        failed = failed or process.exitcode != 0
    return int(failed)


def fuzz(kind: str, first: int, count: int) -> None:
    """Try the inputs of one kind, print what came of them, and exit with 1 where there were findings."""
    import_everything()
    target, findings, begin = TARGETS[kind], 0, time.process_time()
    longest = 0.0
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds(kind):
            target(seed, Path(name))  # what libraries build at first use is built
        for number in range(first, first + count):
            data = made(kind, number)
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
            started = time.process_time()
            try:
                with guarded(Path(name)):
                    target(data, Path(name))
            except (Exception, Finding) as error:
                findings += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
                print(f"    {kind} {number}: {what}", flush=True)
            longest = max(longest, time.process_time() - started)
            faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - begin
    print(f"{kind:10}{count:7} inputs{findings:5} findings  {seconds:7.1f} s of a processor, the longest {longest:.2f} s", flush=True)
    sys.exit(int(findings > 0))


def guided(kind: str, count: int) -> None:
    """So many inputs that libFuzzer makes of the seeds of a kind. It ends the process, with an exit code where something was found."""
    import atheris

    import_everything()
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).startswith(("cpbench.", "yaml.")):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as name:
        corpus, folder = Path(name, "corpus"), Path(name, "files")
        corpus.mkdir()
        folder.mkdir()
        for number, seed in enumerate(seeds(kind)):
            (corpus / str(number)).write_bytes(seed)
            TARGETS[kind](seed, folder)

        def one(data: bytes) -> None:
            with guarded(folder):
                TARGETS[kind](data, folder)

        flags = [f"-runs={count}", "-timeout=0", "-rss_limit_mb=0", "-verbosity=0", "-max_len=20000", f"-artifact_prefix=fuzz-{kind}-"]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
