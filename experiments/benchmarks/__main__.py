"""``python -m experiments.benchmarks limit``"""

import sys

import tyro

from experiments.benchmarks import limit
from experiments.benchmarks.workloads import UnknownWorkload

SUBCOMMANDS = {"limit": limit.main}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; bad input ends with one line and status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS,
            prog="python -m experiments.benchmarks",
            description="Measure how fast a round is.",
            args=arguments,
        )
    except UnknownWorkload as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
