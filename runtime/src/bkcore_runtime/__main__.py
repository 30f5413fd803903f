"""`python -m bkcore_runtime` is the command `bkcore-run`."""

from bkcore_runtime.command import main

if __name__ == "__main__":
    main()
