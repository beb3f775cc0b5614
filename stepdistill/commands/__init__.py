"""One file for each command; cli.py imports a file only when its command is called."""
