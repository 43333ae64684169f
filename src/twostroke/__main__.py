"""``python -m twostroke`` is the command line."""

from twostroke.cli import main

main()
