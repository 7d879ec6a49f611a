"""`python -m serving.cli` is `hypersphere`."""

from serving.cli import main

main()
