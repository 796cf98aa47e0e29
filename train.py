"""Train, validate, test or predict: ``python train.py fit --help``, and ``configs/`` for recipes."""

from zoo.commands.console import train as main

if __name__ == "__main__":
    main()
