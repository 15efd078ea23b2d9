"""`python -m qlora_cli` is `qlora`."""

from qlora_cli.cli import main

if __name__ == "__main__":
    main()
