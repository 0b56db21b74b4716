"""`python -m dualenc` is the command `dualenc`."""

from dualenc.cli import main

if __name__ == "__main__":
    main()
