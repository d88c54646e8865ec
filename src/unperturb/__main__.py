"""`python -m unperturb`: the command line."""

from unperturb.cli import main

if __name__ == "__main__":
    main()
