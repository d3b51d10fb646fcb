"""`python -m hawada_peft.cli`, which accelerate and torchrun start."""

from . import main

main()
