"""`python -m paraxis`, also for launchers that start modules."""

from paraxis.cli import main

if __name__ == "__main__":
    main()
