"""`python -m convinit.cli`, for launchers that start a module, such as torchrun."""

from convinit.cli import main

main()
