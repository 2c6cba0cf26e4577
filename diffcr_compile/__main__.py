"""``python -m diffcr_compile``: the command ``diffcr-compile``."""

from .command_line import main

if __name__ == "__main__":
    main(prog_name="diffcr-compile")
