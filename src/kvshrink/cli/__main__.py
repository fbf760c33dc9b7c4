"""`python -m kvshrink.cli`."""

from kvshrink.cli import main

main()
