"""`python -m bkcore`."""

from bkcore.cli import main

main()
