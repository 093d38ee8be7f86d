"""The manual: man pages and completion, made from the parsers and the format when pkernfs is installed.

    python -m pkernfs.cli.manual DIRECTORY       writes DIRECTORY/man, DIRECTORY/bash-completion, DIRECTORY/zsh

What a parser knows is taken from it (argparse-manpage, shtab: the extra ``docs``).  What it cannot know, files,
environment, limits, stands in ``NAME.SECTION.txt`` beside this file.  May import all of cli; nothing imports it.
"""
