"""`python -m qlora_cli` is `qlora`."""

from qlora_cli.cli import main

if __name__ == "__main__":  # a worker process that prepares data imports this too
    main()
