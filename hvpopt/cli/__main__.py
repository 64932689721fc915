"""``python -m hvpopt.cli`` is ``hvpopt``."""

from hvpopt.cli import main

if __name__ == "__main__":
    main()
