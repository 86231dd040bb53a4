"""`python -m tokabatch` is the command `tokabatch`."""

from tokabatch.cli import program

if __name__ == "__main__":
    program()
