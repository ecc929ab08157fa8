"""`python -m klippo`."""

from klippo.cli.main import main

if __name__ == "__main__":
    main()
