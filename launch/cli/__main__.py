"""``python -m launch.cli`` is ``dinogen``, also under torchrun."""

from launch.cli.main import main

main()
