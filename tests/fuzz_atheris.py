"""Coverage-guided fuzzing of a target with atheris (https://github.com/google/atheris).

    python tests/fuzz_atheris.py TARGET [-runs=N] [-max_total_time=SECONDS] [CORPUS_FOLDER]

What stands after TARGET goes to libFuzzer. Bytes become inputs by hypothesis, or are the input
themselves where a target takes bytes. Without atheris, which has wheels for few Pythons, nothing is
run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    print("skipped: atheris is missing; where it has a wheel: pip install -e '.[fuzz]'")
    sys.exit(0)

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["prefopt", "yaml", "jinja2"]):
    from fuzz_targets import TARGETS

from hypothesis import HealthCheck, given, settings


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz_atheris.py TARGET [-runs=N] ...; targets: {', '.join(TARGETS)}")
    program, name, *options = sys.argv
    target = TARGETS[name]
    if target.raw:
        run = target.check
        options.append(_corpus(name))
    else:
        quiet = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        run = quiet(
            given(target.inputs)(lambda value: target.check(value))
        ).hypothesis.fuzz_one_input
        options.append("-len_control=0")  # a short buffer of choices makes no input at all
        options.append("-max_len=4096")
    atheris.Setup([program, *options], run)
    atheris.Fuzz()


def _corpus(name: str) -> str:
    """A folder of inputs that hypothesis drew, to begin with."""
    folder = Path(tempfile.mkdtemp(prefix=f"prefopt-corpus-{name}-"))

    @settings(max_examples=200, database=None, deadline=None, derandomize=True)
    @given(TARGETS[name].inputs)
    def keep(value: bytes) -> None:
        (folder / f"{len(list(folder.iterdir())):03d}").write_bytes(value)

    keep()
    return str(folder)


if __name__ == "__main__":
    main()
