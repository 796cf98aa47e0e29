"""``python -m zoo COMMAND``; the same as ``decoupled-zoo COMMAND``."""

from zoo.commands.console import main

if __name__ == "__main__":
    main()
