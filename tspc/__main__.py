"""`python -m tspc`."""

from tspc.cli import main

main()
