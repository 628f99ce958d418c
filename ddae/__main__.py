"""`python -m ddae COMMAND`, as the command `ddae`."""

from ddae.cli import main

main()
