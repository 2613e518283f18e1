"""Write docs/reference.md from the code: every key of a config, the optimizers, number formats and presets.

    python scripts/write_docs.py [--check]

--check writes nothing; its exit code is 1 if the file is not up to date.
"""

import argparse
import sys
from pathlib import Path

from lowres.reference import markdown

TARGET = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference.md from the code.")
    parser.add_argument("--check", action="store_true", help="only check whether the file is up to date")
    wanted = markdown()
    if not parser.parse_args().check:
        TARGET.write_text(wanted, "utf-8")
    elif not TARGET.exists() or TARGET.read_text("utf-8") != wanted:
        print(f"{TARGET.name} is not up to date; run python scripts/write_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
