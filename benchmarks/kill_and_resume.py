"""Kill a training repeatedly, resume it, and compare the result with an uninterrupted one.

    python benchmarks/kill_and_resume.py --kills 25

A process that trains on the toy data gets SIGKILL (or with --signals also SIGTERM, SIGINT and
SIGUSR1) after a random time, and the same command is resumed, --kills times. Then it runs to its
end. Every file is compared with that of an uninterrupted command: weights, predictions and scores
bit by bit, without seconds. The benchmark prints one line per case and ends with status 1 if
anything differs.

With --ranks torchrun starts the command, and one rank is killed. torchrun starts all ranks again,
up to three times; then the command is given again.
"""

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from interruption import CASES, kill_ranks_repeatedly, kill_repeatedly


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--signals", action="store_true", help="not SIGKILL alone")
    parser.add_argument("--ranks", type=int, help="of torchrun; one of them is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signals: list[int] = [signal.SIGKILL]
    if args.signals:
        signals += [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    failed = False
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(args.seed)
            if args.ranks:
                result = kill_ranks_repeatedly(case, args.kills, args.ranks, Path(folder), rng)
            else:
                result = kill_repeatedly(case, args.kills, signals, Path(folder), rng)
        failed |= bool(result["differences"])
        found = result["differences"]
        print(
            f"{case}: {result['kills']} kills, {result['resumes']} resumes, "
            f"differences found: {len(found)} {found or ''}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
