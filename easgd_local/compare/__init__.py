"""Does it pay? The same model, data, start and evaluation for our rules and for what PyTorch brings along.

rivals    the entries that are not ours: their hyperparameters; rival and rival_run are their processes and their runs
entries   what a word of the command line such as "eamsgd tau=16" names
settings  a comparison: entries, length of the runs, seeds, target
contest   the runs one after another, each recorded, resumed where it was interrupted; outset, measuring, tuning
standing  what the records say; tables and figures show it; command is `easgd-local compare`
"""
