"""Train, validate, test or predict: ``python train.py fit --help``, and ``configs/`` for recipes."""

from zoo.training.cli import readable_errors, run


def main() -> None:
    with readable_errors():
        run()


if __name__ == "__main__":
    main()
