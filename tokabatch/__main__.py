"""`python -m tokabatch` is the command `tokabatch`."""

from tokabatch.cli import main

if __name__ == "__main__":
    main()
