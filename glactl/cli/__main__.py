"""python -m glactl.cli"""

from glactl.cli.main import main

main()
