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

from hypothesis import HealthCheck, given, settings


def main() -> None:
    try:
        import atheris
    except ImportError:
        print("skipped: atheris is missing; where it has a wheel: pip install -e '.[fuzz]'")
        return
    with atheris.instrument_imports(include=["prefopt", "yaml", "jinja2"]):
        from fuzz_targets import TARGETS

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz_atheris.py TARGET [-runs=N] ...; targets: {', '.join(TARGETS)}")
    program, name, *options = sys.argv
    target = TARGETS[name]
    if target.raw:
        run = target.check
        options.append(_corpus(target.inputs))
    else:
        quiet = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        run = quiet(given(target.inputs)(target.check)).hypothesis.fuzz_one_input
        options += ["-len_control=0", "-max_len=4096"]  # a few bytes decide on no input at all
    atheris.Setup([program, *options], run)
    atheris.Fuzz()


def _corpus(inputs: object) -> str:
    """A folder of inputs that hypothesis drew, to begin with."""
    folder = Path(tempfile.mkdtemp(prefix="prefopt-corpus-"))

    @settings(max_examples=200, database=None, deadline=None, derandomize=True)
    @given(inputs)
    def keep(content: bytes) -> None:
        (folder / f"{len(list(folder.iterdir())):03d}").write_bytes(content)

    keep()
    return str(folder)


if __name__ == "__main__":
    main()
