"""python -m jaxlm.report WORKDIR: write, or write again, the report of a run."""

import argparse
import sys

from jaxlm.report import write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxlm.report", description=__doc__)
    parser.add_argument("workdir", help="the work folder of a run, as --config.workdir names it")
    try:
        print(write(parser.parse_args().workdir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
