"""The commands of `hawada`, one file each: `run` is the command, `check` refuses what can be refused without torch."""
