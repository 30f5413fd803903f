"""The command `bkcore`, and `python -m bkcore`: what has to be said before PyTorch is imported."""

import os
import sys


def main() -> None:
    """Run the command, as `bkcore.cli.main` says."""
    # Threads that wait for each other spin for a tenth of a millisecond and then sleep. By default
    # they go on spinning, and where another process has a core, they keep the one that all wait for
    # from running: then two threads take ten times as long as one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from bkcore.cli import main as run
    except KeyboardInterrupt:  # imports take a second or two
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
