"""The command `bkcore`, and `python -m bkcore`: settings to make before PyTorch is imported."""

import os
import sys


def main() -> None:
    """Run the command, as `bkcore.cli.main` says."""
    # Let threads that wait for each other spin for a tenth of a millisecond, then sleep. By default
    # they keep spinning. If another process uses a core, they then take the other core from the
    # very thread that all wait for, and two threads take ten times as long as one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from bkcore.cli import main as run
    except KeyboardInterrupt:  # imports take a second or two
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
