"""Write README's results, docs/results.md and their picture from the studies that were run.

python scripts/make_results.py [--add STUDY_FOLDER ...]

``--add`` first takes over the report, the table and the record of a study that ``orchard study``
wrote, without its runs, into benchmarks/studies/results.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.studies import results  # noqa: E402
from benchmarks.studies.questions import RESULTS  # noqa: E402

KEPT = ("report.md", "report.csv", "study.json")


def add(folder: Path, into: Path = RESULTS) -> None:
    """Take over what a study found, in the place of what is there.

    Raises:
        FileNotFoundError: It has none of it.
    """
    for name in KEPT:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must be the folder of a study, got one without {name}; repeat orchard "
                "study, which writes it"
            )
    target = into / folder.resolve().name
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, target / name)


def main() -> None:
    """Write what is stale, and say what it was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--add", nargs="*", type=Path, default=[], metavar="STUDY_FOLDER")
    try:
        for folder in parser.parse_args().add:
            add(folder)
        written = results.write()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
