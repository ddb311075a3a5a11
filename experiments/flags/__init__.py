"""The flags of every program, as frozen dataclasses.

    groups/      one file a group of flags: the fields, their checks, and what they become
    programs.py  the settings of each program: the groups it takes, and flags of its own
    field.py     `flag(default, help)`: a dataclass field that is also a flag
    declare.py   dataclass -> absl flags -> dataclass; the only file that reads absl's flags
    launch.py    parses the command line and runs `main(settings)`
    resume.py    `flags.txt` of a run directory, and its comparison with a resumed run

A flag has one name everywhere: `--mask_rate` is the field `mask_rate` of the settings. Programs
take their settings as an argument, so Python code calls them without absl:

    from experiments.pretrain import PretrainSettings, main

    main(PretrainSettings(run_dir="runs/a", preset="tiny", steps=100))
"""
