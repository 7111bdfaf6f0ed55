"""Does a config fit on given GPUs, which layouts are legal, how long does a step take: arithmetic, without either.

hardware.py holds vendors' numbers and every assumption, phases.py memory, speed.py time, advice.py what is legal and
what to change, plan.py puts them together and show.py prints them. docs/planning.md explains the output.
"""
