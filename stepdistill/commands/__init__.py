"""One file for each command; the command line imports a file only when its command is called."""
