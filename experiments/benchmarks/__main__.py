"""``python -m experiments.benchmarks limit|peers|growth|memory|devices|startup|transforms|links``"""

import sys

import tyro

from experiments.benchmarks import devices, growth, limit, links, memory, pairs, startup, transforms
from experiments.benchmarks.peers import command as peers
from experiments.benchmarks.workloads import UnknownWorkload

SUBCOMMANDS = {
    "limit": limit.main,
    "peers": peers.main,
    "growth": growth.main,
    "memory": memory.main,
    "devices": devices.main,
    "startup": startup.main,
    "transforms": transforms.main,
    "links": links.main,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; bad input ends with one line and status 2, sides that don't agree with status 1."""
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS,
            prog="python -m experiments.benchmarks",
            description="Measure how fast a round is.",
            args=arguments,
        )
    except (UnknownWorkload, peers.UnknownPeer, growth.UnknownPart, pairs.NoFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (peers.Failed, devices.Disagree, limit.DifferentSteps) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
