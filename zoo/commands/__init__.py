"""What a person types: each command a typed function, the families of commands each in a file.

``argparse`` reads the words: ``jsonargparse``, asked to make the command line of the functions' signatures, has no
flags, no repeated options, no lists without an option, and underscores in the options' names.
"""
