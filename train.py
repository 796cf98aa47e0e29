"""Train, validate, test or predict: ``python train.py fit --help``, and ``configs/`` for recipes."""

from zoo.classifier import Classifier
from zoo.cli import TRAINER_DEFAULTS, PlainHelp, ZooCLI, readable_errors
from zoo.data import ImageData


def main() -> None:
    with readable_errors():
        ZooCLI(
            Classifier,
            ImageData,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            # An abbreviated option would be a misspelt one that nobody notices.
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "formatter_class": PlainHelp},
            save_config_kwargs={"overwrite": True},
        )


if __name__ == "__main__":
    main()
