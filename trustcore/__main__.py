"""`python -m trustcore`: the command line, for a checkout or a notebook where the script is not on the path."""

from trustcore.cli import main

if __name__ == "__main__":
    main()
