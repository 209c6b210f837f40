"""`python -m shareprefill` is `sp`."""

from shareprefill.cli import main

if __name__ == "__main__":
    main()
