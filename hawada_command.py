"""
The `hawada` script. While it starts, importing `hawada_peft` imports nothing else: help, completion and wrong
usage are answered without torch. A command that begins its work registers the tuner.
"""

starting = False
"""Whether this process is the script, and has not begun a command's work."""


def main() -> None:
    """The entry point."""
    global starting
    starting = True
    from hawada_peft.cli import main as run

    run()


if __name__ == "__main__":  # as `python -m hawada_command`, under which name nobody would look for `starting`
    import hawada_command

    hawada_command.main()
