"""The command `bkcore`, and `python -m bkcore`: what has to be said before PyTorch is imported."""

import os
import sys


def main() -> None:
    """Run the command, as `bkcore.cli.main` says."""
    # Threads that wait for each other sleep. By default they spin, and where another process has
    # their core, everybody waits for the one that does not run: ten times slower than one thread.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from bkcore.cli import main as run
    except KeyboardInterrupt:  # imports take a second or two
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
