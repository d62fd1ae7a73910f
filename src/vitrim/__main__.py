"""`python -m vitrim` is the command `vitrim`."""

from .cli import main

if __name__ == "__main__":
    main()
